"""Largest sizes and scores of single tensors, against plain arithmetic."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from megatron_cogview.configs.model import AttentionConfig
from megatron_cogview.kernels.pivot_attention.reference import visible_keys
from megatron_cogview.model import watch
from megatron_cogview.model.attention import CogViewCoreAttention
from megatron_cogview.model.watch import largest_score, largest_size

PIVOT = AttentionConfig(kind="pivot", window_block=4, window_blocks=1, num_pivots=5)


def inputs(queries=19, keys=19, dtype=torch.float32):
    g = torch.Generator().manual_seed(6)
    query = torch.randn(queries, 3, 2, 5, generator=g).to(dtype)
    return query, torch.randn(keys, 3, 2, 5, generator=g).to(dtype)


def core(attention):
    found = SimpleNamespace(attention=attention, layer_number=3, sequence_length=19)
    found.visible = partial(CogViewCoreAttention.visible, found)
    return found


def direct(query, key, visible):
    scores = torch.einsum("sbnd,kbnd->bnsk", query.double(), key.double()) / math.sqrt(5)
    return scores.abs().masked_fill(~visible, 0).max().item()


@pytest.mark.parametrize("at_once", [1, 2 * 19 * 7, 2**24])
@pytest.mark.parametrize("queries", [1, 7, 19])
def test_scores_of_dense_attention_in_parts_of_any_size(monkeypatch, at_once, queries):
    monkeypatch.setattr(watch, "SCORES_AT_ONCE", at_once)
    query, key = inputs(queries)
    # Seen by the last query alone.
    key[-1] *= 10
    visible = torch.arange(19)[None] <= torch.arange(19 - queries, 19)[:, None]
    found = largest_score(core(AttentionConfig()), query, key, None)
    assert found.item() == pytest.approx(direct(query, key, visible), rel=1e-6)


def test_scores_of_keys_that_nobody_sees_do_not_count():
    query, key = inputs()
    pivot_key_B2 = torch.tensor([[1, 3], [2, 5], [3, 2]])
    visible = visible_keys(
        pivot_key_B2,
        19,
        19,
        19,
        window_block=4,
        window_blocks=1,
        num_pivots=5,
        layer_number=3,
        seed=PIVOT.pivot_seed,
    )
    causal = torch.ones(19, 19, dtype=torch.bool).tril()
    # A large key, and those of its queries that see it ask for nothing.
    hidden = int((causal & ~visible[0, 0])[-1].nonzero()[0])
    key[hidden, 0] *= 100
    query[visible[0, 0, :, hidden], 0] = 0.0
    expected = direct(query, key, visible)
    assert expected < 0.1 * direct(query, key, causal)
    found = largest_score(core(PIVOT), query, key, pivot_key_B2)
    assert found.item() == pytest.approx(expected, rel=1e-6)
    # Dense: the first ten queries see ten keys, and the others ask for nothing.
    query[10:], key[10:] = 0.0, 1e30
    found = largest_score(core(AttentionConfig()), query, key, None)
    assert found.item() == pytest.approx(direct(query, key, causal), rel=1e-6)
    assert found.item() < 1e6


def test_scores_beyond_half_precision_are_seen():
    query, key = inputs(dtype=torch.float16)
    found = largest_score(core(AttentionConfig()), query * 300, key * 300, None)
    assert 65504 < found.item() < math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_sizes(dtype):
    x = torch.tensor([[1.0, -7.5], [3.0, 0.0]], dtype=dtype)
    assert largest_size(x).item() == 7.5
    x[0, 0] = math.nan
    assert math.isnan(largest_size(x).item())
    x[0, 0] = -math.inf
    assert largest_size(x).item() == math.inf
