"""What the ranks of the multi-process tests run.  Results are JSON values; rank 0's are judged."""

from dataclasses import replace
from typing import Any

import torch

from megatron_cogview.configs.model import AttentionConfig, ModelConfig, NormConfig
from megatron_cogview.configs.optimizer import OptimizerConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.presets import tiny
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.training import TrainingConfig
from megatron_cogview.configs.vocab import VocabConfig
from megatron_cogview.data.batch import Batch

LENGTH, GLOBAL_BATCH, STEPS, LR = 24, 8, 5, 1e-3
TEXT_WEIGHT, IMAGE_WEIGHT = 0.7, 1.3
VOCAB = VocabConfig(num_image_codes=60, num_text_ids=37)


def small_model(**changes: Any) -> ModelConfig:
    """Four layers, odd enough that a wrong axis shows."""
    values: dict[str, Any] = {
        "num_layers": 4,
        "hidden_size": 40,
        "num_heads": 4,
        "max_positions": LENGTH,
        "vocab": VOCAB,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    return ModelConfig(**(values | changes))


PIVOT = AttentionConfig(kind="pivot", window_block=4, window_blocks=2, num_pivots=9)
MODELS = {
    "paper": small_model(),
    "eq4": small_model(attention=AttentionConfig(backend="reference")),
    "pivot": small_model(attention=PIVOT),
    "released_norm": small_model(
        norm=NormConfig(relax_rule="tensor_max_over_8", relax_scope="all")
    ),
    "pre": small_model(norm=NormConfig(placement="pre", relax_scope="all")),
    "deep": small_model(num_layers=8),
}


def run_config(
    model: str,
    parallel: ParallelConfig,
    micro_batch: int,
    global_batch: int = GLOBAL_BATCH,
    **changes: Any,
) -> RunConfig:
    """A run of a small model in fp32; ``changes`` replace whole parts of it."""
    base = tiny()
    values: dict[str, Any] = {
        "model": MODELS[model],
        "sequence": replace(base.sequence, length=LENGTH + 1, codes_per_side=(3,), text_budget=9),
        "image_tokenizer": replace(
            base.image_tokenizer, image_size=24, num_codes=VOCAB.num_image_codes
        ),
        "parallel": parallel,
        "precision": PrecisionConfig(dtype="fp32"),
        "optimizer": OptimizerConfig(clip_grad=0.0),
        "training": TrainingConfig(
            global_batch_size=global_batch,
            micro_batch_size=micro_batch,
            text_weight=TEXT_WEIGHT,
            image_weight=IMAGE_WEIGHT,
        ),
    }
    return replace(base, **(values | changes))


def global_batch(step: int, size: int = GLOBAL_BATCH) -> Batch:
    """Random text, then image codes, then padding of different lengths; positions restart."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB.num_image_codes, (size, LENGTH + 1), generator=g)
    text = torch.randint(3, 10, (size, 1), generator=g)
    padding = torch.randint(0, 7, (size, 1), generator=g)
    place = torch.arange(LENGTH + 1)[None]
    words = torch.randint(0, VOCAB.num_text_ids, ids.shape, generator=g) + VOCAB.first_text_id
    ids = torch.where(place < text, words, ids)
    ids = torch.where(place > LENGTH - padding, VOCAB.command_id("[PAD]"), ids)
    labels = ids[:, 1:].contiguous()
    weights = torch.where(labels < VOCAB.num_image_codes, IMAGE_WEIGHT, TEXT_WEIGHT)
    weights = torch.where(labels == VOCAB.command_id("[PAD]"), 0.0, weights)
    restarted = torch.cat([torch.arange(LENGTH - 7), torch.arange(7)])
    return Batch(
        tokens_BS=ids[:, :-1].contiguous(),
        labels_BS=labels,
        positions_BS=restarted.expand(size, LENGTH).contiguous(),
        loss_weights_BS=weights.float(),
        pivot_key_B2=torch.stack([torch.arange(size) + size * step, text[:, 0]], 1),
    )


def micro_batches(step: int, config: RunConfig, data_rank: int, data_size: int) -> list[Batch]:
    """This rank's part of :func:`global_batch`."""
    total, size = config.training.global_batch_size, config.training.micro_batch_size
    whole = global_batch(step, total)
    per_rank = total // data_size

    def part(start: int) -> Batch:
        rows = slice(start, start + size)
        return Batch(*(getattr(whole, name)[rows] for name in Batch.__slots__))

    first = data_rank * per_rank
    return [part(first + i) for i in range(0, per_rank, size)]
