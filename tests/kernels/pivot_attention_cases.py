"""Inputs, an fp64 oracle and the error rule for tests of three-region attention.

Shapes: B batch, N heads, S queries, K keys, D head dim.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_cogview.kernels.dispatch import is_interpreted
from megatron_cogview.kernels.pivot_attention.operator import three_region_attention
from megatron_cogview.kernels.pivot_attention.reference import kept_weights, key_regions

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NAMES = ("out", "q", "k", "v")
FP32_BOUND = 1e-6

SETTINGS: dict[str, Any] = {
    "total_length": 60,
    "window_block": 8,
    "window_blocks": 2,
    "num_pivots": 12,
    "layer_number": 3,
    "seed": 1,
}
REGION_NAMES = ("window_block", "window_blocks", "num_pivots", "layer_number", "seed")


@dataclass
class Case:
    """One call: shapes, texts and what differs from :data:`SETTINGS`."""

    queries: int = 50
    keys: int = 50
    head_dim: int = 40
    heads: int = 2
    texts: tuple[int, ...] = (4, 9)
    scale: float = 1.0
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {**SETTINGS, **self.given}

    @property
    def pivot_key_B2(self) -> torch.Tensor:
        samples = [[5 + b, text] for b, text in enumerate(self.texts)]
        return torch.tensor(samples, device=DEVICE)

    def regions(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys of the window, and keys before it."""
        used = {name: self.settings[name] for name in REGION_NAMES}
        used["padding_B2"] = self.settings.get("padding_B2")
        total = self.settings["total_length"]
        return key_regions(self.pivot_key_B2, self.queries, self.keys, total, **used)

    def tensors(self, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """Queries, keys, values and the output's gradient, lying in memory sequence first."""
        g = torch.Generator().manual_seed(2)
        made = []
        for length in (self.queries, self.keys, self.keys, self.queries):
            shape = (length, len(self.texts), self.heads, self.head_dim)
            made.append(torch.randn(shape, generator=g).to(DEVICE).permute(1, 2, 0, 3))
        q, k, v, d_out = made
        return tuple(x.to(dtype) for x in (q * self.scale, k * self.scale, v, d_out))


def differentiated(attend, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Output and gradients of ``attend(q, k, v)``, by name."""
    *inputs, d_out = tensors
    inputs = [x.detach().requires_grad_() for x in inputs]
    out = attend(*inputs)
    gradients = torch.autograd.grad(out, inputs, d_out)
    return dict(zip(NAMES, (out.detach(), *gradients), strict=True))


def by_triton(case: Case, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    return differentiated(
        lambda q, k, v: three_region_attention(
            q, k, v, case.pivot_key_B2, implementation="triton", **case.settings
        ),
        tensors,
    )


def exact(case: Case, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """The same in fp64 from the definition, of the values that the tensors hold."""
    window, outside = case.regions()
    dropout = case.settings.get("dropout", 0.0)
    factor = torch.ones((), dtype=torch.float64, device=DEVICE)
    if dropout:
        shape = (len(case.texts), case.heads, case.queries, case.keys)
        seed = case.settings["dropout_seed"]
        factor = kept_weights(shape, dropout, seed, 0, 0, DEVICE).double() / (1 - dropout)

    def attend(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(case.head_dim)
        scores = scores + case.settings.get("pivot_bias", 0.0) * outside
        scores = scores.masked_fill(~(window | outside), -torch.inf)
        return torch.softmax(scores, -1) * factor @ v

    return differentiated(attend, tuple(x.double() for x in tensors))


def by_pytorch(case: Case, tensors: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Written out in PyTorch with everything in the tensors' dtype.

    Its own written-out attention computes halves in fp32 and rounds once, which no kernel with
    tensor cores does: weights, and gradients of scores, are halves there.
    """
    window, outside = case.regions()

    def attend(q, k, v):
        scores = q @ k.transpose(-1, -2) / math.sqrt(case.head_dim)
        return torch.softmax(scores.masked_fill(~(window | outside), -torch.inf), -1) @ v

    return differentiated(attend, tensors)


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """Largest error of each tensor relative to its largest value; NaN counts as infinite."""
    found = {}
    for name, value in expected.items():
        size = float(value.abs().max())
        worst = (actual[name].double() - value).abs().nan_to_num(nan=torch.inf).max()
        found[name] = float(worst) / (size if size > 1e-12 else 1.0)
    return found


def score_scale(case: Case, tensors: tuple[torch.Tensor, ...]) -> dict[str, float]:
    """What the gradients of queries and keys are made of before anything cancels in them.

    The gradient of a score is P (dP - delta), the small difference of equal numbers where a query
    sees few keys.  fp32 keeps it to the rounding of dP, which this is, times the other factor.
    """
    q, k, v, d_out = (x.double() for x in tensors)
    largest = float((d_out @ v.mT).abs().max()) / math.sqrt(case.head_dim)
    return {"q": largest * float(k.abs().max()), "k": largest * float(q.abs().max())}


def assert_right(case: Case, dtype: torch.dtype = torch.float32) -> None:
    """Forward and every gradient keep the rule: 1e-6 in fp32, else twice PyTorch's error."""
    tensors = case.tensors(dtype)
    expected = exact(case, tensors)
    found = errors(by_triton(case, tensors), expected)
    if dtype == torch.float32:
        allowed = dict.fromkeys(NAMES, FP32_BOUND)
    else:
        # The interpreter cuts fp32 to bf16 where a GPU rounds.
        cut = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 and is_interpreted() else 0.0
        peer = errors(by_pytorch(case, tensors), expected)
        allowed = {name: 2 * peer[name] + cut for name in NAMES}
    wrong = {name: (found[name], allowed[name]) for name in NAMES if found[name] > allowed[name]}
    assert not wrong, wrong
