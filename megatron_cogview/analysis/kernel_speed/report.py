"""The benchmark from settings to files; an interrupted one goes on where it stopped.

Every row is on the disk as soon as it ends.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cogview.analysis.kernel_speed import plot
from megatron_cogview.analysis.kernel_speed.acceptance import acceptance
from megatron_cogview.analysis.kernel_speed.cases import OPERATIONS, Operation, all_cases
from megatron_cogview.analysis.kernel_speed.peers import Case, Row, measure
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.analysis.kernel_speed.tables import REHEARSAL, problems_of, tables
from megatron_cogview.analysis.machine import machine
from megatron_cogview.analysis.timing import nvidia_smi
from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.kernels.tuning import sizes_in_use
from megatron_cogview.storage.atomic import locked_directory, write_text

logger = logging.getLogger(__name__)

NAME = "bench_kernels"
_SIZE = "sizes."


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and on what."""

    output: Path
    """Folder for bench_kernels.jsonl, .json, .md and .png.  Rows that it holds are not measured
    again."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where; ``auto`` is the GPU if there is one.  ``cpu`` rehearses at tiny shapes."""
    operations: tuple[Operation, ...] = OPERATIONS
    """Which to measure."""
    lengths: tuple[int, ...] = ()
    """Tokens of a sequence, for attention; without: 1088 2560 4096 8192 16384 on a GPU."""
    tokens: tuple[int, ...] = ()
    """Tokens of a batch, for norms and the junction; without: 8704 32768 65536 on a GPU."""
    rounds: int = 0
    """Timed runs of each peer, of which the median counts; 0: 20 on a GPU, 3 on a CPU."""


def run(settings: Settings) -> list[Row]:
    """Measure what the folder does not hold yet, and write everything.

    Returns:
        All rows.

    Raises:
        ConfigError: a wrong setting, or a folder with rows of other settings or another machine.
        DataError: another process writes into the folder.
    """
    device = _checked(settings)
    rehearsal = device.type == "cpu"
    sizes = Sizes.micro() if rehearsal else Sizes()
    sizes = replace(
        sizes,
        lengths=tuple(dict.fromkeys(settings.lengths)) or sizes.lengths,
        rows=tuple(dict.fromkeys(settings.tokens)) or sizes.rows,
    )
    rounds = settings.rounds or (3 if rehearsal else 20)
    cases = all_cases(sizes, settings.operations)
    about = _about(settings, sizes, rounds, device)
    settings.output.mkdir(parents=True, exist_ok=True)
    with locked_directory(settings.output):
        record = Record(settings.output / f"{NAME}.jsonl", about)
        for case in _with_progress(cases, record.done(), rehearsal):
            record.add(measured(case, device, rounds))
            _write(settings.output, record, rehearsal)
        _write(settings.output, record, rehearsal)
    return record.rows


def measured(case: Case, device: torch.device, rounds: int) -> Row:
    """The row of a case; whatever goes wrong in it must not cost the rows after it."""
    try:
        return measure(case, device, rounds)
    except Exception as error:
        logger.exception("%s failed", case.name)
        failed = f"{type(error).__name__}: {error}"
        return {"row": case.name, **case.facts, "failed": failed}


def _checked(settings: Settings) -> torch.device:
    if settings.rounds < 0:
        raise refuse("rounds", settings.rounds, "must be at least 1, or 0 for the default")
    for name in ("lengths", "tokens"):
        for value in getattr(settings, name):
            if value < 1:
                raise refuse(name, value, "must be at least 1")
    if not settings.operations:
        raise refuse("operations", settings.operations, f"name some of {', '.join(OPERATIONS)}")
    if settings.output.exists() and not settings.output.is_dir():
        raise refuse("output", str(settings.output), "is a file; name a folder")
    present = torch.cuda.is_available()
    if settings.device == "cuda" and not present:
        raise refuse("device", settings.device, "no CUDA device here; --device cpu rehearses")
    on_gpu = present and settings.device != "cpu"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def _about(settings: Settings, sizes: Sizes, rounds: int, device: torch.device) -> dict[str, Any]:
    """Everything that figures depend on; a second start must find the same."""
    on_gpu = device.type == "cuda"
    return {
        **machine(device),
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "driver": nvidia_smi("driver_version") if on_gpu else None,
        "kernel_sizes": sizes_in_use(),
        "operations": sorted(settings.operations),
        "rounds": rounds,
        **{_SIZE + name: getattr(sizes, name) for name in Sizes.__slots__},
        "rehearsal": not on_gpu,
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Record:
    """Rows in a file of JSON lines, whose first line says what they were measured on.

    Args:
        path: the file; read if it is there.
        about: of this start.

    Raises:
        ConfigError: the file was made with other settings or on another machine, or is something
            else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        # As it is read back: JSON has no tuples.
        self.path, self.about = path, json.loads(json.dumps(about))
        self.rows: list[Row] = []
        if path.exists():
            held, self.rows = _read(path)
            for name in {**held, **self.about}:
                if held.get(name) != self.about.get(name):
                    raise ConfigError(
                        f"output = {str(path.parent)!r}: holds rows with {name} "
                        f"{held.get(name)!r}, and now it is {self.about.get(name)!r}; name another "
                        "folder"
                    )

    def done(self) -> set[str]:
        """Rows that need not be measured again: those without problems."""
        return {row["row"] for row in self.rows if not problems_of(row)}

    def add(self, row: Row) -> None:
        """Put a row in the place of an earlier one of its name; on the disk when this returns."""
        self.rows = [one for one in self.rows if one["row"] != row["row"]] + [row]
        lines = [{"about": self.about}, *self.rows]
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in lines))


def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    try:
        first, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        return dict(first["about"]), rows
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            f"output = {str(path.parent)!r}: {path.name} is not a benchmark's; name another folder"
        ) from None


def _with_progress(
    cases: Sequence[Case],
    done: set[str],
    rehearsal: bool,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Case]:
    """The cases that are left, each announced with what they may still take."""
    left = [case for case in cases if case.name not in done]
    if len(left) < len(cases):
        logger.info("%d of %d rows are there already", len(cases) - len(left), len(cases))
    started, passed = clock(), 0.0
    for number, case in enumerate(left):
        ahead = sum(each.estimate_s for each in left[number:])
        # Estimates are for a GPU and generous; what has passed tells how much so.
        speed = (clock() - started) / passed if passed else None
        if speed is not None:
            expected = f"about {_duration(ahead * speed)} left"
        else:
            expected = "" if rehearsal else f"at most {_duration(ahead)} left"
        logger.info("[%d/%d] %s ... %s", number + 1, len(left), case.name, expected)
        yield case
        passed += case.estimate_s


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def _write(folder: Path, record: Record, rehearsal: bool) -> None:
    """Everything but the rows themselves."""
    write_text(folder / f"{NAME}.md", tables(_for_people(record.about), record.rows, rehearsal))
    good = [row for row in record.rows if "peers" in row]
    results = {
        "about": record.about,
        "acceptance": None if rehearsal else [asdict(verdict) for verdict in acceptance(good)],
        "rows": record.rows,
    }
    write_text(folder / f"{NAME}.json", json.dumps(results, indent=1) + "\n")
    title = plot.title_of(REHEARSAL if rehearsal else record.about["device"])
    plot.save(record.rows, folder / f"{NAME}.png", title)


def _for_people(about: Mapping[str, Any]) -> dict[str, Any]:
    """The same with all sizes in one line."""
    sizes = {name: value for name, value in about.items() if name.startswith(_SIZE)}
    words = [f"{name.removeprefix(_SIZE)} {_words(value)}" for name, value in sizes.items()]
    kept = {name: _words(value) for name, value in about.items() if name not in sizes}
    return {**kept, "sizes": ", ".join(words)}


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
