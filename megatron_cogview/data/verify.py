"""Everything that can be wrong with a folder of token shards, all of it, and what to do about it.

Shards are read whole by several processes at a time, each in constant memory (``verify_shard.py``).
What readers never look at (leftovers of killed runs, pairs that occur twice) is noted and is no
error.  Knows no tokenizer: ids are compared with the sizes that the manifest names.
"""

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_cogview.configs.data import SPLIT_STEPS
from megatron_cogview.configs.errors import DataError
from megatron_cogview.configs.sequence import MAX_SHARD_TEXT
from megatron_cogview.data.duplicate_ids import SampleIds
from megatron_cogview.data.manifest_fields import field_errors
from megatron_cogview.data.shards import MANIFEST, SHARD_NAME, SPLIT_TABLE, read_manifest
from megatron_cogview.data.verify_shard import Finding, ShardPlan, ShardResult, check_shard
from megatron_cogview.storage.atomic import TEMPORARY_NAME
from megatron_cogview.storage.digest import read_json_with_digest, sha256_file

SIDECAR_NAME = re.compile(r"shard-\d{6,}\.json")
MAKE_AGAIN = (
    "copy the file again, or remove it and manifest.json and run tools/tokenize_dataset.py again "
    "with the same arguments, which makes anew what is missing"
)
REBUILD = (
    "copy the file again, or remove manifest.json and run tools/tokenize_dataset.py again with the "
    "same arguments, which rebuilds it from the shards' .json files"
)
Progress = Callable[[int], object]


@dataclass(slots=True)
class Report:
    """What was found in one folder."""

    folder: Path
    """The folder."""
    findings: list[Finding] = field(default_factory=list)
    """What is wrong."""
    notes: list[str] = field(default_factory=list)
    """What is worth knowing and harmless."""
    shards: int = 0
    """Shards that the manifest names."""
    records: int = 0
    """Records that the manifest names."""
    num_bytes: int = 0
    """Size of these shards by the manifest."""
    duplicates: int | None = None
    """Records whose id another record before has; None if not counted."""

    @property
    def sound(self) -> bool:
        """Whether nothing is wrong."""
        return not self.findings

    def add(self, check: str, file: str, what: str, remedy: str) -> None:
        """One more finding about a whole file."""
        self.findings.append(Finding(check, file, what, remedy))


def verify_all(folders: Sequence[Path], workers: int = 1, quick: bool = False) -> list[Report]:
    """:func:`verify` each folder, with one progress bar in bytes."""
    total = 0 if quick else sum(_shard_bytes(folder) for folder in folders)
    with tqdm(
        total=total,
        desc="verify",
        unit="B",
        unit_scale=True,
        disable=quick,
        mininterval=0.5 if sys.stderr.isatty() else 15.0,
    ) as bar:
        return [verify(folder, workers, bar.update, quick) for folder in folders]


def verify(
    folder: Path, workers: int = 1, progress: Progress | None = None, quick: bool = False
) -> Report:
    """Check a folder of token shards.

    Args:
        folder: with ``manifest.json``.
        workers: processes that read shards; 1: this one.
        progress: hears of the bytes of each shard that is done.
        quick: manifest, split table, and each shard's size and header only.

    Returns:
        All findings, in a fixed order: manifest, files, shards by name, split table, sidecars.

    Raises:
        DataError: a reading process was killed.
    """
    report = Report(Path(folder))
    manifest = _check_manifest(report)
    _check_strays(report, manifest)
    if manifest is None:
        return report
    entries = manifest["shards"]
    report.shards, report.records = len(entries), manifest["records"]
    report.num_bytes = sum(entry["bytes"] for entry in entries)
    plans = [_plan(report.folder, entry, manifest) for entry in entries]
    columns: list[list[int] | None] = [None] * len(plans)
    findings: list[list[Finding]] = [[] for _ in plans]
    with SampleIds(report.records) as ids:
        for index, result in _results(plans, workers, quick):
            findings[index], columns[index] = result.findings, result.split
            if result.sample_ids is not None:
                ids.add(result.sample_ids)
            if progress is not None:
                progress(plans[index].num_bytes)
        if not quick:
            report.duplicates = ids.count_duplicates()
    for part in findings:
        report.findings += part
    if report.duplicates:
        report.notes.append(
            f"{report.duplicates:,} records have the sample_id of another one: pairs that occur "
            "more than once are seen more often, and are always on one side of the split"
        )
    _check_split_table(report, manifest["split_table"], columns)
    if not quick:
        _check_sidecars(report, manifest, columns)
        if "rejected_log" in manifest:
            _check_rejected_log(report, manifest["rejected_log"])
    return report


def _shard_bytes(folder: Path) -> int:
    """What there is to read, for the progress bar; a folder that cannot be read counts nothing."""
    try:
        return sum(path.stat().st_size for path in Path(folder).glob("shard-*.npy"))
    except OSError:
        return 0


def _check_manifest(report: Report) -> dict[str, Any] | None:
    """The manifest, if everything that the other checks need can be read from it."""
    path = report.folder / MANIFEST
    if not path.exists():
        what = "not found: there is no finished data set here"
        report.add("manifest", MANIFEST, what, "run tools/tokenize_dataset.py to its end")
        return None
    try:
        manifest = read_manifest(report.folder)
        errors = field_errors(manifest)
    except DataError as error:
        errors = [_reason(error, path)]
    for what in errors:
        report.add("manifest", MANIFEST, f"{what} (other files were not checked)", REBUILD)
    return None if errors else manifest


def _reason(error: DataError, path: Path) -> str:
    """What is wrong with a file, without its name and without advice meant for readers."""
    return str(error).removeprefix(f"{path}: ").partition(";")[0]


def _check_strays(report: Report, manifest: dict[str, Any] | None) -> None:
    """Files that the manifest does not name."""
    named: set[str] = set()
    if manifest is not None:
        shards = [entry["name"] for entry in manifest["shards"]]
        named = {manifest["split_table"]["name"], *shards}
        named |= {_sidecar_name(name) for name in shards}
    leftovers = 0
    names = sorted(p.name for p in report.folder.iterdir()) if report.folder.is_dir() else []
    for name in names:
        leftovers += bool(TEMPORARY_NAME.fullmatch(name))
        if manifest is None or name in named:
            continue
        if SHARD_NAME.fullmatch(name) or SIDECAR_NAME.fullmatch(name):
            report.add(
                "surplus",
                name,
                "the manifest does not name it",
                "finish the run of tools/tokenize_dataset.py that adds data here, or move it away",
            )
        elif SPLIT_TABLE.fullmatch(name):
            report.notes.append(f"{name}: an earlier split table; it may be removed")
    if leftovers:
        report.notes.append(
            f"{leftovers} temporary file{'s' * (leftovers > 1)} (.*.tmp) of running or killed "
            "writers; when nothing is writing here they may be removed"
        )


def _sidecar_name(shard: str) -> str:
    return Path(shard).with_suffix(".json").name


def _plan(folder: Path, entry: dict[str, Any], manifest: dict[str, Any]) -> ShardPlan:
    layout, tokenizers = manifest["layout"], manifest["tokenizers"]
    return ShardPlan(
        path=folder / entry["name"],
        records=entry["records"],
        num_bytes=entry["bytes"],
        sha256=entry["sha256"],
        codes_per_side=tuple(layout["codes_per_side"]),
        most_text=min(layout["longest_text"], layout.get("text_budget", MAX_SHARD_TEXT)),
        vocab_size=tokenizers["text"]["vocab_size"],
        num_codes=tokenizers["image"]["num_codes"],
    )


def _results(
    plans: Sequence[ShardPlan], workers: int, quick: bool
) -> Iterator[tuple[int, ShardResult]]:
    """Results by shard number, as they come."""
    if workers <= 1 or len(plans) <= 1:
        for index, plan in enumerate(plans):
            yield index, check_shard(plan, quick)
        return
    waiting: dict[Future[ShardResult], int] = {}
    # A fresh interpreter: the caller may have threads, which a forked process would not survive.
    with ProcessPoolExecutor(min(workers, len(plans)), get_context("spawn")) as pool:
        try:
            for index, plan in enumerate(plans):
                waiting[pool.submit(check_shard, plan, quick)] = index
                # Finished results wait in memory, so there must not be many of them.
                if len(waiting) >= 4 * workers:
                    yield from _done(waiting)
            while waiting:
                yield from _done(waiting)
        except BrokenProcessPool:
            raise DataError(
                "a process that reads shards was killed, perhaps for want of memory; verify again "
                "with fewer --workers"
            ) from None


def _done(waiting: dict[Future[ShardResult], int]) -> Iterator[tuple[int, ShardResult]]:
    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
        yield waiting.pop(future), future.result()


def _check_split_table(
    report: Report, stated: dict[str, Any], columns: Sequence[list[int] | None]
) -> None:
    """Hash, shape, and the counts of those shards whose ids were read."""
    name = stated["name"]
    path = report.folder / name
    if not _same_hash(report, "split_table", stated, REBUILD):
        return
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        report.add("split_table", name, f"is not an array ({error})", REBUILD)
        return
    shape = (len(SPLIT_STEPS), len(columns))
    if table.dtype != np.dtype("<u4") or table.shape != shape:
        what = f"is {table.dtype} {list(table.shape)}, must be uint32 {list(shape)}"
        report.add("split_table", name, what, REBUILD)
        return
    for index, column in enumerate(columns):
        if column is not None and table[:, index].tolist() != column:
            what = f"column {index} is not what the ids of that shard give"
            report.add("split_table", name, what, REBUILD)


def _same_hash(report: Report, check: str, stated: dict[str, Any], remedy: str) -> bool:
    """Whether a file has the bytes that the manifest states; a finding if not."""
    path = report.folder / stated["name"]
    try:
        found = sha256_file(path)
    except OSError as error:
        report.add(check, path.name, f"cannot be read ({error.strerror})", remedy)
        return False
    if found != stated["sha256"]:
        what = f"SHA-256 {found}, the manifest says {stated['sha256']}"
        report.add(check, path.name, what, remedy)
        return False
    return True


def _check_rejected_log(report: Report, stated: dict[str, Any]) -> None:
    remedy = "copy the file again, or run tools/tokenize_dataset.py again with the same arguments"
    _same_hash(report, "rejected_log", stated, remedy)


def _check_sidecars(
    report: Report, manifest: dict[str, Any], columns: Sequence[list[int] | None]
) -> None:
    """Each against its own digest, the manifest and the shard."""
    missing, complete = 0, True
    reasons: Counter[str] = Counter()
    for entry, column in zip(manifest["shards"], columns, strict=True):
        name = _sidecar_name(entry["name"])
        if not (report.folder / name).exists():
            missing += 1
            continue
        try:
            sidecar = read_json_with_digest(report.folder / name)
            differences = list(_differences(sidecar, entry, manifest, column))
            reasons.update(item["reason"] for item in sidecar["rejected"])
        except DataError as error:
            differences = [_reason(error, report.folder / name)]
        except (KeyError, TypeError) as error:
            differences = [f"lacks a field or has one of another type ({error})"]
        for what in differences:
            report.add("sidecar", name, what, MAKE_AGAIN)
        complete = complete and not differences
    if missing:
        report.notes.append(
            f"{missing} of {len(columns)} shards have no .json beside them: they can be read, but "
            "nothing can be added to this data set"
        )
    elif complete and dict(reasons) != manifest.get("rejected", {}):
        what = "its counts of rejected pairs are not those of the shards' .json files"
        report.add("manifest", MANIFEST, what, REBUILD)


def _differences(
    sidecar: dict[str, Any],
    entry: dict[str, Any],
    manifest: dict[str, Any],
    column: list[int] | None,
) -> Iterable[str]:
    """Where a sidecar and its manifest or its shard disagree."""
    shard = sidecar["shard"]
    for key in ("name", "records", "bytes", "sha256"):
        if shard[key] != entry[key]:
            yield f"shard's {key} is {shard[key]}, the manifest says {entry[key]}"
    for key in ("source", "source_bytes", "source_sha256"):
        if sidecar[key] != entry[key]:
            yield f"{key} is {sidecar[key]}, the manifest says {entry[key]}"
    if column is not None and shard["split"] != column:
        yield "its split counts are not what the ids of the shard give"
    stated = {key: manifest.get(key) for key in sidecar["settings"]}
    stated["layout"] = {k: v for k, v in manifest["layout"].items() if k != "longest_text"}
    if stated != sidecar["settings"]:
        changed = sorted(k for k in stated if stated[k] != sidecar["settings"].get(k))
        yield f"was made with other settings than the manifest's ({', '.join(changed)})"
