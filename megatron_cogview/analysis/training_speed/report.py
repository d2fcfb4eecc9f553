"""All measurements of a training step, shape by shape, as plain values."""

import gc
import logging
import shutil
import statistics
import subprocess
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch

from megatron_cogview.analysis.machine import machine
from megatron_cogview.analysis.training_speed import roofline, shapes
from megatron_cogview.configs.budget import flops_per_token
from megatron_cogview.configs.errors import ConfigError, refuse
from megatron_cogview.configs.run import RunConfig
from megatron_cogview.data.loader import build_loader
from megatron_cogview.model.precision import DTYPES
from megatron_cogview.parallel import launch, topology
from megatron_cogview.parallel.seeding import seed_initialization
from megatron_cogview.tokenization.layout import SequenceLayout
from megatron_cogview.training.throughput import device_peak

logger = logging.getLogger(__name__)

_SQUARE = {"cuda": 8192, "cpu": 1024}

Peer = Literal["plain", "core"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and on what."""

    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Where; ``auto`` is the GPU if there is one."""
    shapes: tuple[str, ...] = ()
    """``PRESET`` or ``PRESET:LAYERS``.  Without: ``base_4b base_4b:4`` on a GPU, ``toy tiny`` on a
    CPU.  ``toy`` is the paper's sequence at a width of 256; ``micro micro:2`` rehearses on a CPU
    what a GPU would do."""
    dtype: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format; ``auto``: bf16 on a GPU and for ``micro``, fp32 on a CPU."""
    micro_batch_size: int = 0
    """Sequences of a forward pass; 0: the preset's, on a GPU halved until it fits."""
    micro_batches: int = 0
    """Forward passes of a step; 0: 8 on a GPU, where the update must not weigh more than in a real
    run, and 1 on a CPU."""
    steps: int = 50
    """Timed steps, or rounds of a comparison."""
    warmup: int = 5
    """Steps before them."""
    threads: tuple[int, ...] = (1, 2)
    """Of torch on the CPU, one measurement each."""
    peers: tuple[Peer, ...] = ("plain", "core")
    """Rivals on a CPU in fp32: the same model in plain PyTorch; megatron-core's GPT of local
    layers."""


def measure(settings: Settings) -> dict[str, Any]:
    """Run everything, shape by shape.

    Raises:
        ConfigError: no such device or shape, a number below 1, or several processes.
    """
    for name in ("steps", "warmup"):
        if getattr(settings, name) < 1:
            raise refuse(name, getattr(settings, name), "must be at least 1")
    for name in ("micro_batch_size", "micro_batches"):
        if getattr(settings, name) < 0:
            raise refuse(name, getattr(settings, name), "must not be negative")
    if launch.detect().world_size > 1:
        raise ConfigError("this measurement is of one process; start it without torchrun")
    device = _device(settings.device)
    with_cuda = device.type == "cuda"
    names = settings.shapes or (("base_4b", "base_4b:4") if with_cuda else ("toy", "tiny"))
    results: dict[str, Any] = {
        **machine(device),
        "megatron_core": version("megatron-core"),
        "rehearsal": not with_cuda and any(name.startswith(shapes.MICRO) for name in names),
        "shapes": [],
    }
    for name in names:
        for threads in (0,) if with_cuda else settings.threads:
            if threads:
                torch.set_num_threads(threads)
            logger.info("%s%s ...", name, f", {threads} thread(s)" if threads else "")
            results["shapes"].append(_shape(name, settings, device))
    return results


def _device(name: str) -> torch.device:
    present = torch.cuda.is_available()
    if name == "cuda" and not present:
        raise refuse(
            "device", name, "no CUDA device here; --device cpu --shapes micro micro:2 rehearses"
        )
    if name == "cpu" and present:
        # The engine takes the GPU where there is one.
        raise refuse("device", name, "hide the GPU first: CUDA_VISIBLE_DEVICES=''")
    return torch.device("cuda", torch.cuda.current_device()) if present else torch.device("cpu")


def _dtype(settings: Settings, name: str, device: torch.device) -> str:
    if settings.dtype != "auto":
        return settings.dtype
    return "bf16" if device.type == "cuda" or name.startswith(shapes.MICRO) else "fp32"


def _shape(name: str, settings: Settings, device: torch.device) -> dict[str, Any]:
    """One shape; on a GPU, what does not fit is told and left out."""
    with_cuda = device.type == "cuda"
    dtype = _dtype(settings, name, device)
    total = torch.cuda.get_device_properties(device).total_memory if with_cuda else None
    with tempfile.TemporaryDirectory(prefix="bench-training-") as folder:
        shards = Path(folder) / "tokens"
        try:
            case = shapes.case(
                name,
                str(shards),
                dtype,
                settings.micro_batch_size,
                settings.micro_batches or (8 if with_cuda else 1),
                total,
            )
            if case.note:
                logger.info("%s: %s", name, case.note)
            records = max(256, 4 * case.config.training.global_batch_size)
            shapes.write_random_shards(shards, case.config, records)
            with topology.running(case.config.parallel) as groups:
                found = _measured(case.config, settings, groups, Path(folder))
        except (ConfigError, torch.OutOfMemoryError) as error:
            if not with_cuda:
                raise
            reason = str(error)
            if isinstance(error, torch.OutOfMemoryError):
                reason = "out of memory; try a smaller --micro-batch-size"
            logger.warning("%s left out: %s", name, reason)
            found = {"left_out": reason}
            case = None
    # The engine is held by cycles, and the next shape needs its memory.
    gc.collect()
    if with_cuda:
        torch.cuda.empty_cache()
    return {"shape": name, "dtype": dtype, "note": case.note if case else "", **found}


def _measured(
    config: RunConfig, settings: Settings, groups: topology.Topology, folder: Path
) -> dict[str, Any]:
    # megatron-core may be imported only now that the process groups are there.
    from megatron_cogview.analysis.training_speed import against
    from megatron_cogview.analysis.training_speed.whole_step import TrainingLoop
    from megatron_cogview.engines.megatron import MegatronEngine

    layout = SequenceLayout(config.sequence, config.model.vocab)
    loader = build_loader(layout, config.training, config.data)
    seed_initialization(config.training.seed, groups)
    engine = MegatronEngine(config, groups)
    found: dict[str, Any] = {}
    dtype = DTYPES[config.precision.dtype]
    if groups.device.type == "cpu" and dtype == torch.float32 and settings.peers:
        steps = against.steps_of(config, engine, settings.peers)
        batches = [loader.micro_batches(step) for step in range(16)]
        found["against"] = against.compare(steps, batches, settings.warmup, settings.steps)
    loop = TrainingLoop(config, groups, engine, loader)
    if groups.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(groups.device)
    seconds = loop.times(settings.steps, settings.warmup)
    found["split"] = loop.split(settings.steps, settings.warmup, folder / "log")
    if groups.device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_allocated(groups.device)
        found["clocks"] = _clocks()
        torch.cuda.empty_cache()
    return {
        **found,
        "losses": [loop.losses[0], loop.losses[-1]],
        **_rates(config, statistics.median(seconds), groups.device, dtype),
        "seconds_fastest": min(seconds),
        "threads": torch.get_num_threads(),
        "on_cpu": groups.device.type == "cpu",
    }


def _clocks() -> str | None:
    """Clocks, temperature and power while the device is still warm."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = "--query-gpu=clocks.sm,clocks.mem,temperature.gpu,power.draw"
    command = ["nvidia-smi", query, "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _rates(
    config: RunConfig, seconds: float, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Rates of a step of ``seconds``, by the strict rule of ``configs/budget.py``."""
    t = config.training
    tokens = t.global_batch_size * config.sequence.model_length
    model_tflops = flops_per_token(config) * tokens / seconds / 1e12
    square = roofline.square_tflops(_SQUARE[device.type], device, dtype, 20)
    specified = device_peak(config, device)
    gemms = roofline.best_seconds(config, device, dtype, 20)
    return {
        "parameters": config.model.num_params(),
        "micro_batch_size": t.micro_batch_size,
        "global_batch_size": t.global_batch_size,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "sequences_per_second": t.global_batch_size / seconds,
        "model_tflops": model_tflops,
        "square_product_tflops": square,
        "mfu_of_square_product": model_tflops / square,
        "mfu_of_specification": None if specified is None else 1e12 * model_tflops / specified,
        "products_seconds": gemms,
        "products_tflops": roofline.gemm_flops(config) / gemms / 1e12,
        "roofline_fraction": gemms / seconds,
    }
