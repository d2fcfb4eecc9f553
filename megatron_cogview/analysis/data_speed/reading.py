"""Random batched reads of warm records: our shards, megatron-core's IndexedDataset, WebDataset.

All hold the same tokens.  A batch is 64 records: ours and IndexedDataset read random ones;
WebDataset, which has no random access, reads its tar from the start through a shuffle buffer.
"""

import io
import logging
import tarfile
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_cogview.analysis.data_speed.preparing import alternately, drain
from megatron_cogview.data.shard_set import ShardSet
from megatron_cogview.data.shards import (
    Records,
    record_dtype,
    sample_id,
    shard_name,
    write_manifest,
    write_shard,
)

if TYPE_CHECKING:
    from collections.abc import Callable

BATCH = 64
SIDE = 32


def comparison(
    num_records: int, num_shards: int, repeats: int, web_records: int = 20_000
) -> dict[str, Any]:
    """Records a second of each reader, on one thread."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_random_set(folder, num_records, num_shards)
        checked, unchecked = ShardSet(folder), ShardSet(folder, verify_crc=False)
        batches = np.random.default_rng(1).integers(0, num_records, (num_records // BATCH, BATCH))
        everything = unchecked.read(np.arange(num_records))  # Also warms the page cache.
        _write_indexed(str(folder / "tokens"), everything)
        indexed = _indexed(str(folder / "tokens"))
        _write_web(folder / "tokens.tar", everything[:web_records])
        ways: dict[str, Callable[[], object]] = {
            "ours": lambda: drain(map(unchecked.read, batches)),
            "ours_with_crc": lambda: drain(map(checked.read, batches)),
            "megatron_core": lambda: drain(_stacked(indexed, b) for b in batches.tolist()),
        }
        seconds = alternately(ways, repeats)
        web = min(_web_seconds(folder / "tokens.tar", web_records) for _ in range(repeats))
        _check_same_tokens(unchecked, indexed, batches[0])
    rates = {way: batches.size / value for way, value in seconds.items()}
    return {
        "records": num_records,
        "shards": num_shards,
        "record_bytes": record_dtype((SIDE,)).itemsize,
        **{f"{way}_per_second": rate for way, rate in rates.items()},
        "webdataset_per_second": web_records / web,
        "times_megatron_core": rates["ours"] / rates["megatron_core"],
        "times_webdataset": rates["ours"] / (web_records / web),
    }


def write_random_set(folder: Path, num_records: int, num_shards: int) -> None:
    """Shards of random ids: 64 text ids and 32 x 32 codes a record."""
    rng = np.random.default_rng(0)
    entries = []
    for number in range(num_shards):
        count = num_records // num_shards
        records = np.zeros(count, dtype=record_dtype((SIDE,)))
        records["text"] = rng.integers(0, 50_000, records["text"].shape)
        records["text_length"] = records["text"].shape[1]
        records["image0"] = rng.integers(0, 8192, records["image0"].shape)
        records["sample_id"] = [sample_id(f"{number}:{k}") for k in range(count)]
        entries.append(write_shard(folder / shard_name(number), records))
    about = {
        "layout": {"codes_per_side": [SIDE], "longest_text": 64},
        "tokenizers": {
            "text": {"fingerprint": "random", "vocab_size": 50_000},
            "image": {"fingerprint": "random", "num_codes": 8192},
        },
    }
    write_manifest(folder, entries, about)


def _tokens(records: Records) -> NDArray[np.uint16]:
    """``[n, 1088]``."""
    codes = records["image0"].reshape(len(records), -1)
    return np.concatenate([records["text"], codes], axis=1)


def _write_indexed(prefix: str, records: Records) -> None:
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    tokens = _tokens(records)
    tokens.tofile(f"{prefix}.bin")
    with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write([tokens.shape[1]] * len(tokens), None, range(len(tokens) + 1))


def _indexed(prefix: str) -> Any:
    logging.getLogger("megatron.core").setLevel(logging.WARNING)
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    return IndexedDataset(prefix)


def _stacked(indexed: Any, batch: list[int]) -> NDArray[np.uint16]:
    """What a collate function does with single documents."""
    return np.stack([indexed.get(number) for number in batch])


def _check_same_tokens(ours: ShardSet, indexed: Any, batch: NDArray[np.int64]) -> None:
    if not (_tokens(ours.read(batch)) == _stacked(indexed, batch.tolist())).all():
        raise RuntimeError("the readers of this comparison do not hold the same tokens")


def _write_web(path: Path, records: Records) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(_tokens(records)):
            data = row.tobytes()
            member = tarfile.TarInfo(f"{number:08d}.bin")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def _web_seconds(path: Path, count: int) -> float:
    import webdataset

    data = (
        webdataset.WebDataset(str(path), shardshuffle=False)
        .shuffle(1000)
        .map(lambda sample: np.frombuffer(sample["bin"], dtype=np.uint16))
        .batched(BATCH, collation_fn=np.stack)
    )
    begin = time.perf_counter()
    read = sum(len(batch) for batch in data)
    if read != count:
        raise RuntimeError(f"WebDataset gave {read} of {count} records")
    return time.perf_counter() - begin
