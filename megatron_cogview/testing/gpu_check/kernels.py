"""Rows of single operations at the sizes of the 4B model.

Shapes: B batch, N heads, S sequence, D head dim, H hidden; N vectors of width D and K codes.
"""

from dataclasses import dataclass, field
from functools import partial

import torch

from megatron_cogview.kernels.codebook_lookup.operator import nearest_code
from megatron_cogview.kernels.pb_relax_attention.reference import (
    causal_mask,
    fused_attention,
    pb_relax_attention,
)
from megatron_cogview.kernels.scaled_layer_norm.reference import scaled_layer_norm
from megatron_cogview.testing.gpu_check.rows import Figures, Row
from megatron_cogview.testing.gpu_check.timing import (
    Operation,
    copy_gb_per_s,
    extra_bytes,
    gemm_tflops,
    median_ms,
)

_ALPHA, _EPSILON = 32.0, 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class Sizes:
    """Shapes of the rows; the defaults are those of ``base_4b``."""

    batch: int = 4
    heads: int = 40
    head_dim: int = 64
    lengths: tuple[int, ...] = (1088, 4096)
    vectors: int = 32_768
    codes: int = 8192
    code_dim: int = 256
    gemm_side: int = 8192
    copy_bytes: int = 2**30
    rounds: int = 20

    @classmethod
    def micro(cls) -> "Sizes":
        """For a rehearsal on a CPU."""
        return cls(
            batch=1,
            heads=2,
            head_dim=8,
            lengths=(16, 24),
            vectors=64,
            codes=32,
            code_dim=8,
            gemm_side=32,
            copy_bytes=4096,
            rounds=2,
        )


@dataclass(slots=True)
class Rates:
    """Denominators measured in this run; rows that come before them go without."""

    figures: dict[str, float] = field(default_factory=dict)

    def fraction_of_copy(self, num_bytes: int, ms: float) -> float | None:
        """Achieved bytes per second relative to the copy rate."""
        rate = self.figures.get("copy_gb_per_s")
        return None if rate is None else num_bytes / ms / 1e6 / rate


def kernel_rows(device: torch.device, sizes: Sizes) -> list[Row]:
    """All rows, denominators first."""
    rates = Rates()
    rows = [
        Row(name="copy and GEMM rate", estimate_s=20, run=partial(_rates, rates, device, sizes))
    ]
    for length in sizes.lengths:
        for backward in (False, True):
            rows.append(
                Row(
                    name=f"attention S {length} {'fwd+bwd' if backward else 'fwd'}",
                    estimate_s=30,
                    run=partial(_attention, device, sizes, length, backward),
                )
            )
        for backward in (False, True):
            rows.append(
                Row(
                    name=f"LayerNorm S {length} {'fwd+bwd' if backward else 'fwd'}",
                    estimate_s=20,
                    run=partial(_layer_norm, rates, device, sizes, length, backward),
                )
            )
    rows.append(Row(name="codebook lookup", estimate_s=30, run=partial(_codebook, device, sizes)))
    return rows


def _rates(rates: Rates, device: torch.device, sizes: Sizes, remaining_s: float) -> Figures:
    rates.figures = {
        "copy_gb_per_s": copy_gb_per_s(sizes.copy_bytes, device, sizes.rounds),
        "gemm_tflops": gemm_tflops(sizes.gemm_side, device, sizes.rounds),
    }
    return {
        **rates.figures,
        "copy_bytes": sizes.copy_bytes,
        "gemm_side": sizes.gemm_side,
    }


def _with_gradients(operation: Operation, inputs: list[torch.Tensor]) -> Operation:
    """The operation and its backward pass from a gradient of ones."""

    def run() -> None:
        output = operation()
        assert isinstance(output, torch.Tensor)
        torch.autograd.grad(output, inputs, torch.ones_like(output))

    return run


def _attention(
    device: torch.device, sizes: Sizes, length: int, backward: bool, remaining_s: float
) -> Figures:
    shape = (sizes.batch, sizes.heads, length, sizes.head_dim)
    q, k, v = inputs = [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(3)
    ]
    visible = causal_mask(length, length, device)
    operations: dict[str, Operation] = {
        "reference": lambda: pb_relax_attention(q, k, v, visible, _ALPHA, "row"),
        "fused": lambda: fused_attention(q, k, v),
    }
    if backward:
        operations = {name: _with_gradients(o, inputs) for name, o in operations.items()}
    times = median_ms(operations, device, sizes.rounds)
    # Two products over the causal pairs; the backward pass counts twice (MFU rule).
    pairs = sizes.batch * sizes.heads * length * (length + 1) // 2
    flops = 4 * pairs * sizes.head_dim * (3 if backward else 1)
    return {
        "reference_ms": times["reference"],
        "fused_ms": times["fused"],
        "reference_over_fused": times["reference"] / times["fused"],
        "fused_tflops": flops / times["fused"] / 1e9,
        "reference_extra_bytes": extra_bytes(operations["reference"], device),
        "fused_extra_bytes": extra_bytes(operations["fused"], device),
        "dtype": "bf16",
    }


def _layer_norm(
    rates: Rates,
    device: torch.device,
    sizes: Sizes,
    length: int,
    backward: bool,
    remaining_s: float,
) -> Figures:
    hidden = sizes.heads * sizes.head_dim
    x_SBH = torch.randn(
        (length, sizes.batch, hidden),
        device=device,
        dtype=torch.bfloat16,
        requires_grad=backward,
    )
    weight_H, bias_H = (
        torch.ones(hidden, device=device, dtype=torch.bfloat16, requires_grad=backward)
        for _ in range(2)
    )
    operations: dict[str, Operation] = {
        "plain": lambda: scaled_layer_norm(x_SBH, weight_H, bias_H, _EPSILON, "none"),
        "token_max": lambda: scaled_layer_norm(x_SBH, weight_H, bias_H, _EPSILON, "token_max"),
    }
    if backward:
        inputs = [x_SBH, weight_H, bias_H]
        operations = {name: _with_gradients(o, inputs) for name, o in operations.items()}
    times = median_ms(operations, device, sizes.rounds)
    # Forward reads x and writes y; backward reads x and dy and writes dx.
    moved = x_SBH.numel() * 2 * (5 if backward else 2)
    return {
        "plain_ms": times["plain"],
        "token_max_ms": times["token_max"],
        "plain_fraction_of_copy": rates.fraction_of_copy(moved, times["plain"]),
        "token_max_fraction_of_copy": rates.fraction_of_copy(moved, times["token_max"]),
        "plain_extra_bytes": extra_bytes(operations["plain"], device),
        "token_max_extra_bytes": extra_bytes(operations["token_max"], device),
        "dtype": "bf16",
    }


def _codebook(device: torch.device, sizes: Sizes, remaining_s: float) -> Figures:
    vectors_ND = torch.randn(sizes.vectors, sizes.code_dim, device=device)
    codes_KD = torch.randn(sizes.codes, sizes.code_dim, device=device)

    def whole_matrix() -> torch.Tensor:
        distance_NK = (
            vectors_ND.square().sum(1, keepdim=True)
            - 2 * vectors_ND @ codes_KD.t()
            + codes_KD.square().sum(1)
        )
        return distance_NK.argmin(1)

    operations: dict[str, Operation] = {
        "reference": lambda: nearest_code(vectors_ND, codes_KD),
        "matrix": whole_matrix,
    }
    times = median_ms(operations, device, sizes.rounds)
    differ = nearest_code(vectors_ND, codes_KD) != whole_matrix()
    return {
        "reference_ms": times["reference"],
        "matrix_ms": times["matrix"],
        "reference_over_matrix": times["reference"] / times["matrix"],
        "reference_extra_bytes": extra_bytes(operations["reference"], device),
        "matrix_extra_bytes": extra_bytes(operations["matrix"], device),
        "indices_that_differ": int(differ.sum()),
        "dtype": "fp32",
    }
