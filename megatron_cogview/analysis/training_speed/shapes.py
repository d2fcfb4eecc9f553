"""What is measured: shapes of presets, brought to one process, with random token shards.

Times do not depend on what the tokens are, so no data is needed.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_cogview.configs.budget import USABLE_FRACTION, rank_budget
from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import base_4b, preset
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.shards import (
    record_dtype,
    sample_id,
    shard_name,
    write_manifest,
    write_shard,
)

MICRO, TOY = "micro", "toy"
"""Names of ``base_4b`` with its widths cut down: to rehearse on a CPU what a GPU would do, and the
paper's sequence at a width that two cores can train."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One shape."""

    name: str
    """As it was asked for."""
    config: RunConfig
    note: str = ""
    """What had to be changed for it to fit."""


def named(name: str) -> RunConfig:
    """The run called ``PRESET`` or, with fewer layers, ``PRESET:LAYERS``.

    Raises:
        ConfigError: no such preset, or not a number of layers.
    """
    base, colon, layers = name.partition(":")
    config = _cut_down(base) if base in (MICRO, TOY) else preset(base)
    if not colon:
        return config
    if not (layers.isdecimal() and int(layers) > 0):
        raise refuse("shapes", name, "must be PRESET or PRESET:LAYERS")
    return replace(config, model=replace(config.model, num_layers=int(layers)))


def _cut_down(name: str) -> RunConfig:
    base = base_4b()
    if name == TOY:
        hidden, heads, codes, pieces, side = 256, 4, 1024, 997, base.sequence.codes_per_side[0]
    else:
        hidden, heads, codes, pieces, side = 64, 2, 64, 64, 4
    # CPUs have no fused attention with dropout.
    dropout = 0.0 if name == TOY else base.model.hidden_dropout
    run = replace(
        base,
        preset=name,
        model=replace(
            base.model,
            num_layers=4,
            hidden_size=hidden,
            num_heads=heads,
            vocab=VocabConfig(num_image_codes=codes, num_text_ids=pieces),
            hidden_dropout=dropout,
            attention_dropout=dropout,
        ),
        image_tokenizer=replace(base.image_tokenizer, num_codes=codes),
        training=replace(base.training, micro_batch_size=2),
    )
    return with_grid(run, side)


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


def case(
    name: str,
    shards: str,
    dtype: str,
    micro_batch_size: int,
    micro_batches: int,
    gpu_bytes: int | None,
) -> Case:
    """The run of ``name`` on one process.

    Args:
        name: for :func:`named`.
        shards: folder of token shards.
        dtype: number format.
        micro_batch_size: sequences of a forward pass; 0 takes the preset's.
        micro_batches: of a step.
        gpu_bytes: memory of the device, for which the micro-batch is halved until it fits; None
            takes it as it is.

    Raises:
        ConfigError: not even one sequence fits.
    """
    base = named(name)
    wanted = micro_batch_size or base.training.micro_batch_size
    try:
        config = fitted(base, shards, dtype, wanted, micro_batches, gpu_bytes)
    except ConfigError as error:
        short = name.partition(":")[0]
        raise ConfigError(f"{name} {error}; name fewer layers, for example {short}:4") from None
    size = config.training.micro_batch_size
    note = f"micro-batch {size} instead of {wanted}" if size != wanted else ""
    return Case(name=name, config=config, note=note)


def fitted(
    base: RunConfig,
    shards: str,
    dtype: str,
    micro_batch_size: int,
    micro_batches: int,
    gpu_bytes: int | None,
) -> RunConfig:
    """``base`` on one process, its micro-batch halved until it fits; see :func:`case`.

    Raises:
        ConfigError: not even one sequence fits.
    """
    size = micro_batch_size
    while True:
        config = replace(
            base,
            parallel=ParallelConfig(),
            precision=PrecisionConfig(dtype=dtype),  # type: ignore[arg-type]
            data=replace(base.data, shards=(shards,), weights=(), validation_fraction=0.0),
            training=replace(
                base.training, micro_batch_size=size, global_batch_size=size * micro_batches
            ),
        )
        needed = rank_budget(config, 1).total_bytes
        if gpu_bytes is None or needed <= USABLE_FRACTION * gpu_bytes:
            return config
        if size == 1:
            raise ConfigError(
                f"does not fit: {needed / 2**30:.1f} GiB counted for one sequence, and "
                f"{USABLE_FRACTION:.0%} of {gpu_bytes / 2**30:.1f} GiB may be filled"
            )
        size //= 2


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
