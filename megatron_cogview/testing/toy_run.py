"""A pretraining run that takes seconds: random shards, a small model with dropout, many steps."""

import dataclasses
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.model import AttentionConfig, ModelConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.configs.survival import SurvivalConfig
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.shards import (
    record_dtype,
    sample_id,
    shard_name,
    write_manifest,
    write_shard,
)

SIDE, TEXT_BUDGET = 3, 9
LENGTH = 25
"""Ids of a sequence, of which the model sees one less."""
NUM_RECORDS, GLOBAL_BATCH = 44, 8
"""Epochs end inside batches."""
VOCAB = VocabConfig(num_image_codes=60, num_text_ids=37)


def write_tokens(folder: Path, records_wanted: int = NUM_RECORDS, seed: int = 5) -> None:
    """Shards of random records."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    records = np.zeros(records_wanted, dtype=record_dtype((SIDE,)))
    records["image0"] = rng.integers(0, VOCAB.num_image_codes, (records_wanted, SIDE, SIDE))
    records["text_length"] = rng.integers(1, TEXT_BUDGET + 1, records_wanted)
    for record in records:
        length = int(record["text_length"])
        record["text"][:length] = rng.integers(0, VOCAB.num_text_ids, length)
    records["sample_id"] = [sample_id(str(n)) for n in range(records_wanted)]
    entry = write_shard(folder / shard_name(0), records)
    about = {
        "layout": {"codes_per_side": [SIDE], "longest_text": TEXT_BUDGET},
        "tokenizers": {
            "text": {"fingerprint": "t", "vocab_size": VOCAB.num_text_ids},
            "image": {"fingerprint": "i", "num_codes": VOCAB.num_image_codes},
        },
    }
    write_manifest(folder, [entry], about)


def toy_config(
    tokens: Path, output: Path, parallel: ParallelConfig | None = None, **training: Any
) -> RunConfig:
    """A run on the shards of :func:`write_tokens`; ``training`` overrides its loop's settings."""
    base = tiny()
    loop: dict[str, Any] = {
        "output": str(output),
        "steps": 60,
        "global_batch_size": GLOBAL_BATCH,
        "micro_batch_size": 2,
        "text_weight": 0.7,
        "image_weight": 1.3,
        "save_every": 5,
        "log_every": 1,
        "validate_every": 10,
    }
    return replace(
        base,
        model=ModelConfig(
            num_layers=2,
            hidden_size=32,
            num_heads=4,
            max_positions=LENGTH - 1,
            vocab=VOCAB,
            attention=AttentionConfig(),
        ),
        sequence=SequenceConfig(length=LENGTH, text_budget=TEXT_BUDGET, codes_per_side=(SIDE,)),
        image_tokenizer=replace(
            base.image_tokenizer, image_size=24, num_codes=VOCAB.num_image_codes
        ),
        parallel=parallel or ParallelConfig(),
        precision=PrecisionConfig(dtype="fp32"),
        optimizer=OptimizerConfig(lr=1e-3),
        data=DataConfig(shards=(str(tokens),), validation_fraction=0.3),
        training=TrainingConfig(**(loop | training)),
        survival=SurvivalConfig(hang_timeout_seconds=0.0),
    )


def with_survival(config: RunConfig, **survival: Any) -> RunConfig:
    """The same run with other bounds."""
    return replace(config, survival=dataclasses.replace(config.survival, **survival))
