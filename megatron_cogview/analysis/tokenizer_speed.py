"""Encoding against the released algorithm: time, peak memory, and which codes differ.

The released quantiser forms the whole fp32 distance matrix, takes the largest of its negative and
makes one-hot vectors; ours is ``codebook_lookup``.  Weights, pictures and threads are the same.

Shapes: B pictures, N vectors, D code width, K codes, S side.
"""

import itertools
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from megatron_cogview.analysis.machine import machine
from megatron_cogview.analysis.resident_memory import peak_bytes
from megatron_cogview.configs.errors import DataError, refuse
from megatron_cogview.configs.image_tokenizer import ImageTokenizerConfig
from megatron_cogview.data import images
from megatron_cogview.data.raw import RawPair
from megatron_cogview.data.sources import open_pictures
from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.tokenization.image import load_image_tokenizer
from megatron_cogview.tokenization.pixels import OURS, PixelScaling
from megatron_cogview.tokenization.quantizer import flatten_latents
from megatron_cogview.tokenization.vq_model import VQModel

logger = logging.getLogger(__name__)


class Subject(NamedTuple):
    """What is measured."""

    model: VQModel
    pictures_BCSS: Tensor
    """Scaled; already on the device."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to measure, and on what."""

    image_tokenizer: Path | None = None
    """Weights (.safetensors)."""
    data: tuple[Path, ...] = ()
    """Folders of WebDataset tars; smooth random pictures if none is named."""
    batch_size: int = 32
    """Pictures per pass."""
    batches: int = 4
    """Passes for the comparison of bf16 and fp32 codes; the times are those of the first."""
    repeats: int = 5
    """Timed runs of each way."""
    device: str = "cpu"
    """Where the networks run."""
    threads: int = 0
    """Of torch on the CPU; 0: its own choice."""


def report(settings: Settings) -> dict[str, Any]:
    """All numbers, with the machine they were measured on.

    Raises:
        ConfigError: a size below 1.
        DataError: unusable weights, or too few pictures.
    """
    for name in ("batch_size", "batches", "repeats"):
        if getattr(settings, name) < 1:
            raise refuse(name, getattr(settings, name), "must be at least 1")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    model, pixels, side = _model(settings)
    number = settings.batch_size * settings.batches
    pictures = _pictures(settings.data, number, side) if settings.data else None
    if pictures is None:
        pictures = smooth_pictures(number, side)
    batches = [
        pixels.to_float(torch.from_numpy(part).to(settings.device))
        for part in np.split(pictures, settings.batches)
    ]
    if settings.image_tokenizer is None:
        with torch.no_grad():
            vectors = torch.cat([flatten_latents(_latents(model, batch)) for batch in batches])
            model.quantize_t.initialise_from(vectors)
    return {
        **machine(torch.device(settings.device)),
        "batch_size": settings.batch_size,
        "image_size": side,
        "codebook": list(model.quantize_t.embed.shape),
        **measure(Subject(model, batches[0]), settings.repeats),
        "bf16": bf16_mismatch(model, batches),
    }


def _model(settings: Settings) -> tuple[VQModel, PixelScaling, int]:
    """Network, pixel scaling and picture side."""
    if settings.image_tokenizer is not None:
        tokenizer = load_image_tokenizer(settings.image_tokenizer, settings.device)
        return tokenizer.model, tokenizer.pixels, tokenizer.config.image_size
    config = ImageTokenizerConfig()
    torch.manual_seed(0)
    model = VQModel(config).to(settings.device).eval().requires_grad_(False)
    return model, OURS, config.image_size


def _pictures(folders: tuple[Path, ...], number: int, side: int) -> NDArray[np.uint8]:
    """The first pictures of the folders that can be decoded."""
    found: list[NDArray[np.uint8]] = []
    for source in map(open_pictures, folders):
        for pair in itertools.chain.from_iterable(map(source.read, source.parts())):
            if len(found) == number:
                return np.stack(found)
            if isinstance(pair, RawPair):
                try:
                    found.append(images.decode(pair.image, side))
                except DataError as error:
                    logger.warning("%s: %s left out: %s", pair.source, pair.id, error)
    raise DataError(f"{', '.join(map(str, folders))}: {len(found)} pictures, {number} are needed")


def released_codes(vectors_ND: Tensor, embed_DK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``[N]`` and code vectors ``[N, D]`` by the released algorithm."""
    distances_NK = (
        vectors_ND.pow(2).sum(1, keepdim=True)
        - 2 * vectors_ND @ embed_DK
        + embed_DK.pow(2).sum(0, keepdim=True)
    )
    _, codes_N = (-distances_NK).max(1)
    # Made there in every pass, for the moving averages.
    functional.one_hot(codes_N, embed_DK.shape[1]).type(vectors_ND.dtype)
    return codes_N, functional.embedding(codes_N, embed_DK.t())


def our_codes(vectors_ND: Tensor, embed_DK: Tensor) -> tuple[Tensor, Tensor]:
    """The same through ``codebook_lookup``."""
    codes_N = nearest_code(vectors_ND, embed_DK.t())
    return codes_N, functional.embedding(codes_N, embed_DK.t())


@torch.no_grad()
def measure(subject: Subject, repeats: int) -> dict[str, Any]:
    """Seconds (median), pictures per second and peak memory of both ways; codes that differ.

    Args:
        subject: weights and pictures.
        repeats: timed passes of each way, after one that is not timed; the ways take turns.

    Returns:
        ``quantizer`` and ``encode``, each with ``ours``, ``released``, ``speedup`` (times as fast)
        and ``memory_ratio`` (ours over released); ``codes_differ`` between the two ways, and in how
        many of those each has the nearest code by fp64.
    """
    model, pictures_BCSS = subject
    device = pictures_BCSS.device
    vectors_ND = flatten_latents(_latents(model, pictures_BCSS)).contiguous()
    embed_DK = model.quantize_t.embed.detach()
    report: dict[str, Any] = {
        "quantizer": _compare(
            lambda: our_codes(vectors_ND, embed_DK),
            lambda: released_codes(vectors_ND, embed_DK),
            len(pictures_BCSS),
            repeats,
            device,
        ),
        "encode": _compare(
            lambda: model.encode(pictures_BCSS),
            lambda: released_codes(flatten_latents(_latents(model, pictures_BCSS)), embed_DK),
            len(pictures_BCSS),
            repeats,
            device,
        ),
    }
    ours, released = our_codes(vectors_ND, embed_DK)[0], released_codes(vectors_ND, embed_DK)[0]
    differs = ours != released
    nearest = _nearest_in_fp64(vectors_ND[differs], embed_DK)
    report["vectors"], report["codes_differ"] = len(ours), int(differs.sum())
    report["nearest_of_those"] = {
        "ours": int((ours[differs] == nearest).sum()),
        "released": int((released[differs] == nearest).sum()),
    }
    report["codes_in_use"] = len(ours.unique())
    return report


def _nearest_in_fp64(vectors_ND: Tensor, embed_DK: Tensor) -> Tensor:
    exact_KD = embed_DK.t().double()
    parts = [torch.cdist(part.double(), exact_KD).argmin(1) for part in vectors_ND.split(1024)]
    return torch.cat(parts)


@torch.no_grad()
def bf16_mismatch(model: VQModel, batches: list[Tensor]) -> dict[str, float]:
    """Codes of the bf16 encoder against those of fp32.

    Returns:
        ``mismatch``: share of codes that differ; ``within_1_percent`` and
        ``within_1_percent_squared``: share of those whose code lies at most 1 % farther than the
        nearest, in L2 distance and in its square (target D1), by fp64 on the fp32 vectors.
    """
    embed_KD = model.quantize_t.embed.detach().t().double()
    total, quotients = 0, []
    for pictures_BCSS in batches:
        vectors_ND = flatten_latents(_latents(model, pictures_BCSS)).double()
        exact_N = model.encode(pictures_BCSS).flatten()
        rough_N = model.encode_bf16(pictures_BCSS).flatten()
        differing = exact_N != rough_N
        total += len(differing)
        nearest = (vectors_ND[differing] - embed_KD[exact_N[differing]]).square().sum(1)
        chosen = (vectors_ND[differing] - embed_KD[rough_N[differing]]).square().sum(1)
        quotients.append(chosen / nearest)
    quotient = torch.cat(quotients)
    count = max(1, len(quotient))
    return {
        "vectors": total,
        "mismatch": len(quotient) / total,
        "within_1_percent": float((quotient <= 1.01**2).sum()) / count,
        "within_1_percent_squared": float((quotient <= 1.01).sum()) / count,
    }


def _latents(model: VQModel, pictures_BCSS: Tensor) -> Tensor:
    """Encoder outputs in fp32; torch lets cuDNN's convolutions run in TF32 unless told not to."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        latents_BDHW: Tensor = model.enc_b(pictures_BCSS)
    return latents_BDHW


def smooth_pictures(number: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Random pictures ``[number, side, side, 3]`` with more power at low frequencies."""
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(number, 3, side, side)
    for octave in range(3, side.bit_length()):
        coarse = min(side, 1 << octave)
        noise = torch.randn(number, 3, coarse, coarse, generator=generator)
        total += functional.interpolate(noise, (side, side), mode="bilinear") / 2 ** (octave - 3)
    levels = (total * 50 + 128).clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(levels.permute(0, 2, 3, 1).numpy())


def _compare(
    ours: Callable[[], Any],
    released: Callable[[], Any],
    pictures: int,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    ways = {"ours": ours, "released": released}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            seconds = _seconds(run, device)
            if repeat > 0:
                times[name].append(seconds)
    result: dict[str, Any] = {}
    for name, run in ways.items():
        seconds = statistics.median(times[name])
        result[name] = {
            "seconds": seconds,
            "pictures_per_second": pictures / seconds,
            "peak_bytes": peak_bytes(run, device),
        }
    mine, theirs = result["ours"], result["released"]
    result["speedup"] = theirs["seconds"] / mine["seconds"]
    result["memory_ratio"] = mine["peak_bytes"] / theirs["peak_bytes"]
    return result


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
