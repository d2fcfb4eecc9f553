"""Where a training loop's numbers and events go: files, TensorBoard and the console.

``metrics.jsonl`` and TensorBoard get every number, the console one readable line.  None of them
may stop a run: a row that the disk refuses is counted and lost, and the next one is tried again.
"""

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from megatron_cogview.storage.atomic import write_bytes
from megatron_cogview.training import line_file
from megatron_cogview.training.console import console_line

logger = logging.getLogger(__name__)

FILE = "metrics.jsonl"
EVENTS = "events.jsonl"
"""What happened beside the steps: ``{"time", "step", "kind", "message"}``; it only ever grows."""
ROLLED_BACK = "metrics_rolled_back.jsonl"
"""Rows of steps that a rollback undid."""

ORDINARY = frozenset({"saved", "skipped", "started", "stopped", "finished"})
"""Kinds of events that are no reason to worry."""


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.jsonl``; a last line cut off by a kill is left out."""
    return line_file.read(path)[0] if path.is_file() else []


class MetricsLog:
    """Writes on one process and does nothing on the others.

    On a terminal it shows a progress bar, and all log lines pass above it; elsewhere, as in the
    file of a Slurm job, there are the lines alone.

    Args:
        folder: run folder.
        start, total: steps done, and steps of the whole run.
        enabled: whether this is the process that writes.
        what: label of the progress bar.
        shown: numbers to show on the console; all of them if empty.
        again: a number of step ``start`` that is to be written again, if it is there.

    Raises:
        OSError: the folder cannot be written at all, which is better known before the first step.
    """

    def __init__(
        self,
        folder: Path,
        start: int,
        total: int,
        enabled: bool,
        what: str = "step",
        shown: tuple[str, ...] = (),
        again: str = "",
    ) -> None:
        self.folder, self.total = folder, total
        self.enabled = enabled
        self.shown = shown
        self.failures = 0
        """Writes that the disk refused."""
        self._told: set[str] = set()
        self._held = contextlib.ExitStack()
        has_bar = enabled and sys.stderr.isatty()
        self.bar = tqdm(
            total=total, initial=start, desc=what, disable=not has_bar, mininterval=1.0, unit="step"
        )
        if not enabled:
            return
        if has_bar:
            self._held.enter_context(logging_redirect_tqdm())
        folder.mkdir(parents=True, exist_ok=True)
        self._drop_repeated(start, again)
        self.board = _Board(folder / "tensorboard", start)

    def _drop_repeated(self, start: int, again: str) -> None:
        """A resumed run repeats the steps since its checkpoint; their first account goes."""
        path = self.folder / FILE
        rows, damaged = line_file.read(path) if path.is_file() else ([], 0)
        if damaged:
            logger.warning("%s: %d damaged lines dropped", path, damaged)
        kept = [row for row in rows if row["step"] <= start]
        kept = [row for row in kept if row["step"] < start or again not in row]
        write_bytes(path, b"".join(line_file.line_of(row) for row in kept))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
        self._held.close()
        if not self.enabled:
            return
        self._try("TensorBoard", self.board.close)
        if self.failures:
            logger.warning("%s: %d writes of metrics were refused", self.folder, self.failures)

    def advance(self) -> None:
        """One more step is done."""
        self.bar.update(1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record the numbers of a step, counted from 1; nothing when there are none."""
        if not self.enabled or not values:
            return
        row = {"step": step, **values}
        self._try(FILE, lambda: line_file.append(self.folder / FILE, row))
        self._try("TensorBoard", lambda: self.board.scalars(step, values))
        shown = {name: values[name] for name in self.shown or values if name in values}
        if shown:
            logger.info("%s", console_line(step, self.total, shown))

    def picture(self, step: int, name: str, pixels_HWC: NDArray[np.uint8]) -> None:
        """Show a picture in TensorBoard."""
        if self.enabled:
            self._try("TensorBoard", lambda: self.board.picture(step, name, pixels_HWC))

    def event(self, step: int, kind: str, message: str) -> None:
        """Tell that something happened at a step, counted from 1."""
        if not self.enabled:
            return
        level = logging.INFO if kind in ORDINARY else logging.WARNING
        logger.log(level, "step %s: %s: %s", f"{step:,}", kind, message)
        row = {"time": round(time.time(), 3), "step": step, "kind": kind, "message": message}
        self._try(EVENTS, lambda: line_file.append(self.folder / EVENTS, row))

    def rewind(self, step: int) -> None:
        """The run goes back to after ``step``; what was told of later steps is no longer true.

        Unlike after a kill these steps do not come again as they were, so their rows are kept
        aside.
        """
        self.bar.n = step
        self.bar.refresh()
        if self.enabled:
            self._try(FILE, lambda: self._put_aside(step))
            self._try("TensorBoard", lambda: self.board.restart(step))

    def _put_aside(self, step: int) -> None:
        path = self.folder / FILE
        if path.is_file():
            line_file.cut_after(path, step, self.folder / ROLLED_BACK)

    def _try(self, what: str, act: Callable[[], object]) -> None:
        """Do something that a disk may refuse; say so the first time."""
        try:
            act()
        except OSError as error:
            self.failures += 1
            if what not in self._told:
                self._told.add(what)
                logger.warning(
                    "%s: %s cannot be written (%s); training goes on, later rows are tried again, "
                    "and this is said once",
                    self.folder,
                    what,
                    error,
                )


class _Board:
    """TensorBoard's files.  After an error its writer is of no use, so that a new one is made.

    Args:
        folder: of the event files.
        start: steps done; what the files say of later ones is hidden.
    """

    def __init__(self, folder: Path, start: int) -> None:
        self.folder = folder
        self._pause, self._waits = 1, 0
        self._writer: Any = self._new(start)

    def _new(self, start: int | None) -> Any:
        return SummaryWriter(
            str(self.folder), purge_step=None if start is None else start + 1, flush_secs=30
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add numbers, and see that they are on the disk."""

        def add(writer: Any) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        self._use(add)

    def picture(self, step: int, name: str, pixels_HWC: NDArray[np.uint8]) -> None:
        """Add a picture."""
        self._use(lambda writer: writer.add_image(name, pixels_HWC, step, dataformats="HWC"))

    def restart(self, step: int) -> None:
        """Hide everything after ``step``."""
        self.close()
        self._writer = self._new(step)

    def _use(self, act: Callable[[Any], None]) -> None:
        if self._writer is None:
            # Each new writer is a new file: on a disk that stays full there should be few.
            self._waits += 1
            if self._waits < self._pause:
                return
            self._waits, self._pause = 0, min(2 * self._pause, 64)
        try:
            self._writer = self._writer or self._new(None)
            act(self._writer)
        except OSError:
            with contextlib.suppress(OSError):
                self.close()
            raise
        self._pause = 1

    def close(self) -> None:
        """Write what is left; without a word if there is no writer."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()
