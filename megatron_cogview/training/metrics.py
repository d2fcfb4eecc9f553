"""Where numbers of a training loop go: ``metrics.jsonl``, TensorBoard and a progress bar."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from megatron_cogview.storage.atomic import write_text

FILE = "metrics.jsonl"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


class MetricsLog:
    """Writes on one process and does nothing on the others.

    Args:
        folder: run folder.
        start, total: steps done, and steps of the whole run, for the progress bar.
        enabled: whether this is the process that writes.
        what: label of the progress bar.
        shown: numbers to show beside the bar; all of them if empty.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        enabled: bool,
        what: str = "step",
        shown: tuple[str, ...] = (),
    ) -> None:
        self.enabled = enabled
        self.shown = shown
        self.bar = tqdm(
            total=total, initial=start, desc=what, disable=not enabled, mininterval=1.0, unit="step"
        )
        if not enabled:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        # A resumed run repeats the steps since its checkpoint; their first account is dropped.
        kept = [row for row in read_metrics(path) if row["step"] <= start]
        write_text(path, "".join(_line(row) for row in kept))
        self.file = path.open("a", encoding="utf-8", buffering=1)
        self.board = SummaryWriter(str(folder / "tensorboard"), purge_step=start + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        if self.enabled:
            self.file.close()
            self.board.close()

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update(1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step, counted from 1."""
        if not self.enabled:
            return
        self.file.write(_line({"step": step, **values}))
        for name, value in values.items():
            self.board.add_scalar(name, value, step)
        self.board.flush()
        names = [k for k, v in values.items() if not math.isnan(v)]
        names = [name for name in self.shown or names if name in names]
        if names:
            shown = {name: f"{values[name]:.4g}" for name in names}
            self.bar.set_postfix(shown, refresh=False)

    def picture(self, step: int, name: str, pixels_HWC: NDArray[np.uint8]) -> None:
        """Show a picture in TensorBoard."""
        if self.enabled:
            self.board.add_image(name, pixels_HWC, step, dataformats="HWC")


def _line(row: Mapping[str, float]) -> str:
    # JSON has no NaN; a missing number is null.
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()}
    return json.dumps(clean) + "\n"
