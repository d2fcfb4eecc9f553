"""PB-relax LayerNorm and the gradient-scaling identity."""

import pytest
import torch
import torch.nn.functional as F

from megatron_cogview.kernels.scaled_layer_norm.reference import scaled_layer_norm
from megatron_cogview.model.embedding import scale_gradient


def case(dtype=torch.float64, scale=1.0):
    g = torch.Generator().manual_seed(4)
    x = (torch.randn(5, 3, 40, generator=g, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(40, generator=g, dtype=torch.float64).to(dtype)
    bias = torch.randn(40, generator=g, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


def test_relaxation_is_a_rescaled_epsilon_forward_and_backward():
    """LN(x / m; eps) = LN(x; eps m^2) with m held fixed, token by token."""
    x, weight, bias = case()
    actual = scaled_layer_norm(x, weight, bias, 1e-5, "token_max")
    m = x.detach().abs().amax(-1, keepdim=True)
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    expected = (x - mean) / torch.sqrt(variance + 1e-5 * m**2) * weight + bias
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    for name, a, b in zip(
        ("x", "weight", "bias"),
        torch.autograd.grad((actual * g).sum(), (x, weight, bias)),
        torch.autograd.grad((expected * g).sum(), (x, weight, bias)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=name)


def test_rules():
    x, weight, bias = (t.detach() for t in case())
    plain = F.layer_norm(x, (40,), weight, bias, 1e-5)
    assert torch.equal(scaled_layer_norm(x, weight, bias, 1e-5, "none"), plain)
    whole = F.layer_norm(x / (x.abs().max() / 8), (40,), weight, bias, 1e-5)
    torch.testing.assert_close(
        scaled_layer_norm(x, weight, bias, 1e-5, "tensor_max_over_8"), whole, rtol=1e-12, atol=0
    )
    # The whole-tensor rule makes a token depend on its batch mates; the token rule does not.
    for rule, independent in (("token_max", True), ("tensor_max_over_8", False)):
        alone = scaled_layer_norm(x[:, :1], weight, bias, 1e-2, rule)
        together = scaled_layer_norm(x, weight, bias, 1e-2, rule)[:, :1]
        assert torch.equal(alone, together) == independent, rule


@pytest.mark.parametrize("rule", ["token_max", "tensor_max_over_8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_zero_input_gives_the_bias(rule, dtype):
    _, weight, bias = (t.detach() for t in case(dtype))
    out = scaled_layer_norm(torch.zeros(5, 3, 40, dtype=dtype), weight, bias, 1e-5, rule)
    torch.testing.assert_close(out, bias.expand(5, 3, 40))


def test_an_fp16_sum_of_squares_that_overflows_does_not_after_relaxation():
    """Deep layers reach 1e4..1e5, whose variance overflows fp16 (P-STAB-2)."""
    x, weight, bias = (t.detach() for t in case(torch.float16, 1.5e4))
    assert torch.isinf((x * x).mean(-1)).any()
    relaxed = x / x.abs().amax(-1, keepdim=True)
    assert torch.isfinite((relaxed * relaxed).mean(-1)).all()
    out = scaled_layer_norm(x, weight, bias, 1e-5, "token_max")
    exact = F.layer_norm(x.double(), (40,), weight.double(), bias.double(), 1e-5)
    assert (out.double() - exact).abs().max() < 2e-2


def test_embedding_gradient_shrink_is_the_papers_formula():
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    shrunk = scale_gradient(x, 0.1)
    assert torch.equal(shrunk, x)
    papers = x * 0.1 + x.detach() * 0.9
    torch.testing.assert_close(
        torch.autograd.grad(shrunk.square().sum(), x)[0],
        torch.autograd.grad(papers.square().sum(), x)[0],
    )
    assert scale_gradient(x, 1.0) is x
