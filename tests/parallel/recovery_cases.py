"""What the ranks of the recovery tests run: stops, bad batches, going back.  Results are JSON."""

import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_cogview.configs.parallel import ParallelConfig
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import TrainLoader
from megatron_cogview.testing.toy_run import with_survival
from tests.parallel.training_cases import DyingLoader, Killed, build, digest, training_config


def stop_while_validating(arguments: dict[str, Any]) -> dict[str, Any]:
    """One rank is asked to stop in the middle of a validation; the next start dies behind it."""
    plain = training_config(arguments["folder"], "validated-whole", ParallelConfig())
    plain = replace(plain, data=replace(plain.data, validation_fraction=0.5))
    engine, trainer = build(plain)
    assert trainer.loader.num_validation_batches > 1
    assert trainer.run()
    whole = digest(engine)
    output = f"{arguments['folder']}/validated-stopped"
    config = replace(plain, training=replace(plain.training, output=output))
    engine, trainer = build(config)
    evaluate, calls = engine.eval_step, []

    def asked(batches: Any) -> Any:
        if torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(len(batches))
        return evaluate(batches)

    engine.eval_step = asked
    with trainer.stop:
        finished = trainer.run()
    stopped = {"finished": finished, "calls": calls, "step": trainer.checkpoints.saved_step}
    _, trainer = build(config)
    trainer.loader = DyingLoader(trainer.loader, 3)
    with contextlib.suppress(Killed):
        trainer.run()
    engine, trainer = build(config)
    assert trainer.run()
    return {**stopped, "whole": whole, "resumed": digest(engine)}


class SpoilingLoader(TrainLoader):
    """Some batches make the loss infinite, on one rank; asking for the ``last`` one kills."""

    def __init__(
        self, inner: TrainLoader, batches: tuple[int, ...], rank: int, last: int = -1
    ) -> None:
        self.__dict__.update(inner.__dict__)
        self.last = last
        self.asked: list[int] = []
        self._bad = batches if torch.distributed.get_rank() == rank else ()

    def micro_batches(self, step: int) -> list[Any]:
        self.asked.append(step)
        if step == self.last:
            raise Killed
        batches = super().micro_batches(step)
        if step in self._bad:
            batches[0].loss_weights_BS[0, 0] = float("inf")
        return batches


def roll_back(arguments: dict[str, Any]) -> dict[str, Any]:
    """Bad batches are skipped; too many in a row send the run back, to go on without them."""
    from megatron_cogview.configs.errors import TrainingError

    folder, results = arguments["folder"], {}
    plain = training_config(folder, "unhurt", ParallelConfig())
    for name, bad, survival in (
        ("one", (3,), {}),
        ("told", (), {"skip_steps": (4,)}),
        ("two", (3, 4), {"max_bad_steps": 2}),
        ("all", tuple(range(3, 99)), {"max_bad_steps": 2, "max_rollbacks": 2}),
        ("first", (0, 1), {"max_bad_steps": 2}),
    ):
        config = with_survival(plain, **survival)
        config = replace(config, training=replace(config.training, output=f"{folder}/back-{name}"))
        engine, trainer = build(config)
        trainer.loader = SpoilingLoader(trainer.loader, bad, rank=1)
        message = ""
        try:
            trainer.run()
        except TrainingError as error:
            message = str(error)
        results[name] = {
            "batches": trainer.loader.asked,
            "digest": digest(engine),
            "progress": trainer.progress.to_dict(),
            "message": message,
        }
    results["restarted"] = _killed_after_going_back(plain)
    return results


def _killed_after_going_back(plain: RunConfig) -> dict[str, Any]:
    """A run that dies in the first batch behind those that it has just left out."""
    config = with_survival(plain, max_bad_steps=2)
    # What is written in the background may not be there yet when the run dies.
    output = f"{Path(plain.training.output).parent}/back-restarted"
    config = replace(config, training=replace(config.training, output=output, async_save=False))
    _, trainer = build(config)
    trainer.loader = SpoilingLoader(trainer.loader, (3, 4), rank=1, last=5)
    with contextlib.suppress(Killed):
        trainer.run()
    engine, trainer = build(config)
    trainer.loader = SpoilingLoader(trainer.loader, (3, 4), rank=1)
    trainer.run()
    return {
        "batches": trainer.loader.asked,
        "digest": digest(engine),
        "progress": trainer.progress.to_dict(),
    }
