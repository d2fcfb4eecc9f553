"""Every attention that may stand in for Eq. 4 is at least as safe from overflow, and as right.

README.md of kernels/pb_relax_attention has the proof; these are scores at which plain half
precision fails.
"""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_cogview.kernels.pb_relax_attention.reference import (
    FUSED_BACKENDS,
    causal_mask,
    fused_attention,
    pb_relax_attention,
)
from megatron_cogview.kernels.pivot_attention.operator import dense_attention

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTH, HEAD_DIM = 70, 64
SAFE = {
    "Eq. 4": lambda q, k, v: pb_relax_attention(
        q, k, v, causal_mask(LENGTH, LENGTH, DEVICE), 32.0, "row"
    ),
    "auto": fused_attention,
    "our kernel": lambda q, k, v: dense_attention(q, k, v, implementation="triton"),
}
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def inputs(magnitude: float) -> tuple[torch.Tensor, ...]:
    """fp16 queries and keys whose numbers are about as large, values, and a gradient."""
    g = torch.Generator().manual_seed(4)
    shape = (2, 2, LENGTH, HEAD_DIM)
    q, k, v, d_out = (torch.randn(shape, generator=g) for _ in range(4))
    q, k = (x.sign() * magnitude * (1 + torch.rand(shape, generator=g)) for x in (q, k))
    return tuple(x.to(DEVICE, torch.float16) for x in (q, k, v, d_out))


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = q @ k.mT / math.sqrt(HEAD_DIM)
    visible = causal_mask(LENGTH, LENGTH, DEVICE)
    return torch.softmax(scores.masked_fill(~visible, -torch.inf), -1) @ v


def with_gradients(attend: Attend, tensors: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    *qkv, d_out = tensors
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, d_out)]


def assert_safe(attend: Attend) -> None:
    """Right where the scores of plain attention, and their sums, are beyond 65,504."""
    q, k, v, d_out = inputs(150.0)
    assert not torch.isfinite(torch.softmax(q @ k.mT / math.sqrt(HEAD_DIM), -1)).all()
    found = with_gradients(attend, (q, k, v, d_out))
    expected = with_gradients(exact, tuple(x.double() for x in (q, k, v, d_out)))
    for got in found:
        assert torch.isfinite(got).all()
        assert got.dtype == torch.float16
    # Weights are 0 or 1 but for near-ties, so outputs and values' gradients are sums of rows; the
    # others are all but zero.
    for got, wanted in ((found[0], expected[0]), (found[3], expected[3])):
        assert (got.double() - wanted).abs().max() < 2e-3 * wanted.abs().max()


@pytest.mark.parametrize("name", SAFE)
def test_scores_beyond_fp16(name: str) -> None:
    assert_safe(SAFE[name])


@pytest.mark.gpu
@pytest.mark.parametrize("backend", FUSED_BACKENDS, ids=lambda backend: backend.name)
def test_each_library_kernel_that_auto_may_take(backend: SDPBackend) -> None:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel([backend]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    try:
        attend(*inputs(1.0)[:3])
    except RuntimeError as error:
        pytest.skip(f"{backend.name}: {error}")
    assert_safe(attend)


def test_scores_beyond_what_eq_4_survives() -> None:
    """Eq. 4 stores scores / 32, which overflow at 32 times the size; an accumulator does not."""
    q, k, v, _d_out = inputs(1500.0)
    eq_4 = SAFE["Eq. 4"](q, k, v)
    assert not torch.isfinite(eq_4).all()
    for name in ("auto", "our kernel"):
        out = SAFE[name](q, k, v)
        wanted = exact(q.double(), k.double(), v.double())
        assert (out.double() - wanted).abs().max() < 2e-3 * wanted.abs().max(), name


def test_the_three_agree_where_nothing_overflows() -> None:
    tensors = inputs(0.5)
    expected = with_gradients(exact, tuple(x.double() for x in tensors))
    for name, attend in SAFE.items():
        for got, wanted in zip(with_gradients(attend, tensors), expected, strict=True):
            assert (got.double() - wanted).abs().max() < 4e-3 * wanted.abs().max(), name
