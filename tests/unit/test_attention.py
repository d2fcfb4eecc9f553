"""PB-relax attention, the pivot sampler and its key sets, against fp64 and against each other."""

import math

import pytest
import torch

from megatron_cogview.kernels.pb_relax_attention.reference import (
    causal_mask,
    fused_attention,
    fused_is_safe,
    pb_relax_attention,
)
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask

NAMES = ("q", "k", "v")


def inputs(dtype=torch.float32, scale=1.0, queries=7, keys=13):
    g = torch.Generator().manual_seed(2)

    def tensor(length):
        return (torch.randn(2, 3, length, 20, generator=g) * scale).to(dtype).requires_grad_()

    return tensor(queries), tensor(keys), tensor(keys)


def exact(q, k, v, visible):
    """Softmax attention in fp64."""
    scores = q.double() @ k.double().transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), -1) @ v.double()


def gradients(out, tensors):
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((out * weight.to(out.dtype)).sum(), tensors)


@pytest.mark.parametrize("alpha", [1.0, 32.0])
@pytest.mark.parametrize("relax_max", ["row", "head"])
def test_eq_4_is_softmax_attention_forward_and_backward(alpha, relax_max):
    tensors = inputs()
    visible = causal_mask(7, 13, torch.device("cpu"))
    actual = pb_relax_attention(*tensors, visible, alpha, relax_max)
    expected = exact(*tensors, visible)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)
    pairs = zip(NAMES, gradients(actual, tensors), gradients(expected, tensors), strict=True)
    for name, a, b in pairs:
        assert (a.double() - b).abs().max() < 5e-6, name


@pytest.mark.parametrize("queries", [1, 7, 13])
def test_fused_attention_is_causal_attention_of_the_last_tokens(queries):
    tensors = inputs(queries=queries)
    expected = exact(*tensors, causal_mask(queries, 13, torch.device("cpu")))
    actual = fused_attention(*tensors)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=2e-6)
    pairs = zip(NAMES, gradients(actual, tensors), gradients(expected, tensors), strict=True)
    for name, a, b in pairs:
        assert (a.double() - b).abs().max() < 5e-6, name


def test_scores_that_overflow_plain_fp16_survive_eq_4_and_the_fused_kernel():
    """|Q K / sqrt d| above 65,504: plain attention is NaN or inf, Eq. 4 is right (P-STAB-6)."""
    q, k, v = (t.detach() for t in inputs(torch.float16, 150.0, 13, 13))
    visible = causal_mask(13, 13, q.device)
    plain = (q @ k.transpose(-1, -2)).masked_fill(~visible, float("-inf")) / math.sqrt(20)
    assert not torch.isfinite(torch.softmax(plain, -1)).all()
    expected = exact(q, k, v, visible)
    size = expected.abs().max()
    for out in (pb_relax_attention(q, k, v, visible, 32.0, "row"), fused_attention(q, k, v)):
        assert out.dtype == torch.float16
        assert torch.isfinite(out).all()
        assert (out.double() - expected).abs().max() < 2e-3 * size


def test_one_row_far_below_the_others_needs_the_row_maximum():
    """Head-wise, a row 65,504 below the head's maximum has only -inf left in fp16 (OP-15)."""
    q, k, v = (t.detach() for t in inputs(torch.float16, 150.0, 13, 13))
    q[:, :, 0] = -k[:, :, 0]  # the first row sees one key only, here with a very negative score
    q[:, :, 1] = k[:, :, 1]
    visible = causal_mask(13, 13, q.device)
    assert torch.isfinite(pb_relax_attention(q, k, v, visible, 3.0, "row")).all()
    assert not torch.isfinite(pb_relax_attention(q, k, v, visible, 3.0, "head")).all()


def test_half_precision_with_dropout_on_a_cpu_has_no_safe_fused_kernel():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert fused_is_safe(torch.float32, cpu, 0.1)
    assert fused_is_safe(torch.float16, cpu, 0.0)
    assert not fused_is_safe(torch.float16, cpu, 0.1)
    assert fused_is_safe(torch.bfloat16, cuda, 0.1)
    q, k, v = (t.detach() for t in inputs(torch.float16))
    with pytest.raises(RuntimeError, match="No available kernel"):
        fused_attention(q, k, v, dropout=0.5)


def test_attention_dropout_keeps_the_mean():
    torch.manual_seed(0)
    q, k, _ = (t.detach() for t in inputs(queries=13))
    v = torch.ones(2, 3, 13, 20)
    visible = causal_mask(13, 13, q.device)
    runs = [pb_relax_attention(q, k, v, visible, 32.0, "row", 0.3).mean() for _ in range(300)]
    assert torch.stack(runs).mean() == pytest.approx(1.0, abs=0.02)
    assert torch.stack(runs).std() > 0.01


KEY = torch.tensor([[5, 4], [6, 9], [7, 0]])
SETTINGS = {"window_block": 4, "window_blocks": 2, "num_pivots": 10, "layer_number": 3, "seed": 1}


def by_hand(sample, text, query, key, length, window_block, window_blocks, **sampler):
    """One cell of the mask, from the paper's words."""
    if key > query:
        return False
    pivots = pivot_mask(torch.tensor([[sample, text]]), length, **sampler)[0]
    in_window = key // window_block > query // window_block - window_blocks
    return in_window or bool(pivots[key])


def test_key_sets_cell_by_cell():
    length = 23
    mask = visible_keys(KEY, length, length, length, **SETTINGS)
    assert mask.shape == (3, 1, length, length)
    for b, (sample, text) in enumerate(KEY.tolist()):
        for query in range(length):
            for key in range(length):
                expected = by_hand(sample, text, query, key, length, **SETTINGS)
                assert bool(mask[b, 0, query, key]) == expected, (b, query, key)


def test_decoding_sees_the_keys_of_training():
    length = 23
    whole = visible_keys(KEY, length, length, length, **SETTINGS)
    for known in (5, 12, 23):
        step = visible_keys(KEY, 1, known, length, **SETTINGS)
        assert torch.equal(step, whole[:, :, known - 1 : known, :known])


def test_pivots_keep_all_text_and_fill_up_to_their_number():
    for text in (0, 4, 10, 14):
        mask = pivot_mask(torch.tensor([[3, text]]), 40, 10, 1, 7)[0]
        assert mask[:text].all()
        assert int(mask.sum()) == max(10, text)
    assert pivot_mask(torch.tensor([[3, 0]]), 40, 40, 1, 7).all()
    assert not pivot_mask(torch.tensor([[3, 0]]), 40, 0, 1, 7).any()


def test_pivots_are_uniform_and_fresh_at_every_layer_sample_and_seed():
    keys = torch.stack([torch.arange(4000), torch.zeros(4000, dtype=torch.int64)], 1)
    first = pivot_mask(keys, 64, 16, 1, 7)
    counts = first.sum(0).double()
    expected = 4000 * 16 / 64
    # Chi-square of 63 degrees of freedom; sampling without replacement shrinks it by 48/64.
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert 25 < chi2 < 90, chi2
    for other in (pivot_mask(keys, 64, 16, 2, 7), pivot_mask(keys, 64, 16, 1, 8)):
        overlap = float((first & other).sum(1).double().mean())
        assert overlap == pytest.approx(16 * 16 / 64, abs=0.15)
    neighbours = float((first[1:] & first[:-1]).sum(1).double().mean())
    assert neighbours == pytest.approx(16 * 16 / 64, abs=0.15)
    assert torch.equal(first, pivot_mask(keys, 64, 16, 1, 7))
