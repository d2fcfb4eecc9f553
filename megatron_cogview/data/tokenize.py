"""Offline tokenisation: pairs of one source to token shards, restartable per input file.

Each input file becomes one shard and one sidecar, committed in that order; the manifest comes
last.  A killed run goes on after the last sidecar and ends with the same bytes.  Knows neither
tars nor networks, only a source and two tokenizers.
"""

import hashlib
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import accumulate, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from megatron_cogview.configs.errors import ConfigError, DataError, refuse
from megatron_cogview.configs.sequence import MAX_SHARD_TEXT, SequenceConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data import images
from megatron_cogview.data.raw import PairSource, RawPair, Rejected
from megatron_cogview.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    Records,
    read_manifest,
    record_dtype,
    shard_name,
    write_shard,
)
from megatron_cogview.storage.atomic import locked_directory, remove_stale, replacing
from megatron_cogview.storage.digest import (
    read_json_with_digest,
    sha256_file,
    write_json_with_digest,
)
from megatron_cogview.tokenization.text import TextTokenizer, normalise

if TYPE_CHECKING:
    from megatron_cogview.tokenization.image import ImageTokenizer

logger = logging.getLogger(__name__)

REJECTED_LOG = "rejected.jsonl"
MIN_PAIRS_TO_ABORT = 1000
"""Pairs seen before a high rejected share stops the run early."""


def tokenize_dataset(
    source: PairSource,
    text_tokenizer: TextTokenizer,
    image_tokenizer: "ImageTokenizer",
    output: Path,
    sequence: SequenceConfig,
    batch_size: int = 64,
    max_rejected: float = 1.0,
    vocab: VocabConfig | None = None,
) -> dict[str, Any]:
    """Write shards, ``rejected.jsonl`` and ``manifest.json`` to ``output``; give the manifest.

    Run again with the same arguments it finishes what is missing; with input files added at the
    end it appends.  ``max_rejected`` is the share of pairs, 0..1, above which the run fails.
    ``batch_size`` pictures are encoded at a time.  ``vocab``: the model's, to check that both
    tokenizers fit it.

    Raises:
        ConfigError: the tokenizers do not fit the sequence or the vocabulary.
        DataError: nothing usable, too much rejected, or ``output`` holds other data.
    """
    if batch_size < 1:
        raise refuse("batch_size", batch_size, "must be at least 1")
    _check_tokenizers(text_tokenizer, image_tokenizer, sequence, vocab)
    source.check()
    encoder = _Encoder(source, text_tokenizer, image_tokenizer, sequence, batch_size)
    run = _Run(Path(output), source.shards(), encoder)
    run.output.mkdir(parents=True, exist_ok=True)
    with locked_directory(run.output):
        remove_stale(run.output)
        run.check_existing()
        return run.execute(max_rejected)


@dataclass(slots=True)
class _Encoded:
    """What one input file gives."""

    parts: list[Records] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    truncated: int = 0


class _Encoder:
    """Pairs of one file -> records; the part that costs time."""

    def __init__(
        self,
        source: PairSource,
        text: TextTokenizer,
        image: "ImageTokenizer",
        sequence: SequenceConfig,
        batch_size: int,
    ) -> None:
        self.source, self.text, self.image, self.sequence = source, text, image, sequence
        self.batch_size = batch_size
        self.dtype = record_dtype(sequence.codes_per_side)
        pixels_per_code = image.config.image_size // image.config.codes_per_side
        self.sizes = [side * pixels_per_code for side in sequence.codes_per_side]

    @property
    def settings(self) -> dict[str, Any]:
        """Everything besides the input file that decides the bytes of a shard."""
        sequence = self.sequence
        return {
            "version": FORMAT_VERSION,
            "source": self.source.description,
            "layout": {
                "text_ids": MAX_SHARD_TEXT,
                "text_budget": sequence.text_budget,
                "text_policy": sequence.text_policy,
                "codes_per_side": list(sequence.codes_per_side),
            },
            "tokenizers": {
                "text": {
                    "fingerprint": self.text.fingerprint,
                    "vocab_size": self.text.vocab_size,
                },
                "image": {
                    "fingerprint": self.image.fingerprint,
                    "num_codes": self.image.config.num_codes,
                },
            },
        }

    def encode_file(self, path: Path, advance: Callable[[int], object]) -> _Encoded:
        """Records and rejections of one file; ``advance`` hears of the bytes done."""
        encoded = _Encoded(parts=[np.zeros(0, dtype=self.dtype)])
        items = self.source.read(path)
        while chunk := list(islice(items, self.batch_size)):
            self._encode_chunk(chunk, encoded)
            advance(sum(len(item.image) for item in chunk if isinstance(item, RawPair)))
        return encoded

    def _encode_chunk(self, chunk: list[RawPair | Rejected], encoded: _Encoded) -> None:
        captions = [item.caption for item in chunk if isinstance(item, RawPair)]
        texts = iter(self.text.encode_batch(captions))
        kept: list[tuple[str, list[int], NDArray[np.uint8]]] = []
        for item in chunk:
            if isinstance(item, RawPair):
                checked = self._check_pair(item, next(texts))
                if not isinstance(checked, Rejected):
                    ids, picture, was_cut = checked
                    encoded.truncated += was_cut
                    kept.append((item.id, ids, picture))
                    continue
                item = checked
            encoded.rejected.append(item)
        if kept:
            encoded.parts.append(self._records(kept))

    def _check_pair(
        self, pair: RawPair, ids: list[int]
    ) -> tuple[list[int], NDArray[np.uint8], bool] | Rejected:
        budget = self.sequence.text_budget
        if not normalise(pair.caption) or not ids:
            return Rejected(pair.id, "empty caption", pair.source)
        if len(ids) > budget and self.sequence.text_policy == "reject":
            detail = f"{len(ids)} ids, budget {budget}"
            return Rejected(pair.id, "caption over the text budget", pair.source, detail)
        try:
            picture = images.decode(pair.image, max(self.sizes))
        except DataError as error:
            return Rejected(pair.id, "unusable image", pair.source, str(error))
        return ids[:budget], picture, len(ids) > budget

    def _records(self, kept: list[tuple[str, list[int], NDArray[np.uint8]]]) -> Records:
        records: Records = np.zeros(len(kept), dtype=self.dtype)
        for record, (name, ids, _) in zip(records, kept, strict=True):
            record["text"][: len(ids)] = ids
            record["text_length"] = len(ids)
            digest = hashlib.sha256(name.encode("utf-8")).digest()
            record["sample_id"] = int.from_bytes(digest[:8], "little")
        for index, size in enumerate(self.sizes):
            side = self.sequence.codes_per_side[index]
            pictures = [p if p.shape[0] == size else images.shrink(p, size) for _, _, p in kept]
            codes = self.image.encode(torch.from_numpy(np.stack(pictures))).cpu().numpy()
            if codes.shape != (len(kept), side, side):
                raise ConfigError(
                    f"image tokenizer: gave codes of shape {codes.shape} for {size} pixels, "
                    f"expected {(len(kept), side, side)}"
                )
            if int(codes.min()) < 0 or int(codes.max()) >= self.image.config.num_codes:
                raise ConfigError(
                    f"image tokenizer: gave codes {codes.min()}..{codes.max()}, but its "
                    f"num_codes = {self.image.config.num_codes}"
                )
            records[f"image{index}"] = codes
        return records


class _Run:
    """One output folder: what is there, what is missing, and the order of commits."""

    def __init__(self, output: Path, inputs: list[Path], encoder: _Encoder) -> None:
        self.output, self.inputs, self.encoder = output, inputs, encoder
        self.settings = encoder.settings
        self._hashes: dict[Path, str] = {}

    def check_existing(self) -> None:
        """Refuse an output folder that holds something else than a beginning of this run."""
        surplus = [
            p for p in self.output.glob("shard-*.json") if int(p.stem[6:]) >= len(self.inputs)
        ]
        if surplus:
            raise DataError(
                f"{min(surplus)}: belongs to a run over more than {len(self.inputs)} input files; "
                f"choose another --output folder"
            )
        if not (self.output / MANIFEST).is_file():
            return
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
        for name, there in (("layout", layout), ("source", manifest["source"])):
            if there != self.settings[name]:
                raise DataError(
                    f"{self.output}: holds shards made with {name} {there}, not "
                    f"{self.settings[name]}; choose another --output folder"
                )
        for entry, path in zip(manifest["shards"], self.inputs, strict=False):
            if (entry["source"], entry["source_sha256"]) != (path.name, self._hash(path)):
                raise DataError(
                    f"{self.output}: {entry['name']} was made from {entry['source']}, now "
                    f"{path.name} with another content stands there; choose another --output folder"
                )

    def execute(self, max_rejected: float) -> dict[str, Any]:
        """Tokenise what is missing, then write the log and the manifest."""
        ends = list(accumulate(path.stat().st_size for path in self.inputs))
        entries: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        records = truncated = longest = 0
        with tqdm(
            total=ends[-1],
            desc="tokenise",
            unit="B",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 15.0,
        ) as bar:
            for index, (path, end) in enumerate(zip(self.inputs, ends, strict=True)):
                sidecar = self._reusable(index, path) or self._commit(index, path, bar.update)
                bar.update(end - bar.n)
                source = {key: sidecar[key] for key in ("source", "source_sha256")}
                entries.append(sidecar["shard"] | source)
                reasons.update(item["reason"] for item in sidecar["rejected"])
                records += sidecar["shard"]["records"]
                truncated += sidecar["truncated"]
                longest = max(longest, sidecar["longest_text"])
                if records + reasons.total() >= MIN_PAIRS_TO_ABORT:
                    self._check_share(records, reasons, max_rejected)
        self._check_share(records, reasons, max_rejected)
        if not records:
            raise DataError(f"no pair could be used; rejected: {_counts(reasons)}")
        manifest = {
            "format": "megatron_cogview token shards",
            **self.settings,
            "layout": self.settings["layout"] | {"longest_text": longest},
            "records": records,
            "rejected": dict(sorted(reasons.items())),
            "rejected_log": self._write_rejected(),
            "truncated": truncated,
            "shards": entries,
        }
        write_json_with_digest(self.output / MANIFEST, manifest)
        logger.info(
            "%s: %d records, rejected: %s, texts cut: %d",
            self.output, records, _counts(reasons), truncated,
        )  # fmt: skip
        return manifest

    def _reusable(self, index: int, path: Path) -> dict[str, Any] | None:
        """The sidecar of an earlier run if it speaks of these inputs and its shard is intact."""
        sidecar_path = self._sidecar(index)
        if not sidecar_path.is_file():
            return None
        try:
            sidecar = read_json_with_digest(sidecar_path)
            same_inputs = (
                sidecar["settings"] == self.settings
                and sidecar["source"] == path.name
                and sidecar["source_sha256"] == self._hash(path)
            )
            intact = sha256_file(self.output / shard_name(index)) == sidecar["shard"]["sha256"]
        except (DataError, OSError, KeyError) as error:
            logger.warning("%s: not usable (%s); tokenising again", sidecar_path, error)
            return None
        if not (same_inputs and intact):
            logger.warning("%s: made from other inputs or damaged; tokenising again", sidecar_path)
            return None
        return sidecar

    def _commit(self, index: int, path: Path, advance: Callable[[int], object]) -> dict[str, Any]:
        digest = self._hash(path)
        encoded = self.encoder.encode_file(path, advance)
        records = np.concatenate(encoded.parts)
        sidecar = {
            "settings": self.settings,
            "source": path.name,
            "source_sha256": digest,
            "shard": write_shard(self.output / shard_name(index), records),
            "longest_text": int(records["text_length"].max(initial=0)),
            "truncated": encoded.truncated,
            "rejected": [asdict(item) for item in encoded.rejected],
        }
        write_json_with_digest(self._sidecar(index), sidecar)
        return sidecar

    def _write_rejected(self) -> dict[str, Any]:
        """Assemble the log from the sidecars, in input order."""
        digest, size = hashlib.sha256(), 0
        with replacing(self.output / REJECTED_LOG) as file:
            for line in self._rejected_lines():
                digest.update(line)
                size += file.write(line)
        return {"name": REJECTED_LOG, "bytes": size, "sha256": digest.hexdigest()}

    def _rejected_lines(self) -> Iterator[bytes]:
        for index in range(len(self.inputs)):
            for item in read_json_with_digest(self._sidecar(index))["rejected"]:
                yield (json.dumps(item, ensure_ascii=False) + "\n").encode("utf-8")

    def _check_share(self, records: int, reasons: Counter[str], max_rejected: float) -> None:
        total = records + reasons.total()
        if reasons.total() > max_rejected * total:
            raise DataError(
                f"{reasons.total()} of {total} pairs rejected, more than --max-rejected "
                f"{max_rejected}: {_counts(reasons)}; the ids are in {self.output}/shard-*.json"
            )

    def _sidecar(self, index: int) -> Path:
        return (self.output / shard_name(index)).with_suffix(".json")

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = sha256_file(path)
        return self._hashes[path]


def _check_tokenizers(
    text: TextTokenizer,
    image: "ImageTokenizer",
    sequence: SequenceConfig,
    vocab: VocabConfig | None,
) -> None:
    if image.config.codes_per_side != sequence.codes_per_side[-1]:
        raise refuse(
            "sequence.codes_per_side",
            sequence.codes_per_side,
            f"the image tokenizer gives {image.config.codes_per_side} codes a side",
        )
    if vocab is None:
        return
    text.check_fits(vocab)
    if image.config.num_codes != vocab.num_image_codes:
        raise refuse(
            "model.vocab.num_image_codes",
            vocab.num_image_codes,
            f"the image tokenizer has {image.config.num_codes} codes",
        )


def _counts(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
