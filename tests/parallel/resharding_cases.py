"""What the ranks of the resharding tests run: train and save, or load what others saved."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.testing.toy_run import SIDE, TEXT_BUDGET
from megatron_cogview.tokenization.layout import SequenceLayout
from tests.parallel.cases import LENGTH, LR, run_config
from tests.parallel.parity_layouts import GLOBAL_BATCH

STEPS = 2


def _engine(arguments: dict[str, Any], layout: dict[str, Any], seed: int) -> tuple[Any, Any]:
    from megatron_cogview.data.loader import build_loader
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.parallel.topology import initialize

    parallel = ParallelConfig(**layout["parallel"])
    groups = initialize(parallel)
    config = run_config("paper", parallel, layout["micro_batch"], GLOBAL_BATCH)
    config = replace(
        config,
        precision=PrecisionConfig(dtype=arguments["dtype"], initial_loss_scale=64.0),
        data=DataConfig(shards=(f"{arguments['folder']}/tokens",), validation_fraction=0.1),
        sequence=SequenceConfig(length=LENGTH + 1, text_budget=TEXT_BUDGET, codes_per_side=(SIDE,)),
    )
    config.check_layout(groups.world_size)
    seed_initialization(seed, groups)
    sequence = SequenceLayout(config.sequence, config.model.vocab)
    loader = build_loader(
        sequence, config.training, config.data, groups.data_rank, groups.data_size
    )
    return MegatronEngine(config, groups), loader


def _digests(engine: Any) -> dict[str, str]:
    """SHA-256 of gathered weights and Adam moments, and of what is not a tensor."""
    from megatron_cogview.testing import fixtures

    found = {
        "weights": fixtures.weights(engine),
        "master weights": fixtures.master_weights(engine),
        "exp_avg": fixtures.moments(engine, "exp_avg"),
        "exp_avg_sq": fixtures.moments(engine, "exp_avg_sq"),
    }
    digests = {}
    for name, tensors in found.items():
        whole = hashlib.sha256()
        for key in sorted(tensors):
            whole.update(key.encode() + tensors[key].numpy().tobytes())
        digests[name] = whole.hexdigest()
    return {**digests, "common": str(sorted(engine.sharded_state().common.items()))}


def _poison(engine: Any) -> None:
    """Nothing of what the engine holds may pass for something that was loaded."""
    with torch.no_grad():
        for chunk in engine.chunks:
            for parameter in chunk.parameters():
                parameter.fill_(torch.nan)
        for piece in engine.sharded_state().pieces:
            piece.data.fill_(torch.nan)
    for part in engine.optimizer.chained_optimizers:
        for state in part.optimizer.state.values():
            state["step"].fill_(-1.0)
        scaler = getattr(part, "grad_scaler", None)
        if scaler is not None:
            about = scaler.state_dict()
            scaler.load_state_dict({**about, "scale": torch.full_like(about["scale"], 3.0)})


def _order(engine: Any, loader: Any) -> str:
    """SHA-256 of the tokens of the next steps, in the order of the whole batch."""
    t = engine.topology
    rows = [
        torch.cat([batch.tokens_BS for batch in loader.micro_batches(step)])
        for step in range(STEPS, STEPS + 4)
    ]
    mine = torch.stack(rows)
    parts = [torch.empty_like(mine) for _ in range(t.data_size)]
    dist.all_gather(parts, mine, group=t.data_group)
    return hashlib.sha256(torch.cat(parts, 1).numpy().tobytes()).hexdigest()


def save(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train two steps under each layout and save; digests by layout."""
    from megatron_cogview.checkpoint.saver import Saver

    results = {}
    for name, layout in arguments["layouts"].items():
        engine, loader = _engine(arguments, layout, seed=3)
        for step in range(STEPS):
            assert engine.train_step(loader.micro_batches(step), LR).updated
        root = Path(arguments["folder"]) / "saved" / name
        saver = Saver(root, engine.topology, keep=2)
        saver.begin(STEPS, {}, engine.sharded_state())
        assert saver.wait() is not None
        results[name] = {**_digests(engine), "order": _order(engine, loader)}
    return results


def load(arguments: dict[str, Any]) -> dict[str, Any]:
    """Load every saved checkpoint under each layout; digests by layout and source."""
    from megatron_cogview.checkpoint import commit

    results: dict[str, Any] = {}
    for name, layout in arguments["layouts"].items():
        engine, loader = _engine(arguments, layout, seed=4)
        order = _order(engine, loader)
        results[name] = {}
        for source in arguments["sources"]:
            root = Path(arguments["folder"]) / "saved" / source
            _poison(engine)
            engine.load(root / commit.checkpoint_name(STEPS))
            results[name][source] = {**_digests(engine), "order": order}
    return results
