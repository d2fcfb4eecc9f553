"""NaN and infinity on one rank: every rank must leave the step out, as if it had been told to.

A trial puts one bad number into one activation, loss or gradient of one rank in one step of a short
training, and compares weights, master weights and Adam moments of every rank, bit for bit, with a
training that left the same step out.
"""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.precision import PrecisionConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import build_loader
from megatron_cogview.parallel.seeding import seed_initialization, seed_step
from megatron_cogview.parallel.topology import initialize
from megatron_cogview.testing.toy_run import toy_config, write_tokens
from megatron_cogview.testing.train_faults.world import World
from megatron_cogview.tokenization.layout import SequenceLayout

STEPS, LR, SCALE = 4, 1e-3, 256.0
TRIALS_PER_LAUNCH = 25
NUMBERS = (math.nan, math.inf, -math.inf)
PLACES = ("activation", "loss", "gradient", "reduced gradient")
LAYOUTS: tuple[tuple[dict[str, Any], str], ...] = (
    ({}, "fp32"),
    ({"tensor": 2, "sequence": True}, "fp32"),
    ({"pipeline": 2}, "fp32"),
    ({"distributed_optimizer": True}, "fp32"),
    ({}, "bf16"),
    ({"distributed_optimizer": True}, "fp16"),
    ({"tensor": 2}, "fp16"),
    ({"pipeline": 2}, "bf16"),
)
"""Ways to use two ranks; a launch takes one of them."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong, where and when."""

    place: str
    rank: int
    step: int
    micro_batch: int
    number: float
    seed: int
    """Draws the layer, the parameter and the element."""

    @classmethod
    def draw(cls, number: int, micro_batches: int) -> "Fault":
        """The fault of trial ``number``."""
        rng = np.random.default_rng([number, 17])
        return cls(
            place=PLACES[int(rng.integers(len(PLACES)))],
            rank=int(rng.integers(2)),
            step=int(rng.integers(STEPS)),
            micro_batch=int(rng.integers(micro_batches)),
            number=NUMBERS[int(rng.integers(len(NUMBERS)))],
            seed=int(rng.integers(2**31)),
        )


class BadNumbers:
    """The campaign; its trials run 25 to a launch of two ranks."""

    def __init__(self, folder: Path) -> None:
        """Make the data that is trained on in ``folder``."""
        self._folder = folder
        write_tokens(folder / "tokens")
        self._lines: dict[int, dict[str, Any]] = {}

    def trial(self, number: int) -> dict[str, Any]:
        """The line of one trial."""
        if number not in self._lines:
            first = number - number % TRIALS_PER_LAUNCH
            self._launch(range(number, first + TRIALS_PER_LAUNCH), first // TRIALS_PER_LAUNCH)
        return self._lines.pop(number)

    def _launch(self, numbers: range, launch: int) -> None:
        layout, dtype = LAYOUTS[launch % len(LAYOUTS)]
        config = toy_config(
            self._folder / "tokens", self._folder / "unused", ParallelConfig(**layout)
        )
        config = replace(
            config,
            precision=PrecisionConfig(dtype=dtype, initial_loss_scale=SCALE),  # type: ignore[arg-type]
        )
        log, results = self._folder / "log.txt", self._folder / "results"
        log.unlink(missing_ok=True)

        def work(rank: int) -> int:
            lines = _Trainer(config).trials(numbers)
            Path(f"{results}-{rank}.json").write_text(json.dumps(lines))
            return 0

        with World(2, work, log) as world:
            if not world.wait(600) or world.codes() != [0, 0]:
                raise RuntimeError(f"the ranks ended with {world.codes()}: {log.read_text()}")
        both = [json.loads(Path(f"{results}-{rank}.json").read_text()) for rank in range(2)]
        for lines in zip(*both, strict=True):
            line = {**lines[0], "layout": layout, "dtype": dtype}
            line["ok"] = all(each["ok"] for each in lines)
            self._lines[line["trial"]] = line


class _Trainer:
    """One rank: an engine that is put back to its beginning before every trial."""

    def __init__(self, config: RunConfig) -> None:
        from megatron_cogview.engines.megatron import MegatronEngine

        self.config = config
        self.groups = initialize(config.parallel)
        layout = SequenceLayout(config.sequence, config.model.vocab)
        loader = build_loader(
            layout, config.training, config.data, self.groups.data_rank, self.groups.data_size
        )
        self.batches = [loader.micro_batches(step) for step in range(STEPS)]
        seed_initialization(1, self.groups)
        self.engine = MegatronEngine(config, self.groups)
        # One step, so that the optimizer has state to lose.
        self._step(0)
        self._beginning = [tensor.clone() for tensor in self._state()]
        self._scalers = [s.state_dict() for s in self._grad_scalers()]
        self._left_out = [self._run(without=step) for step in range(STEPS)]
        self._whole = self._run(without=None)

    def trials(self, numbers: range) -> list[dict[str, Any]]:
        """The lines of these trials."""
        return [self._trial(number) for number in numbers]

    def _trial(self, number: int) -> dict[str, Any]:
        fault = Fault.draw(number, len(self.batches[0]))
        self._restore()
        skipped = []
        for step in range(STEPS):
            hurt = self._hurt(fault) if step == fault.step else contextlib.nullcontext()
            with hurt:
                if not self._step(step):
                    skipped.append(step)
        digest = self._digest()
        ok = skipped == [fault.step] and digest == self._left_out[fault.step]
        # An fp16 scaler counts such a step, and counts the good ones anew behind it.
        counts = [
            (float(s.scale), s._hysteresis_tracker, s._growth_tracker) for s in self._grad_scalers()
        ]
        expected = (SCALE, self.config.precision.hysteresis - 1, STEPS - 1 - fault.step)
        ok = ok and all(found == expected for found in counts)
        return {
            "trial": number,
            "kind": "bad number",
            "place": self._place(fault),
            "rank": fault.rank,
            "step": fault.step,
            "number": str(fault.number),
            "skipped": skipped,
            "scaler": counts,
            "ok": ok and digest != self._whole,
        }

    def _run(self, without: int | None) -> str:
        self._restore()
        for step in range(STEPS):
            if step != without:
                assert self._step(step), "a step was refused for no reason"
        return self._digest()

    def _step(self, step: int) -> bool:
        seed_step(1, step, self.groups)
        return self.engine.train_step(self.batches[step], LR).updated

    def _state(self) -> Iterator[torch.Tensor]:
        """Every tensor that training changes on this rank."""
        for chunk in self.engine.chunks:
            yield from (parameter.data for parameter in chunk.parameters())
        for part in self.engine.optimizer.chained_optimizers:
            for group in part.optimizer.param_groups:
                for parameter in group["params"]:
                    yield parameter.data
                    state = part.optimizer.state[parameter]
                    yield from (state[name] for name in sorted(state))

    def _grad_scalers(self) -> list[Any]:
        parts = self.engine.optimizer.chained_optimizers
        scalers = [getattr(part, "grad_scaler", None) for part in parts]
        return [scaler for scaler in scalers if scaler is not None]

    def _restore(self) -> None:
        for tensor, old in zip(self._state(), self._beginning, strict=True):
            tensor.copy_(old)
        for scaler, old in zip(self._grad_scalers(), self._scalers, strict=True):
            scaler.load_state_dict(old)

    def _digest(self) -> str:
        whole = hashlib.sha256()
        for tensor in self._state():
            whole.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return whole.hexdigest()

    def _place(self, fault: Fault) -> str:
        """Where it can be in this layout."""
        if fault.place == "loss" and self.groups.pipeline_size > 1 and fault.rank == 0:
            return "activation"
        if fault.place == "reduced gradient" and self.config.parallel.distributed_optimizer:
            # There a rank looks only at the part of the gradients that it owns.
            return "gradient"
        return fault.place

    @contextlib.contextmanager
    def _hurt(self, fault: Fault) -> Iterator[None]:
        """Put the bad number where the fault says, for one step."""
        if dist.get_rank() != fault.rank:
            yield
            return
        rng = np.random.default_rng(fault.seed)
        engine, place = self.engine, self._place(fault)
        if place in ("activation", "loss"):
            chunk = engine.chunks[0]
            layers = chunk.decoder.layers
            module = chunk if place == "loss" else layers[int(rng.integers(len(layers)))]
            with _spoiling(module, fault.micro_batch, fault.number, rng):
                yield
            return
        parameters = [p for chunk in engine.chunks for p in chunk.parameters()]
        flat = parameters[int(rng.integers(len(parameters)))].main_grad.view(-1)
        where = int(rng.integers(flat.numel()))
        honest = engine.settings.finalize_model_grads_func

        def finalize(*args: Any, **kwargs: Any) -> None:
            if place == "gradient":
                flat[where] = fault.number
            honest(*args, **kwargs)
            if place == "reduced gradient":
                flat[where] = fault.number

        engine.settings.finalize_model_grads_func = finalize
        try:
            yield
        finally:
            engine.settings.finalize_model_grads_func = honest


@contextlib.contextmanager
def _spoiling(
    module: torch.nn.Module, micro_batch: int, number: float, rng: np.random.Generator
) -> Iterator[None]:
    """One element of what ``module`` gives for one micro-batch becomes ``number``."""
    calls = 0

    def hook(_: torch.nn.Module, __: Any, output: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls != micro_batch + 1:
            return output
        first = output[0] if isinstance(output, tuple) else output
        spoilt = first.clone(memory_format=torch.contiguous_format)
        spoilt.view(-1)[int(rng.integers(spoilt.numel()))] = number
        return (spoilt, *output[1:]) if isinstance(output, tuple) else spoilt

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
