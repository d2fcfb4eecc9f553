"""From nothing to the first shuffled batch: our shards, and megatron-core's GPT data set.

The files are sparse: their sizes are real, their contents zeros, so checksums stay off.  Each
measurement runs in a process of its own, after the imports; memory is the growth of its resident
set at its highest.  megatron-core is measured at 1, 2 and 3 million records, on the same number of
tokens, and continued to 30 million by a straight line.
"""

import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_cogview.configs.data import SPLIT_STEPS
from megatron_cogview.data.shards import npy_header, record_dtype, shard_name, write_manifest
from megatron_cogview.data.split import threshold

if TYPE_CHECKING:
    from collections.abc import Callable

CODES_PER_SIDE = (32,)
TOKENS_PER_RECORD = 64 + 1024
PEER_SIZES = (1_000_000, 2_000_000, 3_000_000)

_MEASURE = """
import json, sys, time
from pathlib import Path
status = lambda name: int(open("/proc/self/status").read().split(name + ":")[1].split()[0]) * 1024
{imports}
open("/proc/self/clear_refs", "w").write("5")
before, begin = status("VmRSS"), time.perf_counter()
{body}
seconds = time.perf_counter() - begin
print(json.dumps({{"seconds": seconds, "bytes": status("VmHWM") - before}}))
"""

_OURS = (
    """
from megatron_cogview.configs.data import DataConfig
from megatron_cogview.data.sampler import Sampler, rank_samples
from megatron_cogview.data.shard_set import ShardSet
import numpy as np
""",
    """
shards = ShardSet(Path(sys.argv[1]), verify_crc=False)
sampler = Sampler([shards.split(0.01)], seed=1)
shards.read(sampler.records(rank_samples(int(sys.argv[2]), 64, 0, 1)))
""",
)

_PEER = (
    """
import logging, types
import numpy
logging.disable(logging.WARNING)
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split
from megatron.core.datasets import helpers
tokenizer = types.SimpleNamespace(
    eod=0, pad=1, vocab_size=60_000, unique_identifiers={"name": "none"})
""",
    """
indexed = IndexedDataset(sys.argv[1])
count = int(sys.argv[2])
config = GPTDatasetConfig(
    random_seed=1, sequence_length=1088, split="1,0,0", path_to_cache=sys.argv[3],
    tokenizer=tokenizer, reset_position_ids=False, reset_attention_mask=False,
    eod_mask_loss=False, create_attention_mask=False)
data = GPTDataset(indexed, sys.argv[1], numpy.arange(count, dtype=numpy.int32), count,
                  Split.train, config)
batch = [data[i] for i in range(64)]
""",
)


def ours(num_records: int, num_shards: int, sample: int = 0) -> dict[str, Any]:
    """Open, shuffle and read 64 records from sample number ``sample`` on."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as name:
        folder = Path(name)
        write_sparse_set(folder, num_records, num_shards)
        result = _measure(_OURS, str(folder), str(sample))
    return {"records": num_records, "shards": num_shards, "first_sample": sample, **result}


def peer(num_records: int) -> dict[str, Any]:
    """megatron-core's IndexedDataset and the first build of its GPTDataset's index."""
    with tempfile.TemporaryDirectory() as name:
        prefix = str(Path(name) / "tokens")
        write_sparse_indexed(prefix, num_records)
        result = _measure(_PEER, prefix, str(num_records), str(Path(name) / "cache"))
    return {"records": num_records, **result}


def comparison(repeats: int) -> dict[str, Any]:
    """Both at their sizes, round after round; medians of time, and the most memory of ours.

    ``times_as_fast`` and ``times_as_lean`` compare at 30 million records.
    """
    measures: dict[str, Callable[[], dict[str, Any]]] = {
        "ours_30m": lambda: ours(30_000_000, 3_000),
        "ours_1b": lambda: ours(1_000_000_000, 1_000),
        "ours_resumed": lambda: ours(1_000_000_000, 1_000, sample=900_000_000),
        **{f"peer_{size}": functools.partial(peer, size) for size in PEER_SIZES},
    }
    rounds = [{name: run() for name, run in measures.items()} for _ in range(repeats)]
    results: dict[str, Any] = {}
    for name in measures:
        runs = [each[name] for each in rounds]
        # Against ourselves: the largest of our memory, the smallest of the peer's.
        extreme = min if name.startswith("peer") else max
        results[name] = {
            **runs[0],
            "seconds": statistics.median(run["seconds"] for run in runs),
            "bytes": extreme(run["bytes"] for run in runs),
        }
    peers = [results.pop(f"peer_{size}") for size in PEER_SIZES]
    at_30m = {
        name: float(np.polyval(np.polyfit(PEER_SIZES, [p[name] for p in peers], 1), 30_000_000))
        for name in ("seconds", "bytes")
    }
    return {
        **results,
        "megatron_core": peers,
        "megatron_core_30m_by_line": at_30m,
        "times_as_fast": at_30m["seconds"] / results["ours_30m"]["seconds"],
        "times_as_lean": at_30m["bytes"] / max(1, results["ours_30m"]["bytes"]),
    }


def write_sparse_set(folder: Path, num_records: int, num_shards: int) -> None:
    """A token set of the right sizes whose records are holes, with ids spread evenly."""
    dtype, count = record_dtype(CODES_PER_SIDE), num_records // num_shards
    header = npy_header(dtype, count)
    size = len(header) + count * dtype.itemsize
    # As many of evenly spread ids lie below each threshold.
    split = [-(-threshold(step) * count >> 64) for step in SPLIT_STEPS]
    entries = []
    for number in range(num_shards):
        with open(folder / shard_name(number), "wb") as file:
            file.write(header)
            file.truncate(size)
        entries.append(
            {
                "name": shard_name(number),
                "records": count,
                "bytes": size,
                "sha256": f"{number:064x}",
                "split": split,
                "source": f"{number:05d}.tar",
                "source_bytes": size,
                "source_sha256": f"{number:064x}",
            }
        )
    about = {
        "layout": {"codes_per_side": list(CODES_PER_SIDE), "longest_text": 64},
        "tokenizers": {
            "text": {"fingerprint": "none", "vocab_size": 50_000},
            "image": {"fingerprint": "none", "num_codes": 8192},
        },
    }
    write_manifest(folder, entries, about)


def write_sparse_indexed(prefix: str, num_records: int) -> None:
    """megatron-core's files for as many documents of 1,088 16-bit tokens, by its own writer."""
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    with open(f"{prefix}.bin", "wb") as file:
        file.truncate(num_records * TOKENS_PER_RECORD * 2)
    with _IndexWriter(f"{prefix}.idx", np.uint16) as writer:
        writer.write([TOKENS_PER_RECORD] * num_records, None, range(num_records + 1))


def _measure(code: tuple[str, str], *arguments: str) -> dict[str, Any]:
    imports, body = code
    program = _MEASURE.format(imports=imports, body=body)
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=1800,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        raise RuntimeError(f"a measurement failed:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result
