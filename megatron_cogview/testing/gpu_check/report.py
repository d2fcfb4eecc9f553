"""Results on disk: one JSON line per row, flushed as it ends, and a Markdown table beside it.

The environment is written first, so that no figure is ever without its hardware and commit.
"""

import datetime
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

import torch

import megatron_cogview
from megatron_cogview.analysis.kernel_speed.tables import REHEARSAL
from megatron_cogview.analysis.timing import nvidia_smi
from megatron_cogview.configs.errors import ConfigError
from megatron_cogview.kernels.tuning import sizes_in_use
from megatron_cogview.storage.atomic import write_text
from megatron_cogview.testing.gpu_check.rows import Outcome

Sections = Callable[[Sequence[Outcome]], str]
ROOT = Path(megatron_cogview.__file__).resolve().parents[1]


def environment(device: torch.device) -> dict[str, str]:
    """Hardware, versions, commit and date, as far as they can be found out."""
    with_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if with_cuda else REHEARSAL,
        "driver": nvidia_smi("driver_version") if with_cuda else "none",
        "cuda": str(torch.version.cuda),
        "clocks_at_start": nvidia_smi() if with_cuda else "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "kernel_sizes": sizes_in_use(),
        "megatron_core": _version("megatron-core"),
        "python": platform.python_version(),
        "megatron_cogview": megatron_cogview.__version__,
        "commit": _commit(ROOT),
        "date_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str:
    try:
        return installed_version(package)
    except PackageNotFoundError:
        return "absent"


def _commit(root: Path) -> str:
    """The commit of a checkout, marked when files differ from it."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return "unknown"
    commit = _output(["git", "-C", str(root), "rev-parse", "HEAD"])
    changed = _output(["git", "-C", str(root), "status", "--porcelain"])
    return f"{commit or 'unknown'}{' with uncommitted changes' if changed else ''}"


def _output(command: list[str]) -> str:
    """Standard output of a command; empty when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


class Report:
    """``FOLDER/PART.jsonl`` and ``FOLDER/PART.md``.

    Args:
        folder: created if need be.
        part: name of the part.
        about: of :func:`environment`; the first line of the JSON file.
        sections: makes more Markdown of the outcomes, below the table.

    Raises:
        ConfigError: the folder already holds results of this part.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        about: dict[str, str],
        sections: Sections | None = None,
    ) -> None:
        self.part, self.about, self.sections = part, about, sections
        self.outcomes: list[Outcome] = []
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.table = folder / f"{part}.jsonl", folder / f"{part}.md"
        for path in (self.lines, self.table):
            if path.exists():
                raise ConfigError(f"--output {folder}: {path.name} is there; name another folder")
        self._append({"environment": about})

    def record(self, outcome: Outcome) -> None:
        """Append one row, on the disk when this returns, and write the table anew."""
        entry = outcome.to_dict()
        if torch.cuda.is_available():
            entry["clocks_after"] = nvidia_smi()
        self._append(entry)
        self.outcomes.append(outcome)
        text = markdown(self.part, self.about, self.outcomes)
        if self.sections is not None:
            text += "\n" + self.sections(self.outcomes)
        write_text(self.table, text)

    def _append(self, entry: dict[str, Any]) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())


def markdown(part: str, about: dict[str, str], outcomes: list[Outcome]) -> str:
    """The table of one part."""
    rehearsal = about["device"] == REHEARSAL
    lines = [f"# gpu_check: {part}", ""]
    if rehearsal:
        lines += [f"**{REHEARSAL}**", ""]
    lines += ["| environment | |", "|---|---|"]
    lines += [f"| {name} | {_cell(value)} |" for name, value in about.items()]
    title = f"figures ({REHEARSAL})" if rehearsal else "figures"
    lines += ["", f"| row | status | seconds | {title} |", "|---|---|---:|---|"]
    for o in outcomes:
        text = "; ".join(
            f"{name} {_number(value)}"
            for name, value in o.figures.items()
            # What has parts is for the JSON file and for sections.
            if not isinstance(value, dict | list)
        )
        status = f"{o.status}: {o.message}" if o.message else o.status
        lines.append(f"| {_cell(o.row)} | {_cell(status)} | {o.seconds:.1f} | {_cell(text)} |")
    return "\n".join(lines) + "\n"


def _number(value: Any) -> str:
    if value is None:
        return "not measured"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cell(text: str) -> str:
    """Text that cannot break a table, at most 300 characters: the JSON file holds all of it."""
    flat = " ".join(text.replace("|", "\\|").split())
    return flat if len(flat) <= 300 else flat[:297] + "..."
