"""One part from start to end: device, rows, report, exit code."""

import gc
import logging
from pathlib import Path
from typing import Literal

import torch

from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.parallel import cpu_backend
from megatron_cogview.testing.gpu_check import generation, kernels, suites, training
from megatron_cogview.testing.gpu_check.report import Report, environment
from megatron_cogview.testing.gpu_check.rows import Row, exit_code, run_rows

logger = logging.getLogger(__name__)

Part = Literal["tests", "kernels", "training", "generation"]


def run_part(part: Part, output: Path, budget_s: float, device_name: Literal["cuda", "cpu"]) -> int:
    """Measure ``part`` into ``output``.

    Args:
        part: which rows.
        output: folder for ``PART.jsonl`` and ``PART.md``, which it must not hold yet, and for
            ``kernels.png``.
        budget_s: seconds for all rows.
        device_name: ``cpu`` rehearses at micro shapes and labels the table so.

    Returns:
        0, or 1 when a row failed or none ran.

    Raises:
        ConfigError: no CUDA device, or an output folder in use.
    """
    if budget_s <= 0:
        raise refuse("--budget-seconds", budget_s, "must be positive")
    device, is_kernels = resolve_device(device_name), part == "kernels"
    cpu_backend.install()
    about = environment(device)
    report = Report(output, part, about, kernels.sections_for(device) if is_kernels else None)
    try:
        outcomes = run_rows(rows_of(part, device, output), budget_s, report.record, _free_memory)
    finally:
        # Also of a part that is stopped.
        if is_kernels:
            kernels.save_picture(report.outcomes, output / "kernels.png", about["device"])
    logger.info("%s", report.table)
    return exit_code(outcomes)


def resolve_device(name: Literal["cuda", "cpu"]) -> torch.device:
    """The device to measure.

    Raises:
        ConfigError: CUDA is asked for and absent, or a rehearsal on a machine that has it.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "--device cuda: torch finds no CUDA device, and nothing else is measured in its place; "
            "--device cpu rehearses at micro shapes"
        )
    if name == "cpu" and torch.cuda.is_available():
        # The engine would take the GPU, and the table would say CPU.
        raise ConfigError("--device cpu: hide the GPUs with CUDA_VISIBLE_DEVICES= to rehearse")
    return torch.device("cuda", 0) if name == "cuda" else torch.device("cpu")


def rows_of(part: Part, device: torch.device, output: Path) -> list[Row]:
    """Rows of a part, at micro shapes on a CPU."""
    micro = device.type == "cpu"
    if part == "tests":
        return suites.suite_rows(device, output)
    if part == "kernels":
        return kernels.kernel_rows(device)
    if part == "training":
        cases = training.micro_cases() if micro else training.gpu_cases()
        return training.training_rows(device, cases, 32 if micro else 8192)
    decoding = generation.micro_cases() if micro else generation.gpu_cases()
    return generation.generation_rows(device, decoding)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
