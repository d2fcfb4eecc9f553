"""Random token shards and small runs: the checks bring their own data."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.shards import (
    record_dtype,
    sample_id,
    shard_name,
    write_manifest,
    write_shard,
)


def write_random_shards(folder: Path, config: RunConfig, num_records: int, seed: int = 0) -> None:
    """One shard of random records that fit ``config``; every text fills its budget."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    sequence, vocab = config.sequence, config.model.vocab
    records = np.zeros(num_records, dtype=record_dtype(sequence.codes_per_side))
    for i, side in enumerate(sequence.codes_per_side):
        shape = (num_records, side, side)
        records[f"image{i}"] = rng.integers(0, vocab.num_image_codes, shape)
    records["text_length"] = sequence.text_budget
    text_shape = (num_records, sequence.text_budget)
    records["text"][:, : sequence.text_budget] = rng.integers(0, vocab.num_text_ids, text_shape)
    records["sample_id"] = [sample_id(str(n)) for n in range(num_records)]
    entry = write_shard(folder / shard_name(0), records)
    layout = {
        "codes_per_side": list(sequence.codes_per_side),
        "longest_text": sequence.text_budget,
    }
    tokenizers = {
        "text": {"fingerprint": "random", "vocab_size": vocab.num_text_ids},
        "image": {"fingerprint": "random", "num_codes": vocab.num_image_codes},
    }
    write_manifest(folder, [entry], {"layout": layout, "tokenizers": tokenizers})


def with_grid(config: RunConfig, side: int) -> RunConfig:
    """``config`` for pictures of ``side`` x ``side`` codes; the sequence shrinks with them."""
    old = config.sequence.codes_per_side[-1]
    if side > old:
        raise ValueError(f"side {side} is larger than the model's {old}")
    saved = old * old - side * side
    tokenizer = config.image_tokenizer
    return replace(
        config,
        sequence=replace(
            config.sequence, codes_per_side=(side,), length=config.sequence.length - saved
        ),
        image_tokenizer=replace(tokenizer, image_size=side << tokenizer.downsampling_layers),
    )


def micro_run() -> RunConfig:
    """A run for a rehearsal on a CPU: two layers, 4 x 4 codes."""
    base = tiny()
    model = replace(
        base.model,
        num_layers=2,
        hidden_size=32,
        num_heads=2,
        vocab=VocabConfig(num_image_codes=64, num_text_ids=64),
    )
    run = replace(
        base,
        preset="micro",
        model=model,
        image_tokenizer=replace(base.image_tokenizer, num_codes=64),
        parallel=replace(base.parallel, tensor=1),
    )
    return with_grid(run, 4)
