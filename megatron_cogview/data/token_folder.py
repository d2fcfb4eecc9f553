"""The output folder of a tokenisation: what is there, what is missing, and the order of commits.

Each part of the input becomes one shard and one sidecar, committed in that order; the manifest
comes when every part is there.  A killed run goes on after the last sidecar and ends with the same
bytes.  Several processes may share the folder: each locks its parts, and whoever commits the last
one writes the manifest.  Knows nothing of how records are made.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from megatron_cogview.configs.errors import DataError
from megatron_cogview.data.raw import Part, Rejected
from megatron_cogview.data.shards import (
    MANIFEST,
    SPLIT_TABLE,
    Records,
    read_manifest,
    shard_name,
    write_manifest,
    write_shard,
)
from megatron_cogview.storage.atomic import fsync_directory, remove_stale, replacing
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)
from megatron_cogview.storage.locks import WorkLocks

logger = logging.getLogger(__name__)

REJECTED_LOG = "rejected.jsonl"
LOCKS = ".locks"
_MANIFEST_LOCK = 1 << 40

Digest = Callable[[Part], str]


class TokenFolder:
    """One output folder, for one data set and one set of settings."""

    def __init__(
        self,
        output: Path,
        parts: Sequence[Part],
        settings: dict[str, Any],
        digest: Digest,
        verify_inputs: bool = False,
        max_rejected: float = 1.0,
    ) -> None:
        """Take what is to be there when all is done.

        Args:
            output: created if missing.
            parts: the whole input, in order, whoever works on it.
            settings: everything besides the input that decides the bytes.
            digest: SHA-256 of one part's input.
            verify_inputs: compare inputs with finished shards by their hashes; otherwise by size,
                and by hash only if a file is newer than the shard.
            max_rejected: share of pairs, 0..1, above which no manifest is written.
        """
        self.output, self.parts, self.settings = Path(output), parts, settings
        self._digest, self._verify_inputs = digest, verify_inputs
        self._max_rejected = max_rejected
        self.output.mkdir(parents=True, exist_ok=True)
        self.locks = WorkLocks(self.output / LOCKS)

    def claim(self, mine: Sequence[int], patience_seconds: float = 0.0) -> list[int]:
        """Lock these parts until the process ends; which of them are still to be made.

        ``patience_seconds``: how long to wait for locks that others hold.

        Raises:
            DataError: another live process works on one of them, or the folder holds something
                else than a beginning of this data set.
        """
        self._check_surplus()
        self.locks.take(mine, patience_seconds)
        names = {shard_name(k) for k in mine} | {self._sidecar(k).name for k in mine}
        if self.locks.supported:
            remove_stale(self.output, names.__contains__)
        finished = self._finished_shards()
        missing = []
        for index in mine:
            if index < len(finished):
                self._check_input_unchanged(index, finished[index])
            # A damaged shard of a finished data set is made again, too.
            if not self._reusable(index):
                missing.append(index)
        # Whoever finishes meanwhile must not take an old sidecar for the new shard's.
        old = [self._sidecar(k) for k in missing if k >= len(finished)]
        old = [path for path in old if path.is_file()]
        for path in old:
            path.unlink()
        if old:
            fsync_directory(self.output)
        return missing

    def commit(
        self,
        index: int,
        records: Records,
        rejected: Sequence[Rejected],
        counts: dict[str, int],
        digest: str,
    ) -> None:
        """Write the shard of a claimed part, then its sidecar.

        ``counts`` go into the manifest, summed up; ``longest_text`` as a maximum.
        """
        part = self.parts[index]
        shard = write_shard(self.output / shard_name(index), records)
        sidecar = {
            "settings": self.settings,
            "source": part.name,
            "source_bytes": part.num_bytes,
            "source_sha256": digest,
            "shard": shard,
            "counts": counts,
            "rejected": [
                {
                    "id": r.id,
                    "reason": r.reason,
                    "source": r.source,
                    "detail": r.detail,
                    "pairs": r.pairs,
                }
                for r in rejected
            ],
        }
        write_json_with_digest(self._sidecar(index), sidecar)

    def summary(self, index: int) -> tuple[int, Counter[str]]:
        """Records and rejections by reason of a committed part."""
        sidecar = self._read_sidecar(index)
        return int(sidecar["shard"]["records"]), rejections(sidecar)

    def finish(self) -> dict[str, Any] | None:
        """Write the log of rejections and the manifest, if every part is there; the manifest.

        Raises:
            DataError: no records at all, too many rejections, or parts that were made with other
                settings.
        """
        self.locks.wait_for(_MANIFEST_LOCK)
        try:
            missing = [k for k in range(len(self.parts)) if not self._sidecar(k).is_file()]
            if missing:
                logger.info(
                    "%s: %d of %d parts are done; the process that finishes the last one "
                    "writes the manifest",
                    self.output, len(self.parts) - len(missing), len(self.parts),
                )  # fmt: skip
                return None
            if self.locks.supported:
                remove_stale(self.output, _is_of_the_manifest)
            return self._write_manifest()
        finally:
            self.locks.give_back([_MANIFEST_LOCK])

    def close(self) -> None:
        """Give all locks back."""
        self.locks.close()

    def _write_manifest(self) -> dict[str, Any]:
        """Sidecars are read one at a time: together they may be larger than the memory."""
        entries, reasons = [], Counter[str]()
        totals: Counter[str] = Counter()
        longest = 0
        for index in range(len(self.parts)):
            sidecar = self._merged(index)
            source = {k: sidecar[k] for k in ("source", "source_bytes", "source_sha256")}
            entries.append(sidecar["shard"] | source)
            reasons.update(rejections(sidecar))
            counts = dict(sidecar["counts"])
            longest = max(longest, counts.pop("longest_text"))
            totals.update(counts)
        check_share(sum(e["records"] for e in entries), reasons, self._max_rejected)
        about = {
            **self.settings,
            "layout": self.settings["layout"] | {"longest_text": longest},
            "rejected": dict(sorted(reasons.items())),
            "rejected_log": self._write_rejected(),
            "counts": dict(sorted(totals.items())),
        }
        return write_manifest(self.output, entries, about)

    def _write_rejected(self) -> dict[str, Any]:
        """Assemble the log in input order."""
        digest, size = hashlib.sha256(), 0
        with replacing(self.output / REJECTED_LOG) as file:
            for index in range(len(self.parts)):
                for item in self._read_sidecar(index)["rejected"]:
                    line = (json.dumps(item, ensure_ascii=False) + "\n").encode("utf-8")
                    digest.update(line)
                    size += file.write(line)
        return {"name": REJECTED_LOG, "bytes": size, "sha256": digest.hexdigest()}

    def _merged(self, index: int) -> dict[str, Any]:
        """A sidecar for the manifest; made by whom does not matter, from what does."""
        sidecar = self._read_sidecar(index)
        part = self.parts[index]
        if (sidecar["source"], sidecar["source_bytes"]) != (part.name, part.num_bytes):
            raise DataError(
                f"{self._sidecar(index)}: was made from {sidecar['source']}, and part {index} is "
                f"now {part.name} of {part.num_bytes} bytes; run that worker again, or choose "
                "another --output folder"
            )
        if sidecar["settings"] != self.settings:
            raise DataError(
                f"{self._sidecar(index)}: was made with other settings ("
                f"{_difference(sidecar['settings'], self.settings)}); run that worker again, with "
                "the same settings"
            )
        return sidecar

    def _check_surplus(self) -> None:
        surplus = [
            p for p in self.output.glob("shard-*.json") if int(p.stem[6:]) >= len(self.parts)
        ]
        if surplus:
            raise DataError(
                f"{min(surplus)}: belongs to a run over more than {len(self.parts)} parts; "
                f"choose another --output folder"
            )

    def _finished_shards(self) -> list[dict[str, Any]]:
        """Entries of a manifest that is there; it must fit the settings."""
        if not (self.output / MANIFEST).is_file():
            return []
        manifest = read_manifest(self.output)
        for kind in ("text", "image"):
            there = manifest["tokenizers"][kind]["fingerprint"]
            here = self.settings["tokenizers"][kind]["fingerprint"]
            if there != here:
                raise DataError(
                    f"{self.output}: holds shards made with the {kind} tokenizer {there}, not "
                    f"{here}; choose another --output folder"
                )
        layout = {k: v for k, v in manifest["layout"].items() if k != "longest_text"}
        there_settings = {k: manifest.get(k) for k in self.settings} | {"layout": layout}
        if there_settings != self.settings:
            raise DataError(
                f"{self.output}: holds finished shards made with other settings ("
                f"{_difference(there_settings, self.settings)}); choose another --output folder"
            )
        shards: list[dict[str, Any]] = manifest["shards"]
        return shards

    def _check_input_unchanged(self, index: int, entry: dict[str, Any]) -> None:
        """A finished data set may grow, and that is all."""
        if not self._same_input(index, entry):
            raise DataError(
                f"{self.output}: {shard_name(index)} was made from {entry['source']}, now "
                f"{self.parts[index].name} with another content stands there; choose another "
                "--output folder"
            )

    def _reusable(self, index: int) -> bool:
        """Whether an earlier run made this part from these inputs, and its shard is intact."""
        path = self._sidecar(index)
        if not path.is_file():
            return False
        try:
            sidecar = self._read_sidecar(index)
            settings = sidecar["settings"]
            intact = sha256_file(self.output / shard_name(index)) == sidecar["shard"]["sha256"]
            good = intact and self._same_input(index, sidecar)
        except (DataError, OSError, KeyError) as error:
            logger.warning("%s: not usable (%s); tokenising again", path, error)
            return False
        if settings != self.settings:
            # Another run's work of days is not thrown away for a mistyped option.
            raise DataError(
                f"{path}: was made with other settings ({_difference(settings, self.settings)}); "
                "choose another --output folder, or delete this one"
            )
        if not good:
            logger.warning("%s: made from other inputs or damaged; tokenising again", path)
        return good

    def _same_input(self, index: int, made_from: dict[str, Any]) -> bool:
        """Whether a part is still what an entry or sidecar says that it was."""
        part, sidecar = self.parts[index], self._sidecar(index)
        if (made_from["source"], made_from["source_bytes"]) != (part.name, part.num_bytes):
            return False
        quick = not self._verify_inputs and sidecar.is_file()
        if quick and part.path.stat().st_mtime_ns <= sidecar.stat().st_mtime_ns:
            return True
        return bool(self._digest(part) == made_from["source_sha256"])

    def _read_sidecar(self, index: int) -> dict[str, Any]:
        return read_json_with_digest(self._sidecar(index))

    def _sidecar(self, index: int) -> Path:
        return (self.output / shard_name(index)).with_suffix(".json")


def _is_of_the_manifest(name: str) -> bool:
    return name in (MANIFEST, REJECTED_LOG) or bool(SPLIT_TABLE.fullmatch(name))


def rejections(sidecar: dict[str, Any]) -> Counter[str]:
    """Pairs that a part lost, by reason."""
    reasons: Counter[str] = Counter()
    for item in sidecar["rejected"]:
        reasons[item["reason"]] += item["pairs"]
    return reasons


def check_share(records: int, reasons: Counter[str], max_rejected: float) -> None:
    """Refuse what lost more than the share of pairs that is allowed.

    Raises:
        DataError: it did, or there is no record at all.
    """
    total = records + reasons.total()
    if reasons.total() > max_rejected * total:
        raise DataError(
            f"{reasons.total()} of {total} pairs rejected, more than --max-rejected "
            f"{max_rejected}: {shown(reasons)}; the ids are in shard-*.json of the output folder"
        )
    if not records:
        raise DataError(f"no pair could be used; rejected: {shown(reasons)}")


def _difference(there: dict[str, Any], here: dict[str, Any]) -> str:
    """The first field that differs, with both values."""
    for key in here:
        if there.get(key) != here[key]:
            return f"{key}: {there.get(key)} there, {here[key]} here"
    return "fields that this program does not know"


def shown(reasons: Counter[str]) -> str:
    """Rejections by reason, for messages."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
