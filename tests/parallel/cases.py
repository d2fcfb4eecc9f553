"""What the ranks of the multi-process tests run.  Results are JSON values; rank 0's are judged."""

from dataclasses import replace
from pathlib import Path
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
}


def run_config(model: str, parallel: ParallelConfig, micro_batch: int, **changes: Any) -> RunConfig:
    """A run of the small model."""
    base = tiny()
    return replace(
        base,
        model=MODELS[model],
        sequence=replace(base.sequence, length=LENGTH + 1, codes_per_side=(3,), text_budget=9),
        image_tokenizer=replace(
            base.image_tokenizer, image_size=24, num_codes=VOCAB.num_image_codes
        ),
        parallel=parallel,
        precision=PrecisionConfig(dtype="fp32"),
        optimizer=OptimizerConfig(clip_grad=0.0),
        training=TrainingConfig(
            global_batch_size=GLOBAL_BATCH,
            micro_batch_size=micro_batch,
            text_weight=TEXT_WEIGHT,
            image_weight=IMAGE_WEIGHT,
        ),
        **changes,
    )


def global_batch(step: int) -> Batch:
    """Random text, then image codes, then padding of different lengths; positions restart."""
    g = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(0, VOCAB.num_image_codes, (GLOBAL_BATCH, LENGTH + 1), generator=g)
    text = torch.randint(3, 10, (GLOBAL_BATCH, 1), generator=g)
    padding = torch.randint(0, 7, (GLOBAL_BATCH, 1), generator=g)
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
        positions_BS=restarted.expand(GLOBAL_BATCH, LENGTH).contiguous(),
        loss_weights_BS=weights.float(),
        pivot_key_B2=torch.stack([torch.arange(GLOBAL_BATCH) + 8 * step, text[:, 0]], 1),
    )


def micro_batches(step: int, config: RunConfig, data_rank: int, data_size: int) -> list[Batch]:
    """This rank's part of :func:`global_batch`."""
    whole = global_batch(step)
    per_rank, size = GLOBAL_BATCH // data_size, config.training.micro_batch_size

    def part(start: int) -> Batch:
        rows = slice(start, start + size)
        return Batch(*(getattr(whole, name)[rows] for name in Batch.__slots__))

    first = data_rank * per_rank
    return [part(first + i) for i in range(0, per_rank, size)]


def parity(arguments: dict[str, Any]) -> dict[str, Any]:
    """Losses, gradients of the first step and weights after five, for a list of layouts.

    The whole tensors go to ``arguments["folder"]``; one launch serves all layouts of one size.
    """
    from safetensors.torch import load_file, save_file

    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.testing import fixtures

    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        parallel = ParallelConfig(**layout["parallel"])
        topology = initialize(parallel)
        config = run_config(layout["model"], parallel, layout["micro_batch"])
        config.check_layout(topology.world_size)
        seed_initialization(1, topology)
        engine = MegatronEngine(config, topology)
        fixtures.load_weights(
            engine, load_file(Path(arguments["folder"]) / f"{layout['model']}.safetensors")
        )
        steps = []
        for step in range(STEPS):
            batches = micro_batches(step, config, topology.data_rank, topology.data_size)
            result = engine.train_step(batches, LR)
            losses = result.losses
            steps.append([losses.total, losses.text, losses.image, result.grad_norm])
            # The distributed optimizer leaves each rank with its own part of the gradients.
            if step == 0 and not parallel.distributed_optimizer:
                gradients = fixtures.gradients(engine)
        weights = fixtures.weights(engine)
        batches = micro_batches(STEPS, config, topology.data_rank, topology.data_size)
        steps.append([engine.eval_step(batches).losses.total])
        results[name] = steps
        if topology.rank == 0:
            if not parallel.distributed_optimizer:
                save_file(gradients, Path(arguments["folder"]) / f"{name}.gradients.safetensors")
            save_file(weights, Path(arguments["folder"]) / f"{name}.weights.safetensors")
    return results
