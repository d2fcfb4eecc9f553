"""The kernel benchmark: peers compute what ours computes, and nothing that fails goes unseen."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from megatron_cogview.analysis import timing
from megatron_cogview.analysis.kernel_speed import attention, by_rows, cases, peers
from megatron_cogview.analysis.kernel_speed.gathered import GatheredPrefix
from megatron_cogview.analysis.kernel_speed.materialised import pivot_positions, sparse_attention
from megatron_cogview.analysis.kernel_speed.peers import (
    OUT_OF_MEMORY,
    Case,
    NotAvailable,
    Peer,
    measure,
)
from megatron_cogview.analysis.kernel_speed.sizes import Sizes
from megatron_cogview.kernels.pivot_attention.plan import FAR
from megatron_cogview.kernels.pivot_attention.reference import masked_attention, visible_keys
from megatron_cogview.kernels.pivot_attention.sampler import pivot_mask

CPU = torch.device("cpu")
# Length, W, T, P, text of each sample: more text than pivots, no pivots far away, one block seen,
# one block in all.
SHAPES = [
    (64, 8, 2, 20, (3, 40)),
    (96, 16, 3, 30, (10, 0)),
    (48, 8, 1, 12, (5, 5)),
    (32, 32, 2, 8, (4, 9)),
]


def problem(
    shape: tuple[int, int, int, int, tuple[int, int]], dtype: torch.dtype
) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    """Queries, keys and values; pivots; what the reference sees."""
    length, block, blocks, num_pivots, texts = shape
    torch.manual_seed(length)
    qkv = [torch.randn(2, 3, length, 8, dtype=dtype, requires_grad=True) for _ in range(3)]
    key_B2 = torch.tensor([[11, texts[0]], [5, texts[1]]])
    drawn: dict[str, Any] = {"num_pivots": num_pivots, "layer_number": 3, "seed": 17}
    visible = visible_keys(
        key_B2, length, length, length, window_block=block, window_blocks=blocks, **drawn
    )
    return qkv, pivot_positions(pivot_mask(key_B2, length, **drawn)), visible


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-13), (torch.float32, 2e-6)])
def test_the_original_algorithm_sees_what_ours_sees(
    shape: Any, dtype: torch.dtype, apart: float
) -> None:
    """Forward and every gradient, against the reference's dense mask."""
    qkv, pivot_BP, visible = problem(shape, dtype)
    wanted = masked_attention(*qkv, visible)
    found = sparse_attention(*qkv, pivot_BP, *shape[1:3])
    gradient = torch.randn_like(wanted)
    assert peers.relative_error((found,), (wanted,)) < apart
    for one, other in zip(
        torch.autograd.grad(found, qkv, gradient),
        torch.autograd.grad(wanted, qkv, gradient),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=apart * float(other.abs().max()))


def test_the_original_algorithm_s_bias_is_on_pivots_before_the_window_alone() -> None:
    qkv, pivot_BP, visible = problem(SHAPES[0], torch.float64)
    length, block, blocks = SHAPES[0][:3]
    query_S1 = torch.arange(length)[:, None]
    outside = torch.arange(length) < (query_S1 // block - blocks + 1) * block
    wanted = masked_attention(*qkv, visible, bias=1.5 * outside)
    found = sparse_attention(*qkv, pivot_BP, block, blocks, pivot_bias=1.5)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


def test_the_original_algorithm_takes_whole_blocks_only() -> None:
    qkv = [torch.zeros(1, 1, 20, 4) for _ in range(3)]
    with pytest.raises(ValueError, match=r"20 tokens.*multiples of its block of 8"):
        sparse_attention(*qkv, torch.zeros(1, 1, dtype=torch.int64), 8, 2)


def test_places_without_a_pivot_lie_behind_every_query() -> None:
    chosen_BS = torch.tensor([[True, False, True, True], [False, False, True, False]])
    assert pivot_positions(chosen_BS).tolist() == [[0, 2, 3], [2, FAR, FAR]]


@pytest.mark.filterwarnings("ignore:.*flex_attention called without")
@pytest.mark.parametrize("shape", [*SHAPES, (41, 8, 2, 12, (2, 6))])
def test_gathered_prefix_sees_what_ours_sees(shape: Any) -> None:
    """Key by key, and as attention; also where blocks do not divide the length."""
    qkv, pivot_BP, visible = problem(shape, torch.float32)
    length, slots = shape[0], pivot_BP.shape[1]
    prefix = GatheredPrefix(pivot_BP, length, *shape[1:3])
    # How often a query sees each key: through its place and through those of pivots.
    seen = torch.zeros(2, length, length)
    query, place = torch.arange(length)[:, None], torch.arange(slots + length)[None]
    for sample in range(2):
        sees = prefix.sees(torch.tensor(sample), torch.tensor(0), query, place)
        key = torch.cat([pivot_BP[sample].clamp(max=length - 1), torch.arange(length)])
        seen[sample].index_add_(1, key, sees.float())
    assert torch.equal(seen, visible[:, 0].float())
    with torch.no_grad():
        found = prefix.attention(*(x.detach() for x in qkv), prefix.mask())
    assert peers.relative_error((found,), (masked_attention(*qkv, visible),)) < 1e-6


def test_pairs_are_those_of_the_reference() -> None:
    for shape in SHAPES:
        length, block, blocks, num_pivots, texts = shape
        key_B2 = torch.tensor([[11, texts[0]], [5, texts[1]]])
        chosen_BS = pivot_mask(key_B2, length, num_pivots, 3, 17)
        visible = problem(shape, torch.float32)[2]
        assert attention.three_region_pairs(chosen_BS, block, blocks) == int(visible.sum())


@pytest.mark.parametrize("change", ["window", "pivots"])
def test_a_peer_with_other_keys_is_seen_in_bf16(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A block, and a single key too few, at a length that is measured: rounding is smaller."""
    sizes = Sizes(heads=1, batch=1, lengths=(2560,))
    monkeypatch.setattr(attention, "_flex_peers", lambda inputs: [])
    monkeypatch.setattr(attention, "_dense_peers", lambda inputs: [])
    case = attention.attention_case(sizes, 2560, backward=False, estimate_s=1)
    assert measure(case, CPU, 1)["problems"] == []

    def wrong(q: Any, k: Any, v: Any, pivot_BP: Any, block: int, blocks: int) -> torch.Tensor:
        if change == "window":
            return sparse_attention(q, k, v, pivot_BP, block, blocks - 1)
        return sparse_attention(q, k, v, pivot_BP[:, 1:], block, blocks)

    monkeypatch.setattr(attention, "sparse_attention", wrong)
    (seen,) = measure(case, CPU, 1)["problems"]
    assert seen.startswith("original sparse, materialised computes something else")


def case_of(*members: Peer) -> Case:
    facts = {"operation": "made up", "mode": "forward"}
    return Case(name="a case", estimate_s=1, facts=facts, peers=lambda device: members)


def giving(*values: float) -> Callable[[], Callable[[], torch.Tensor]]:
    return lambda: lambda: torch.tensor(values)


def raising(error: BaseException) -> Callable[[], Callable[[], Any]]:
    def run() -> None:
        raise error

    return lambda: run


def test_peers_that_fail_are_recorded_and_the_others_go_on() -> None:
    def unavailable() -> Any:
        raise NotAvailable("no such thing here")

    row = measure(
        case_of(
            Peer(name="ours", prepare=giving(1.0, 2.0)),
            Peer(name="same", prepare=giving(1.0, 2.0), like="ours"),
            Peer(name="near", prepare=giving(1.0, 2.02), like="ours", tolerance=0.01),
            Peer(name="other", prepare=giving(1.0, 2.1), like="ours", tolerance=0.01),
            Peer(name="not a number", prepare=giving(1.0, math.nan), like="ours", tolerance=1.0),
            Peer(name="another shape", prepare=giving(1.0), like="ours", tolerance=1.0),
            Peer(name="oom", prepare=raising(torch.OutOfMemoryError("CUDA out of memory"))),
            Peer(name="host oom", prepare=raising(RuntimeError("alloc: can't allocate memory"))),
            Peer(name="absent", prepare=unavailable),
            Peer(name="broken", prepare=raising(RuntimeError("No kernel.\nlong story"))),
            Peer(name="last", prepare=giving(3.0), expected=lambda: (torch.tensor([3.0]),)),
        ),
        CPU,
        2,
    )
    entries = row["peers"]
    assert {name for name, entry in entries.items() if entry.get("ms", -1) >= 0} == {
        *("ours", "same", "near", "other", "not a number", "another shape", "last")
    }
    assert entries["same"]["relative_error"] == 0
    assert entries["near"]["relative_error"] == pytest.approx(0.02 / math.sqrt(5), rel=1e-3)
    agrees = {name: entry["agrees"] for name, entry in entries.items() if "agrees" in entry}
    assert agrees == {"same": True, "near": True, "last": True} | dict.fromkeys(
        ("other", "not a number", "another shape"), False
    )
    assert entries["oom"] == entries["host oom"] == {"absent": OUT_OF_MEMORY}
    assert entries["absent"] == {"absent": "not available: no such thing here"}
    assert entries["broken"] == {"absent": "not available: RuntimeError: No kernel."}
    problems = "\n".join(row["problems"])
    assert len(row["problems"]) == 3
    assert "other computes something else: relative error 0.045 > 0.01" in problems
    assert "not a number computes something else: relative error is not finite" in problems


def test_ours_failing_is_a_problem_and_leaves_others_uncompared() -> None:
    row = measure(
        case_of(
            Peer(name="ours", prepare=raising(RuntimeError("defect"))),
            Peer(name="peer", prepare=giving(1.0), like="ours"),
        ),
        CPU,
        1,
    )
    assert row["problems"] == ["ours: not available: RuntimeError: defect"]
    assert row["peers"]["peer"]["agrees"] is None
    assert row["peers"]["peer"]["ms"] >= 0


def test_memory_that_runs_out_while_peers_take_turns() -> None:
    runs = {"greedy": 0, "modest": 0}

    def greedy() -> torch.Tensor:
        runs["greedy"] += 1
        if runs["greedy"] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.ones(1)

    def modest() -> torch.Tensor:
        runs["modest"] += 1
        return torch.ones(1)

    members = [
        Peer(name="ours", prepare=lambda: modest),
        Peer(name="greedy", prepare=lambda: greedy, like="ours"),
    ]
    row = measure(case_of(*members), CPU, 4)
    assert row["peers"]["greedy"] == {"absent": OUT_OF_MEMORY}
    assert row["peers"]["ours"]["ms"] >= 0
    assert row["problems"] == []
    # Two checks; the turns that were broken off; two warm-ups and four turns alone.
    assert runs["modest"] >= 8


def test_peers_that_fill_the_device_take_no_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def noting(name: str) -> Callable[[], Any]:
        def run() -> torch.Tensor:
            order.append(name)
            return torch.ones(1)

        return lambda: run

    sizes = {"ours": 10, "large": 500, "small": 20}
    monkeypatch.setattr(peers, "extra_bytes", lambda operation, device: sizes[order[-1]])
    monkeypatch.setattr(peers, "_is_large", lambda entry, device: entry["extra_bytes"] > 400)
    row = measure(case_of(*(Peer(name=n, prepare=noting(n)) for n in sizes)), CPU, 2)
    assert order[-4:] == ["large"] * 4
    assert order[-8:-4] == ["ours", "small"] * 2
    assert {name: entry["alone"] for name, entry in row["peers"].items()} == {
        "ours": False,
        "large": True,
        "small": False,
    }


def test_codes_differ_by_their_share() -> None:
    found, wanted = torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 5])
    assert peers.share_that_differs((found,), (wanted,)) == 0.25


def test_the_backward_pass_alone_repeats() -> None:
    """On a graph that is kept, against the whole pass."""
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(5, 3, dtype=torch.float64)

    def forward() -> tuple[torch.Tensor, ...]:
        return (x.sin() * x,)

    alone = by_rows._backward_alone(forward, (x,), (gradient,))
    whole = peers.with_gradients(forward, (x,), (gradient,))()
    for _ in range(2):
        (found,) = alone()
        torch.testing.assert_close(found, whole[1])
    torch.testing.assert_close(found, gradient * (x.sin() + x * x.cos()).detach())


def test_a_copy_and_least_traffic_are_counted_in_bytes() -> None:
    row = measure(by_rows.junction_case(Sizes.micro(), 32, "forward", 1), CPU, 1)
    hidden = Sizes.micro().hidden
    # h and x read, z and n written, two bytes each.
    assert row["peers"]["ours"]["least_bytes"] == 32 * hidden * 8
    assert row["peers"]["copy"]["least_bytes"] == 2 * 4096


def test_what_is_judged_comes_first_and_everything_comes() -> None:
    found = cases.all_cases(Sizes())
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert [case.facts.get("tokens", case.facts.get("length")) for case in found[1:8]] == [
        *(32768, 32768, 4096, 4096, 16384, 16384, 32768)
    ]
    assert {case.facts["length"] for case in found if "length" in case.facts} == {
        *(1088, 2560, 4096, 8192, 16384)
    }
    # All that is judged fits into the budget of gpu_check even if nothing is faster than thought.
    assert sum(case.estimate_s for case in found[:8]) < 420
    only = cases.all_cases(Sizes(), ["codebook"])
    assert [case.facts["operation"] for case in only] == ["codebook"]
    batches = {c.facts["length"]: c.facts["batch"] for c in found if "length" in c.facts}
    assert batches == {1088: 4, 2560: 4, 4096: 4, 8192: 1, 16384: 1}


def test_clocks_are_unknown_where_nobody_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert timing.nvidia_smi().startswith("unknown")
