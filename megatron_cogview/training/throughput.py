"""How fast a run is, how well it uses its devices, and when it will end."""

import contextlib
import time
from collections.abc import Callable, Iterator

import psutil
import torch

from megatron_cogview.configs.budget import flops_per_token
from megatron_cogview.configs.devices import peak_flops
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.model.precision import resolve_dtype
from megatron_cogview.parallel.topology import Topology

MEASURED = frozenset({"seconds_per_step", "tokens_per_second", "mfu", "memory_gib", "eta_seconds"})
"""Names of all that is measured here: what differs between two runs that are otherwise equal."""

HALF_LIFE = 50
"""Steps after which a step weighs half in the remaining time."""


class Throughput:
    """Times the steps of one process's run.

    Args:
        config: the run.
        topology: process groups; all devices are taken to be like this one.
        total_steps: steps of the whole run.
        start: steps done before.
        clock: seconds.
    """

    def __init__(
        self,
        config: RunConfig,
        topology: Topology,
        total_steps: int,
        start: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total_steps, self.device, self.clock = total_steps, topology.device, clock
        self.tokens_per_step = config.training.global_batch_size * config.sequence.model_length
        self.flops_per_step = flops_per_token(config) * self.tokens_per_step
        peak = device_peak(config, topology.device)
        self.peak_flops = None if peak is None else peak * topology.world_size
        self._lap_start, self._lap_from = clock(), start
        self._left_out = 0
        self._is_first = True
        self._seconds, self._steps = 0.0, 0.0

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Around what is no step, such as a validation: its time counts for no step."""
        started = self.clock()
        try:
            yield
        finally:
            self._lap_start += self.clock() - started

    def leave_out(self) -> None:
        """The current step was not trained on and counts for nothing."""
        self._left_out += 1

    def lap(self, done: int) -> dict[str, float]:
        """Figures of the steps since the last call.

        MFU is strict: the operations the model needs (``configs/budget.py``; neither recomputation
        nor the embedding), in all of a step's time, as a part of what the devices are specified
        for.  It is there only for devices whose specification is known.

        Args:
            done: steps done.

        Returns:
            Values by the names of :data:`MEASURED`: the memory is the peak allocated on this
            process's GPU, or this process's resident memory on a CPU; the remaining time is that
            of steps alone, without validation.
        """
        now = self.clock()
        seconds = now - self._lap_start
        steps = done - self._lap_from - self._left_out
        self._lap_start, self._lap_from, self._left_out = now, done, 0
        figures: dict[str, float] = {}
        if steps > 0 and seconds > 0:
            figures["seconds_per_step"] = seconds / steps
            figures["tokens_per_second"] = self.tokens_per_step * steps / seconds
            if self.peak_flops is not None:
                figures["mfu"] = self.flops_per_step * steps / seconds / self.peak_flops
            self._remember(seconds, steps)
        figures["memory_gib"] = memory_bytes(self.device) / 2**30
        if self._steps:
            remaining = self.total_steps - done
            figures["eta_seconds"] = remaining * self._seconds / self._steps
        return figures

    def _remember(self, seconds: float, steps: int) -> None:
        """Add to the mean time of a step, in which older steps fade."""
        # The first steps of a process warm it up: they stand in until there are others.
        weight = 1e-6 if self._is_first else 1.0
        self._is_first = False
        kept = 0.5 ** (steps / HALF_LIFE)
        self._seconds = self._seconds * kept + weight * seconds
        self._steps = self._steps * kept + weight * steps


def device_peak(config: RunConfig, device: torch.device) -> float | None:
    """Specified operations a second of one device in the run's number format, if known."""
    formats = {torch.bfloat16: "bf16", torch.float16: "fp16"}
    name = formats.get(resolve_dtype(config.precision))
    if device.type != "cuda" or name is None:
        return None
    return peak_flops(torch.cuda.get_device_name(device), "bf16" if name == "bf16" else "fp16")


def memory_bytes(device: torch.device) -> int:
    """Peak allocated on a GPU since the process began, or resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(psutil.Process().memory_info().rss)
