"""What the ranks of the training and generation tests run.  Results are JSON values."""

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_cogview.configs.data import DataConfig
from megatron_cogview.configs.errors import CheckpointError
from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.configs.sequence import SequenceConfig
from megatron_cogview.data.loader import TrainLoader, build_loader
from megatron_cogview.testing.toy_run import SIDE, VOCAB
from megatron_cogview.testing.toy_run import TEXT_BUDGET as BUDGET
from megatron_cogview.tokenization.layout import SequenceLayout
from tests.parallel.cases import PIVOT, run_config, small_model

STEPS = 6
LAYOUT_OF_TWO = ParallelConfig(distributed_optimizer=True)
FINGERPRINTS = {"text": "t", "image": "i"}


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


def training_config(
    folder: str, output: str, parallel: ParallelConfig, attention: AttentionConfig | None = None
) -> RunConfig:
    """Six steps with dropout on, a checkpoint after every second."""
    base = run_config("paper", parallel, 2)
    return replace(
        base,
        model=small_model(
            hidden_dropout=0.1, attention_dropout=0.1, attention=attention or AttentionConfig()
        ),
        sequence=SequenceConfig(length=25, text_budget=BUDGET, codes_per_side=(SIDE,)),
        data=DataConfig(shards=(f"{folder}/tokens",), validation_fraction=0.1),
        training=replace(
            base.training,
            output=f"{folder}/{output}",
            steps=STEPS,
            save_every=2,
            log_every=1,
            validate_every=3,
        ),
    )


def build(config: RunConfig) -> tuple[Any, Any]:
    """Engine and trainer, as ``tasks/pretrain.py`` wires them."""
    from megatron_cogview.engines.megatron import MegatronEngine
    from megatron_cogview.parallel.seeding import seed_initialization
    from megatron_cogview.parallel.topology import initialize
    from megatron_cogview.training.signals import StopRequest
    from megatron_cogview.training.trainer import Trainer

    groups = initialize(config.parallel)
    config.check_layout(groups.world_size)
    layout = SequenceLayout(config.sequence, config.model.vocab)
    loader = build_loader(layout, config.training, config.data, groups.data_rank, groups.data_size)
    seed_initialization(config.training.seed, groups)
    engine = MegatronEngine(config, groups)
    return engine, Trainer(config, groups, engine, loader, FINGERPRINTS, StopRequest())


class DyingLoader(TrainLoader):
    """Raises when the batches of one step are asked for."""

    def __init__(self, inner: TrainLoader, last: int) -> None:
        self.__dict__.update(inner.__dict__)
        self.last = last

    def micro_batches(self, step: int) -> list[Any]:
        if step == self.last:
            raise Killed
        return super().micro_batches(step)


def digest(engine: Any) -> str:
    """SHA-256 over this rank's weights, master weights and Adam moments, bit for bit."""
    h = hashlib.sha256()
    for chunk in engine.chunks:
        for parameter in chunk.parameters():
            h.update(parameter.detach().cpu().numpy().tobytes())
    for part in getattr(engine.optimizer, "chained_optimizers", [engine.optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                h.update(parameter.detach().cpu().numpy().tobytes())
                for name, value in sorted(part.optimizer.state[parameter].items()):
                    h.update(name.encode() + value.detach().cpu().numpy().tobytes())
    return h.hexdigest()


def resume(arguments: dict[str, Any]) -> dict[str, Any]:
    """Train through, and train again with a kill before step 5; compare bit for bit."""
    results = {}
    for name, settings in arguments["layouts"].items():
        parallel = ParallelConfig(**settings)
        config = training_config(arguments["folder"], f"{name}-whole", parallel)
        engine, trainer = build(config)
        trainer.run()
        whole = digest(engine)
        config = training_config(arguments["folder"], f"{name}-killed", parallel)
        engine, trainer = build(config)
        trainer.loader = DyingLoader(trainer.loader, 5)
        try:
            trainer.run()
            raise AssertionError("the kill did not happen")
        except Killed:
            pass
        engine, trainer = build(config)
        fresh = digest(engine)
        trainer.run()
        results[name] = {"whole": whole, "resumed": digest(engine), "fresh": fresh}
    return results


def damaged(arguments: dict[str, Any]) -> dict[str, Any]:
    """A damaged newest checkpoint is passed over; foreign ones are refused; none is no error."""
    from megatron_cogview.checkpoint import commit
    from megatron_cogview.checkpoint.identity import check_belongs
    from megatron_cogview.training.checkpoints import CONTINUED

    folder = arguments["folder"]
    config = training_config(folder, "tp2_sp-whole", ParallelConfig(tensor=2, sequence=True))
    root = Path(config.training.output) / "checkpoints"
    engine, trainer = build(config)
    names = sorted(p.name for p in root.glob("step_*"))
    if trainer.topology.is_main:
        victim = sorted((root / names[-1]).glob("*.distcp"))[0]
        data = bytearray(victim.read_bytes())
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    torch.distributed.barrier()
    logging.getLogger("megatron_cogview").setLevel(logging.ERROR)
    directory, manifest = commit.newest_valid(root)
    refusals = {}
    seed = replace(config, data=replace(config.data, seed=99))
    for what, changed, prints in (
        ("layers", replace(config, model=replace(config.model, num_layers=3)), FINGERPRINTS),
        ("tokenizer", config, {"text": "other", "image": "i"}),
        ("seed", seed, FINGERPRINTS),
    ):
        try:
            check_belongs(directory, manifest["state"], changed, prints, CONTINUED)
        except CheckpointError as error:
            refusals[what] = str(error)
    trainer.run()
    absent = commit.newest_valid(Path(folder) / "nowhere")
    return {
        "names": names,
        "found": directory.name,
        "refusals": refusals,
        "again": digest(engine),
        "absent": absent,
    }


def unreadable(arguments: dict[str, Any]) -> dict[str, Any]:
    """What only one rank cannot read is passed over by all; and so is what they see differently."""
    from megatron_cogview.checkpoint import commit

    folder, results = arguments["folder"], {}
    config = training_config(folder, "dp2_distributed-whole", LAYOUT_OF_TWO)
    root = Path(config.training.output) / "checkpoints"
    logging.getLogger("megatron_cogview").setLevel(logging.ERROR)
    for what in ("blob", "manifest"):
        engine, trainer = build(config)
        load, read = engine.load, commit.read_manifest

        def refuse(directory: Path, load: Any = load) -> None:
            load(directory)
            if directory.name == "step_00000006" and torch.distributed.get_rank() == 1:
                raise ValueError("other bytes")

        def stale(directory: Path, read: Any = read) -> dict[str, Any]:
            manifest: dict[str, Any] = read(directory)
            if directory.name == "step_00000006" and torch.distributed.get_rank() == 1:
                manifest["state"]["progress"]["bad_steps"] = 9
            return manifest

        if what == "blob":
            engine.load = refuse
        else:
            commit.read_manifest = stale
        try:
            start, _ = trainer.checkpoints.resume()
        finally:
            commit.read_manifest = read
        results[what] = {"start": start, "digest": digest(engine)}
    engine, trainer = build(config)
    engine.load(root / "step_00000004")
    results["expected"] = digest(engine)
    engine.load = lambda directory: 1 / 0
    try:
        trainer.checkpoints.resume()
    except CheckpointError as error:
        results["none"] = str(error)
    return results


def reshard(arguments: dict[str, Any]) -> dict[str, Any]:
    """Weights of one checkpoint loaded under several layouts, gathered; and validation losses."""
    from megatron_cogview.checkpoint import commit
    from megatron_cogview.testing import fixtures

    results = {}
    for name, settings in arguments["layouts"].items():
        config = training_config(
            arguments["folder"], f"{arguments['source']}-killed", ParallelConfig(**settings)
        )
        engine, trainer = build(config)
        directory, _ = commit.newest_valid(Path(config.training.output) / "checkpoints")
        engine.load(directory)
        whole = fixtures.weights(engine)
        h = hashlib.sha256()
        for key in sorted(whole):
            h.update(key.encode() + whole[key].numpy().tobytes())
        losses = engine.eval_step(trainer.loader.validation(0)).losses
        results[name] = {"weights": h.hexdigest(), "loss": losses.total}
    return results


def generate(arguments: dict[str, Any]) -> dict[str, Any]:
    """Codes of a few captions; on one rank also against decoding without a cache."""
    from megatron_cogview.generation.text_to_image import generate_codes
    from megatron_cogview.parallel.topology import initialize

    results: dict[str, Any] = {}
    texts = [[1, 2, 3], [4], [5, 6, 7], [8, 9], [10, 11, 12], [13]]
    groups = initialize(ParallelConfig(tensor=arguments["tensor"]))
    kinds = {"dense": AttentionConfig(), "pivot": PIVOT}
    for kind, attention in list(kinds.items()):
        kinds[f"{kind}_kernel"] = replace(attention, backend="triton")
    for kind, attention in kinds.items():
        config = training_config(
            arguments["folder"], "none", ParallelConfig(tensor=arguments["tensor"]), attention
        )
        config = replace(config, generation=replace(config.generation, batch_size=2, top_k=20))
        model = _model(config, groups)
        if kind.endswith("kernel"):  # interpreted, and slow
            with _counted_plans() as made:
                results[kind] = generate_codes(model, config, groups, texts[:2]).tolist()
            results[f"{kind}_plans"] = len(made)
            continue
        results[kind] = generate_codes(model, config, groups, texts).tolist()
        if arguments["tensor"] == 1:
            larger = replace(config, generation=replace(config.generation, batch_size=64))
            results[f"{kind}_batch_64"] = generate_codes(model, larger, groups, texts).tolist()
            results[f"{kind}_uncached"] = _without_cache(model, config, texts)
    return results


@contextlib.contextmanager
def _counted_plans() -> Iterator[list[Any]]:
    """The plans of three-region attention that are made meanwhile."""
    from megatron_cogview.model import attention

    real, made = attention.plan_of, []

    def counted(*arguments: Any, **settings: Any) -> Any:
        made.append(real(*arguments, **settings))
        return made[-1]

    attention.plan_of = counted
    try:
        yield made
    finally:
        attention.plan_of = real


def _model(config: RunConfig, groups: Any) -> torch.nn.Module:
    from megatron_cogview.model.cogview import build_model
    from megatron_cogview.parallel.seeding import seed_initialization

    seed_initialization(3, groups)
    model = build_model(config)[0].to(groups.device).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(5.0)  # far from uniform, so that a wrong cache shows
    return model


def _without_cache(
    model: torch.nn.Module, config: RunConfig, texts: list[list[int]]
) -> list[list[list[int]]]:
    """The whole prefix through the model for every id, one sample at a time."""
    from megatron_cogview.generation.sampling import draw, uniforms

    layout = SequenceLayout(config.sequence, config.model.vocab)
    settings, pictures = config.generation, []
    for number, text in enumerate(texts):
        prompt, count = layout.prompt(text)
        device = next(model.parameters()).device
        ids = torch.from_numpy(prompt)[None].to(device)
        key = torch.tensor([[number, len(prompt)]], device=device)
        for step in range(count):
            positions = torch.from_numpy(np.asarray(layout.positions(ids.cpu().numpy())))
            with torch.inference_mode():
                logits = model(ids, positions.to(device), pivot_key_B2=key)[:, -1]
            u = torch.from_numpy(uniforms(settings.seed, np.array([number]), step))
            allowed = logits[:, : VOCAB.num_image_codes]
            chosen = draw(allowed, u, settings.temperature, settings.top_k)
            ids = torch.cat([ids, chosen[:, None]], 1)
        pictures.append(ids[0, len(prompt) :].view(SIDE, SIDE).tolist())
    return pictures


def settings(arguments: dict[str, Any]) -> dict[str, Any]:
    """Changed optimizer settings take effect in a resumed run."""
    config = training_config(arguments["folder"], "settings", ParallelConfig(tensor=2))
    # What is written in the background may not be there yet when the run dies.
    config = replace(config, training=replace(config.training, async_save=False))
    _, trainer = build(config)
    trainer.loader = DyingLoader(trainer.loader, 3)
    with contextlib.suppress(Killed):
        trainer.run()
    optimizer = replace(config.optimizer, weight_decay=0.5, beta2=0.9, epsilon=1e-3)
    engine, trainer = build(replace(config, optimizer=optimizer))
    start, _ = trainer.checkpoints.resume()
    groups = [[g["weight_decay"], g["betas"][1], g["eps"]] for g in engine.optimizer.param_groups]
    return {"start": start, "groups": groups}
