"""What the tests of the kernels that hold a row need: poisoned outputs, numbers, errors."""

from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import pytest
import torch
from torch import Tensor

from megatron_cogview.kernels.dispatch import is_interpreted

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GUARD = 64
"""Elements before and after a poisoned output that a kernel must leave alone."""


@contextmanager
def poisoned(module: ModuleType) -> Iterator[None]:
    """What a kernel does not write is NaN, and what it writes outside is seen."""
    made = []

    def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        size = torch.Size(shape).numel()
        room = torch.full((size + 2 * GUARD,), torch.nan, dtype=dtype, device=device)
        made.append(room)
        return room[GUARD : GUARD + size].view(shape)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "empty", empty)
        yield
    assert all(room[:GUARD].isnan().all() and room[-GUARD:].isnan().all() for room in made)


def own_storage(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Poisoned, and beginning where its memory begins, as ``opcheck`` wants to see it."""
    return torch.full(shape, torch.nan, dtype=dtype, device=device)


def normal(*shape: int, seed: int = 0) -> Tensor:
    """fp64 numbers that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(DEVICE)


def uneven(*shape: int, seed: int = 0) -> Tensor:
    """fp64 rows that differ in mean and size."""
    sizes = normal(*shape[:-1], 1, seed=seed + 1).exp()
    return normal(*shape, seed=seed) * sizes + normal(*shape[:-1], 1, seed=seed + 2)


def error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; infinite where something is not finite."""
    actual, expected = actual.detach().double(), expected.detach()
    if not actual.isfinite().all():
        return float("inf")
    return float((actual - expected).abs().max() / expected.abs().max())


def allowance(dtype: torch.dtype) -> float:
    """Two units of bf16, where the interpreter cuts what a device rounds."""
    return 2 * 2**-8 if dtype == torch.bfloat16 and is_interpreted() else 0.0
