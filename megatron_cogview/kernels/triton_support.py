"""What all Triton kernels need: products that the interpreter gets right, and the size of a grid.

Imported by the kernels alone, because it imports Triton.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from megatron_cogview.kernels.dispatch import is_interpreted

LOG2_E = tl.constexpr(1.4426950408889634)
INTERPRETED = tl.constexpr(is_interpreted())

_CPU_PROGRAMS = 4
"""Of a grid that follows the size of the device, under the interpreter: few, but several."""


@triton.jit
def dot(a, b):
    """A product of tiles in fp32.  The interpreter multiplies the bit patterns of bf16 values, and
    halves in half precision; in fp32 their products are exact.  fp32 tiles are multiplied in full:
    Triton's default would round them to tf32."""
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@functools.cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU, for grids of a fixed size."""
    if device.type != "cuda":
        return _CPU_PROGRAMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@dataclass(frozen=True, kw_only=True)
class Shipped:
    """A kernel with the sizes it is started with, for the check that compiles it without a GPU."""

    kernel: Any
    """A ``triton.jit`` function."""
    types: Mapping[str, str]
    """Triton's type of each argument that is no constant: ``*bf16``, ``i32``, ``fp32``, ..."""
    constants: Mapping[str, Any]
    num_warps: int
    num_stages: int
    divisible: tuple[str, ...] = ()
    """Whole-number arguments that are multiples of 16 at every start, as Triton's JIT would see."""
    most_registers: int
    """Of a thread, on either architecture."""
    most_shared_bytes: int
    """Of a block, on either architecture."""
    product_rows: int = 0
    """Of its products in half precision, which must use tensor cores; 0: it has none."""
