"""Three-region attention in Triton against fp64: forward, every gradient, regions and dropout.

Without a GPU the kernels are interpreted; results are NaN until a kernel has written them.
"""

import subprocess
import sys

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton")

from megatron_cogview.kernels.pivot_attention import launch, triton, triton_backward
from megatron_cogview.kernels.pivot_attention.operator import (
    dense_attention,
    plan_of,
    three_region_attention,
)
from megatron_cogview.kernels.pivot_attention.plan import dense_plan, make_plan
from megatron_cogview.kernels.pivot_attention.reference import kept_weights
from megatron_cogview.kernels.pivot_attention.sampler import draws, pivot_mask
from tests.kernels.pivot_attention_cases import (
    DEVICE,
    FP32_BOUND,
    NAMES,
    SETTINGS,
    Case,
    assert_right,
    by_triton,
    differentiated,
    errors,
    exact,
    score_scale,
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Results are NaN wherever no kernel writes."""

    def nan(shape, dtype, device):
        return torch.full(shape, torch.nan, dtype=dtype, device=device)

    for module in (launch, triton, triton_backward):
        monkeypatch.setattr(module, "unwritten", nan)


CASES = {
    "tiles and blocks fit": Case(48, 48, 64, given={"window_block": 16, "total_length": 48}),
    "odd blocks, length no multiple of a tile": Case(given={"window_block": 7, "window_blocks": 3}),
    "a head dim of 80, one head": Case(35, 35, 80, heads=1),
    "one token": Case(1, 1, texts=(1, 0), given={"window_blocks": 1}),
    "a window of one token": Case(30, 30, given={"window_block": 1, "window_blocks": 1}),
    "one block": Case(given={"window_block": 9, "window_blocks": 1}),
    "no pivots and no text": Case(texts=(0, 0), given={"num_pivots": 0}),
    "all pivots": Case(given={"num_pivots": 60}),
    "more text than places": Case(texts=(30, 13)),
    "few slots": Case(given={"max_text": 9}),
    "slots for the longest text": Case(texts=(30, 13), given={"max_text": 30}),
    "a window over everything": Case(given={"window_blocks": 7, "pivot_bias": 1.0}),
    "the last three tokens": Case(3, 50),
    "the last token": Case(1, 41),
    "the last 33 tokens": Case(33, 50, given={"window_block": 16, "window_blocks": 1}),
    "pivot bias": Case(given={"pivot_bias": 1.6}),
    "padding": Case(given={"padding_B2": torch.tensor([[2, 4], [7, 20]], device=DEVICE)}),
    "dropout": Case(given={"dropout": 0.3, "dropout_seed": 2**40 + 7}),
    "dropout, the last 19 tokens": Case(19, 50, given={"dropout": 0.3, "dropout_seed": 1}),
}

CANCELLING = Case(
    queries=1,
    keys=9,
    texts=(2,),
    scale=2.0,
    given={"total_length": 9, "window_block": 5, "window_blocks": 5, "num_pivots": 0},
)
"""One query whose weights are near 0 and 1."""


@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_in_fp32(name):
    assert_right(CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [40, 64])
def test_half_precision_is_at_most_twice_as_far_off_as_pytorch(dtype, head_dim):
    assert_right(Case(head_dim=head_dim), dtype)


@pytest.mark.parametrize("given", [{"num_pivots": 60}, {"window_blocks": 8}])
def test_all_pivots_or_a_whole_window_is_dense_attention(given):
    case = Case(given=given)
    tensors = case.tensors()
    causal = differentiated(
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True),
        tuple(x.double() for x in tensors),
    )
    dense = differentiated(
        lambda q, k, v: dense_attention(q, k, v, implementation="triton"), tensors
    )
    for actual in (dense, by_triton(case, tensors)):
        assert max(errors(actual, causal).values()) < FP32_BOUND


def test_the_reference_is_the_same_function():
    given = {"pivot_bias": 0.7, "dropout": 0.3, "dropout_seed": 5}
    for case in (Case(given=given), Case(3, 50, given=given)):
        tensors = case.tensors()
        reference = differentiated(
            lambda q, k, v, case=case: three_region_attention(
                q, k, v, case.pivot_key_B2, implementation="reference", **case.settings
            ),
            tensors,
        )
        assert max(errors(reference, exact(case, tensors)).values()) < FP32_BOUND
    q, k, v, _ = tensors
    written_out, fast = (
        dense_attention(q, k, v, dropout=0.2, dropout_seed=4, implementation=name)
        for name in ("reference", "triton")
    )
    torch.testing.assert_close(fast, written_out, rtol=0, atol=2e-6)


@pytest.mark.parametrize("known", [50, 33, 20])
def test_decoding_repeats_the_rows_of_training(known):
    q, k, v, _ = Case().tensors()
    key_B2 = Case().pivot_key_B2

    def attend(first, last):
        return three_region_attention(
            *(q[:, :, first:last], k[:, :, :last], v[:, :, :last], key_B2),
            implementation="triton",
            **SETTINGS,
        )

    whole = attend(0, 50)
    for queries in (1, 3):
        rows = attend(known - queries, known)
        torch.testing.assert_close(rows, whole[:, :, known - queries : known], rtol=0, atol=1e-6)


def test_scores_that_overflow_fp16_are_finite_and_right():
    """The scores are fp32 accumulators, so Eq. 4's alpha is not needed (P-STAB-6)."""
    case = Case(head_dim=64)
    g = torch.Generator().manual_seed(4)
    q, k, v, d_out = case.tensors(torch.float16)
    q, k = (
        (x.sign() * (150 + 350 * torch.rand(x.shape, generator=g).to(DEVICE))).half()
        for x in (q, k)
    )
    assert not torch.isfinite(q @ k.transpose(-1, -2)).all()
    actual = by_triton(case, (q, k, v, d_out))
    assert all(torch.isfinite(actual[name]).all() for name in NAMES)
    expected = exact(case, (q, k, v, d_out))
    found = errors(actual, expected)
    # Each weight is 0 or 1 but for near-ties; gradients of scores vanish, and V's is a sum of rows.
    assert found["out"] < 1e-3
    assert found["v"] < 1e-3


def test_layouts_in_memory_do_not_matter():
    case = Case(35, 35)
    tensors = case.tensors()
    plain = by_triton(case, tensors)
    batch_first = by_triton(case, tuple(x.contiguous() for x in tensors))
    qkv_SBNE = torch.cat([x.permute(2, 0, 1, 3) for x in tensors[:3]], -1)
    parts = tuple(x.permute(1, 2, 0, 3) for x in qkv_SBNE.chunk(3, -1))
    fused = by_triton(case, (*parts, tensors[3].mT.contiguous().mT))
    for name in NAMES:
        assert torch.equal(plain[name], batch_first[name]), name
        assert torch.equal(plain[name], fused[name]), name
        assert plain[name].permute(2, 0, 1, 3).is_contiguous(), name


def test_two_runs_agree_bit_by_bit_and_so_does_recomputation():
    case = Case(35, 35, heads=1, given={"dropout": 0.2, "dropout_seed": 9})
    tensors = case.tensors(torch.float16)

    def attend(q, k, v):
        return three_region_attention(
            q, k, v, case.pivot_key_B2, implementation="triton", **case.settings
        )

    first, second = (differentiated(attend, tensors) for _ in range(2))
    again = differentiated(
        lambda q, k, v: checkpoint(attend, q, k, v, use_reentrant=False), tensors
    )
    for name in NAMES:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(first[name], again[name]), name


@pytest.mark.parametrize("tiles", [(16, 16), (32, 16), (16, 64)])
def test_dropout_drops_what_the_reference_drops_whatever_the_tiles(monkeypatch, tiles):
    """Values that are unit vectors show the weights themselves."""
    monkeypatch.setattr(launch, "INTERPRETED", launch.Launch(*tiles, 1, 1))
    monkeypatch.setattr(launch, "_FULL", launch.Launch(*tiles, 4, 1))
    case = Case(head_dim=64, given={"dropout": 0.4, "dropout_seed": 3})
    q, k, _, _ = case.tensors()
    v = torch.eye(50, 64, device=DEVICE).expand(2, 2, -1, -1).contiguous()
    out = three_region_attention(
        q, k, v, case.pivot_key_B2, implementation="triton", **case.settings
    )
    window, outside = case.regions()
    kept = kept_weights((2, 2, 50, 50), 0.4, 3, 0, 0, DEVICE)
    assert torch.equal(out[..., :50] > 0, kept & (window | outside))
    assert kept.double().mean() == pytest.approx(0.6, abs=0.02)


def test_dropout_does_not_depend_on_how_heads_and_samples_are_spread():
    case = Case(given={"dropout": 0.4, "dropout_seed": 3})
    q, k, v, _ = case.tensors()

    def attend(samples, heads):
        return three_region_attention(
            *(x[samples, heads] for x in (q, k, v)),
            case.pivot_key_B2[samples],
            batch_offset=samples.start,
            head_offset=heads.start,
            implementation="triton",
            **case.settings,
        )

    both = slice(0, 2)
    whole = attend(both, both)
    assert torch.equal(attend(both, slice(1, 2)), whole[:, 1:])
    assert torch.equal(attend(slice(1, 2), both), whole[1:])
    assert not torch.equal(attend(both, slice(0, 1)) == 0, whole[:, 1:] == 0)


def test_the_operator_keeps_pytorch_s_contract():
    case = Case(18, 20, 16, heads=1, given={"total_length": 20, "window_block": 4})
    plan = make_plan(case.pivot_key_B2, 20, num_pivots=12, layer_number=3, seed=1)
    padding_B2 = torch.tensor([[2, 4], [0, 0]], dtype=torch.int32, device=DEVICE)
    tensors = [x.requires_grad_() for x in case.tensors()[:3]]
    for rest in (
        (*plan, padding_B2, 4, 2, 0.5, 0.1, 7, 0, 0),
        (*dense_plan(2, DEVICE), None, 1 << 30, 1, 0.0, 0.0, 0, 0, 0),
    ):
        torch.library.opcheck(torch.ops.cogview.three_region_attention.default, (*tensors, *rest))


def test_torch_compile_traces_through_the_plan_and_the_operator():
    """In one graph, the choice of the implementation included."""
    case = Case(18, 20, 16, heads=1, given={"dropout": 0.2, "dropout_seed": 3})
    tensors = case.tensors()

    def attend(q, k, v):
        return three_region_attention(
            q, k, v, case.pivot_key_B2, implementation="triton", **case.settings
        )

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    plain, traced = (differentiated(f, tensors) for f in (attend, compiled))
    for name in NAMES:
        assert torch.equal(plain[name], traced[name]), name


def test_the_plan_lists_the_chosen_positions_and_finds_them_again():
    case = Case(texts=(30, 2))
    plan = make_plan(case.pivot_key_B2, 60, num_pivots=12, layer_number=3, seed=1, max_text=30)
    window, outside = Case(60, 60, texts=(30, 2), given={"window_block": 1}).regions()
    for b, chosen in enumerate((window | outside)[:, 0, 59]):
        # The last token's window is two tokens; the rest of its row is text and pivots.
        positions = [p for p in plan.slots_BP[b].tolist() if p < 58]
        assert positions == torch.nonzero(chosen[:58]).flatten().tolist()
        for key in range(41):
            assert int(plan.slots_before_BL[b, key]) == sum(p < key for p in positions)
            slot = positions.index(key) if key in positions else -1
            assert int(plan.slot_of_key_BL[b, key]) == slot
    assert plan.slots_BP.shape == (2, 30)


@pytest.mark.parametrize("padding", [None, [[3, 9], [0, 0], [60, 77]]])
def test_the_kernel_draws_what_the_sampler_draws(padding):
    """Bit by bit, whatever wraps around: large sample numbers, seeds and layers."""
    from megatron_cogview.kernels.pivot_attention import triton_sampler

    key_B2 = torch.tensor([[0, 7], [(1 << 62) + 5, 0], [123_456_789_012, 77]], device=DEVICE)
    padding_B2 = None if padding is None else torch.tensor(padding, device=DEVICE)
    for length, layer, seed in ((77, 3, 1), (1300, 48, (1 << 63) - 1), (1, 1, 0)):
        drawn = triton_sampler.draws(key_B2, length, layer, seed, padding_B2)
        assert torch.equal(drawn, draws(key_B2, length, layer, seed, padding_B2))
    torch.library.opcheck(triton_sampler.draws, (key_B2, 20, 3, 1, padding_B2))


def test_a_plan_made_once_serves_every_step_of_decoding():
    case = Case(queries=3, keys=50)
    q, k, v, _ = case.tensors()
    drawn = {name: case.settings[name] for name in ("num_pivots", "layer_number", "seed")}
    plan = plan_of(case.pivot_key_B2, 60, max_text=9, **drawn)
    for known in (20, 41, 50):
        given = (q, k[:, :, :known], v[:, :, :known], case.pivot_key_B2)
        settings = {**SETTINGS, "max_text": 9, "implementation": "triton"}
        made_anew = three_region_attention(*given, **settings)
        assert torch.equal(three_region_attention(*given, plan=plan, **settings), made_anew)


def test_sums_of_the_softmax_have_no_gradient():
    """They are for the backward pass; a gradient of zero would be a silent mistake."""
    case = Case(18, 20, 16, heads=1)
    q, k, v, _ = (x.requires_grad_() for x in case.tensors())
    plan = dense_plan(2, DEVICE)
    operator = torch.ops.cogview.three_region_attention.default
    out, lse = operator(q, k, v, *plan, None, 1 << 30, 1, 0.0, 0.0, 0, 0, 0)
    assert out.requires_grad
    assert not lse.requires_grad


def test_where_gradients_of_scores_cancel_the_error_is_that_of_what_cancels():
    tensors = CANCELLING.tensors()
    expected, found = exact(CANCELLING, tensors), by_triton(CANCELLING, tensors)
    for name, scale in score_scale(CANCELLING, tensors).items():
        worst = (found[name].double() - expected[name]).abs().max()
        assert worst < FP32_BOUND * scale, name


@pytest.mark.gpu
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sizes_that_training_uses(dtype, dropout):
    """Several tiles of 128 queries, and blocks of 128, of which the kernels skip the mask."""
    given = {"total_length": 1100, "window_block": 128, "window_blocks": 3, "num_pivots": 200}
    case = Case(1100, 1100, 64, given={**given, "dropout": dropout, "dropout_seed": 3})
    tensors = case.tensors(dtype)
    found = errors(by_triton(case, tensors), exact(case, tensors))
    assert max(found.values()) < 8 * torch.finfo(dtype).eps, found
    first, second = (by_triton(case, tensors) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in NAMES)


def test_padding_cell_by_cell():
    """Nobody sees padding but its own tokens themselves, and it takes no place of a pivot."""
    padding_B2 = torch.tensor([[2, 4], [7, 20]], device=DEVICE)
    case = Case(60, 60, given={"padding_B2": padding_B2})
    window, outside = case.regions()
    visible = (window | outside)[:, 0]
    chosen = pivot_mask(case.pivot_key_B2, 60, 12, 3, 1, padding_B2=padding_B2)
    assert chosen.sum(1).tolist() == [12, 12]
    for b, (first, behind) in enumerate(padding_B2.tolist()):
        inside = torch.zeros(60, dtype=torch.bool, device=DEVICE)
        inside[first:behind] = True
        assert not (chosen[b] & inside).any()
        assert chosen[b, : case.texts[b]].logical_or(inside[: case.texts[b]]).all()
        assert torch.equal(visible[b][:, inside], torch.eye(60, device=DEVICE).bool()[:, inside])
    everything = pivot_mask(case.pivot_key_B2, 60, 60, 3, 1, padding_B2=padding_B2)
    assert everything.sum(1).tolist() == [58, 47]


def test_pivots_do_not_depend_on_the_batch():
    key_B2 = torch.tensor([[5, 4], [6, 9], [7, 0]], device=DEVICE)
    order = torch.tensor([2, 0, 1], device=DEVICE)
    whole = pivot_mask(key_B2, 60, 12, 3, 1)
    assert torch.equal(pivot_mask(key_B2[order], 60, 12, 3, 1), whole[order])
    assert torch.equal(pivot_mask(key_B2[1:2], 60, 12, 3, 1), whole[1:2])


def test_what_does_not_fit_is_refused():
    case = Case()
    q, k, v, _ = case.tensors()
    key_B2 = case.pivot_key_B2

    def refused(match, *tensors, **given):
        with pytest.raises(ValueError, match=match):
            three_region_attention(*tensors, implementation="triton", **{**SETTINGS, **given})

    refused("total_length = 49 is less than 50", q, k, v, key_B2, total_length=49)
    refused("must be at least 1", q, k, v, key_B2, window_block=0)
    refused("last tokens of the keys", q, k[:, :, :9], v[:, :, :9], key_B2)
    refused("differ", q, k.half(), v, key_B2)
    refused("expected pivot keys", q, k, v, key_B2[:1])
    many = [x[:, :1].expand(-1, 40_000, -1, -1) for x in (q, k, v)]
    refused("2 samples of 40000 heads", *many, key_B2)
    refused("dropout = 1.0", q, k, v, key_B2, dropout=1.0)
    refused("choose the reference", q.double(), k.double(), v.double(), key_B2)
    if DEVICE.type == "cpu":  # on a GPU this ends the process
        with pytest.raises(RuntimeError, match="more than max_text = 8"):
            make_plan(key_B2, 60, num_pivots=12, layer_number=3, seed=1, max_text=8)


def test_the_reference_needs_no_triton():
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from megatron_cogview.kernels.pivot_attention.operator import dense_attention\n"
        "x = torch.ones(1, 1, 3, 8)\n"
        "assert dense_attention(x, x, x).allclose(x)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
