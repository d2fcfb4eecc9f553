"""Small, complete sets of token shards, as a tokenisation leaves them, without its cost."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cogview.data.raw import Part, Rejected
from megatron_cogview.data.shards import FORMAT_VERSION, Records, record_dtype, sample_id
from megatron_cogview.data.token_folder import TokenFolder

TEXT_BUDGET = 61
VOCAB_SIZE, NUM_CODES = 50_000, 8192
TOKENIZERS = {
    "text": {"fingerprint": "t" * 64, "vocab_size": VOCAB_SIZE},
    "image": {"fingerprint": "i" * 64, "num_codes": NUM_CODES},
}


def random_records(count: int, sides: Sequence[int] = (32,), seed: int = 0) -> Records:
    """Records of random texts and codes; their ids are those of ``SEED-0``, ``SEED-1``, ..."""
    rng = np.random.default_rng(seed)
    records: Records = np.zeros(count, dtype=record_dtype(sides))
    length = rng.integers(1, TEXT_BUDGET + 1, count)
    text = rng.integers(1, VOCAB_SIZE, records["text"].shape)
    records["text"] = np.where(np.arange(text.shape[1]) < length[:, None], text, 0)
    records["text_length"] = length
    for index, side in enumerate(sides):
        records[f"image{index}"] = rng.integers(0, NUM_CODES, (count, side, side))
    records["sample_id"] = [sample_id(f"{seed}-{n}") for n in range(count)]
    return records


def write_set(
    folder: Path, parts: Sequence[Records], tokenizers: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Shards, sidecars, split table, log and manifest; every second part has a rejected pair."""
    inputs = [Part(f"{k:05d}.tar", folder, 1000 + k) for k in range(len(parts))]
    settings = {
        "version": FORMAT_VERSION,
        "source": {"kind": "random"},
        "layout": {
            "text_ids": 64,
            "text_budget": TEXT_BUDGET,
            "text_policy": "reject",
            "codes_per_side": [
                parts[0].dtype[name].shape[0]
                for name in parts[0].dtype.names or ()
                if name.startswith("image")
            ],
        },
        "tokenizers": tokenizers or TOKENIZERS,
    }
    output = TokenFolder(folder, inputs, settings, digest=lambda part: "0" * 64)
    try:
        for index, records in enumerate(parts):
            rejected = [Rejected(f"bad-{index}", "empty caption", inputs[index].name)] * (index % 2)
            counts = {
                "truncated": 0,
                "unknown_ids": 0,
                "longest_text": int(records["text_length"].max(initial=0)),
            }
            output.commit(index, records, rejected, counts, "0" * 64)
        manifest = output.finish()
    finally:
        output.close()
    assert manifest is not None
    return manifest
