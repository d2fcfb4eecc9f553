"""Times and peak memory of single operations, and clocks.  Knows nothing of what they compute."""

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping

import torch

Operation = Callable[[], object]
CLOCKS = "clocks.sm,clocks.mem,temperature.gpu,power.draw"
"""What ``nvidia-smi`` is asked beside a measurement."""
_FLUSH_BYTES, _FLUSHES = 256 * 2**20, (8, 32, 128)
"""Several writes, and more where that was too few, so that the device is still busy when the host
has launched an operation of many small kernels: their time, and not the host's, lies between the
events.  An operation that waits for the device is measured with its waiting."""


def median_ms(
    operations: Mapping[str, Operation], device: torch.device, rounds: int
) -> dict[str, float]:
    """Median milliseconds of each operation over ``rounds`` interleaved runs.

    One after the other in every round, so that a change of clocks meets all of them alike.  On
    CUDA the time is between two events, and large writes before each run empty the L2 cache and
    keep the device busy while the host launches.  Two runs of each go before, unmeasured.
    """
    for operation in operations.values():
        operation()
        operation()
    times: dict[str, list[float]] = {name: [] for name in operations}
    measure = _cuda_round if device.type == "cuda" else _cpu_round
    for _ in range(rounds):
        for name, value in measure(operations, device).items():
            times[name].append(value)
    return {name: statistics.median(values) for name, values in times.items()}


def _cuda_round(operations: Mapping[str, Operation], device: torch.device) -> dict[str, float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
    return {name: _cuda_ms(operation, flush) for name, operation in operations.items()}


def _cuda_ms(operation: Operation, flush: torch.Tensor) -> float:
    """Once more with a longer run-up if the device was there before the host had launched all."""
    for flushes in _FLUSHES:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for _ in range(flushes):
            flush.zero_()
        start.record()
        operation()
        host_was_faster = not start.query()
        end.record()
        torch.cuda.synchronize(flush.device)
        if host_was_faster:
            break
    return float(start.elapsed_time(end))


def _cpu_round(operations: Mapping[str, Operation], device: torch.device) -> dict[str, float]:
    result = {}
    for name, operation in operations.items():
        started = time.perf_counter()
        operation()
        result[name] = (time.perf_counter() - started) * 1e3
    return result


def extra_bytes(operation: Operation, device: torch.device) -> int | None:
    """Peak device memory of one run above what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    operation()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def gemm_tflops(side: int, device: torch.device, rounds: int) -> float:
    """Rate of a square bf16 matrix product in 10^12 operations per second."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    out = torch.empty_like(a)
    times = median_ms({"gemm": lambda: torch.mm(a, b, out=out)}, device, rounds)
    return 2 * side**3 / times["gemm"] / 1e9


def nvidia_smi(fields: str = CLOCKS) -> str:
    """One line of ``nvidia-smi --query-gpu`` for the first visible device."""
    if shutil.which("nvidia-smi") is None:
        return "unknown: no nvidia-smi"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return ((done.stdout.strip() if done.returncode == 0 else "") or "unknown").splitlines()[0]
