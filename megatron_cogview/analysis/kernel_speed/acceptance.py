"""What the kernels must reach, and whether the rows of a benchmark show it.

A pure function of the rows.  Nothing is judged that was not measured, or whose peer computes
something else.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_cogview.analysis.kernel_speed import attention, by_rows
from megatron_cogview.analysis.kernel_speed.cases import JUDGED_ROWS
from megatron_cogview.analysis.kernel_speed.peers import Row
from megatron_cogview.configs.model import AttentionConfig

Found = float | str
"""The figure, or why there is none."""

_SDPA = (attention.FLASH, attention.CUDNN, attention.EFFICIENT)
_ANY_DENSE = (
    *_SDPA,
    attention.FLASH_2,
    attention.FLASH_3,
    attention.DENSE,
    attention.EAGER,
    attention.COMPILED,
)
_BOTH = "forward + backward"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One rule and what became of it."""

    rule: str
    limit: str
    """What must be reached, or what is aimed at."""
    kind: Literal["must", "target"]
    figure: float | None
    """None: not measured, and ``why`` says why."""
    is_met: bool | None
    why: str = ""


def acceptance(rows: Sequence[Row]) -> list[Verdict]:
    """All rules in order.

    Args:
        rows: of :func:`peers.measure`.
    """
    return [
        *_junction(rows),
        *_norm(rows),
        *_attention_time(rows),
        *_attention_memory(rows),
        *_attention_targets(rows),
        _dispatch(),
        _correctness(),
    ]


def _junction(rows: Sequence[Row]) -> list[Verdict]:
    verdicts = []
    limits = {"forward": (0.85, 1.5, 0.95), "backward": (0.75, 1.3, 1.0)}
    for mode, (copied, eager, compiled) in limits.items():
        row = _row(rows, operation="junction", mode=mode, tokens=JUDGED_ROWS)
        title = f"junction {mode}, {JUDGED_ROWS:,} tokens"
        verdicts += [
            _at_least(f"{title}: rate of its least traffic over that of a copy", copied,
                      share_of_copy(row, by_rows.OURS)),
            _at_least(f"{title}: speed over the eager chain's", eager,
                      _speedup(row, by_rows.OURS, [by_rows.EAGER])),
            _at_least(f"{title}: speed over the compiled chain's", compiled,
                      _speedup(row, by_rows.OURS, [by_rows.COMPILED])),
        ]  # fmt: skip
    return verdicts


def _norm(rows: Sequence[Row]) -> list[Verdict]:
    row = _row(rows, operation="norm", mode="forward", tokens=JUDGED_ROWS)
    title = f"PB-relax norm forward, {JUDGED_ROWS:,} tokens"
    return [
        _at_most(f"{title}: time over our plain norm's", 1.05,
                 _ratio(row, "ms", by_rows.OURS, by_rows.OURS_PLAIN)),
        _at_least(f"{title}: speed over maximum, division and norm in eager PyTorch", 2.0,
                  _speedup(row, by_rows.OURS, [by_rows.EAGER])),
    ]  # fmt: skip


def _attention_time(rows: Sequence[Row]) -> list[Verdict]:
    rules: list[tuple[int, str, float, Sequence[str], str]] = [
        (4096, "forward", 1.25, _SDPA, "the best dense SDPA"),
        (4096, "forward", 1.6, [attention.FLASH], "dense SDPA flash"),
        (4096, _BOTH, 1.0, _ANY_DENSE, "the best dense kernel"),
        (4096, _BOTH, 1.3, [attention.FLASH], "dense SDPA flash"),
        (4096, _BOTH, 2.5, [attention.EAGER], "dense attention written out"),
        (16384, _BOTH, 3.0, _ANY_DENSE, "the best dense kernel"),
    ]
    return [
        _at_least(
            f"three regions {mode}, {length:,} tokens: speed over {whom}",
            limit,
            _speedup(_attention_row(rows, length, mode), attention.OURS, peers),
        )
        for length, mode, limit, peers, whom in rules
    ]


def _attention_memory(rows: Sequence[Row]) -> list[Verdict]:
    row = _attention_row(rows, 4096, _BOTH)
    title = "three regions forward + backward, 4,096 tokens: peak memory over"
    return [
        _at_most(f"{title} {whom}", limit, _ratio(row, "extra_bytes", attention.OURS, peer))
        for peer, limit, whom in (
            (attention.EAGER, 0.6, "dense attention written out"),
            (attention.FLASH, 1.15, "dense SDPA flash"),
        )
    ]


def _attention_targets(rows: Sequence[Row]) -> list[Verdict]:
    """What we aim at beyond the musts."""
    row = _attention_row(rows, 4096, _BOTH)
    short = _attention_row(rows, 1088, _BOTH)
    title = "three regions forward + backward, 4,096 tokens"
    others = [name for name in _ANY_DENSE if name != attention.DENSE]
    return [
        _at_least(f"{title}: speed over the original sparse algorithm", 10.0,
                  _speedup(row, attention.OURS, [attention.RELEASED]), kind="target"),
        _at_most(f"{title}: peak memory over the original sparse algorithm", 0.15,
                 _ratio(row, "extra_bytes", attention.OURS, attention.RELEASED), kind="target"),
        _at_least(f"{title}: speed over FlexAttention on gathered pivots", 1.2,
                  _speedup(row, attention.OURS, [attention.FLEX]), kind="target"),
        _at_most(f"{title}: the plan's part of a layer's time", 0.01, _plan_share(row),
                 kind="target"),
        _at_least("dense forward + backward, 1,088 tokens: speed over the best other",
                  0.97, _speedup(short, attention.DENSE, others), kind="target"),
    ]  # fmt: skip


def _dispatch() -> Verdict:
    """Settled by the configuration; no time decides it."""
    is_dense = not AttentionConfig(kind="pivot").saves(1088)
    return Verdict(
        rule="1,088 tokens, where three regions save nothing: auto takes dense attention",
        limit="dense",
        kind="must",
        figure=None,
        is_met=is_dense,
        why="dense" if is_dense else "three regions",
    )


def _correctness() -> Verdict:
    return Verdict(
        rule="errors on a GPU against fp64, repeated runs bit for bit, scores that overflow finite",
        limit="tests pass",
        kind="must",
        figure=None,
        is_met=None,
        why="not of this benchmark: gpu_check.sh --part tests",
    )


def _row(rows: Sequence[Row], **facts: Any) -> Row | None:
    found = [row for row in rows if all(row.get(name) == value for name, value in facts.items())]
    return found[-1] if found else None


def _attention_row(rows: Sequence[Row], length: int, mode: str) -> Row | None:
    return _row(rows, operation="attention", mode=mode, length=length)


def _figure(row: Row | None, peer: str, name: str) -> Found:
    """A figure of a peer that ran and does not compute something else."""
    if row is None:
        return "no such row"
    entry: Mapping[str, Any] = row["peers"].get(peer, {"absent": "was not asked"})
    if "absent" in entry:
        return f"{peer}: {entry['absent']}"
    if entry.get("agrees") is False:
        return f"{peer} computes something else"
    if entry.get(name) is None:
        return f"{peer}: not measured"
    return float(entry[name])


def _quotient(above: Found, below: Found) -> Found:
    if isinstance(above, str):
        return above
    return below if isinstance(below, str) else above / below


def _ratio(row: Row | None, name: str, ours: str, peer: str) -> Found:
    return _quotient(_figure(row, ours, name), _figure(row, peer, name))


def _speedup(row: Row | None, ours: str, peers: Sequence[str]) -> Found:
    """How many times as fast as the fastest of the peers that ran."""
    times = [_figure(row, peer, "ms") for peer in peers]
    measured = [time for time in times if not isinstance(time, str)]
    if not measured:
        return times[0]
    return _quotient(min(measured), _figure(row, ours, "ms"))


def share_of_copy(row: Row | None, peer: str) -> Found:
    """Rate of a peer's least traffic over the rate of the row's copy."""
    rates = []
    for name in (peer, by_rows.COPY):
        traffic, ms = _figure(row, name, "least_bytes"), _figure(row, name, "ms")
        rates.append(_quotient(traffic, ms))
    return _quotient(*rates)


def _plan_share(row: Row | None) -> Found:
    """Over attention, which makes the plan, and the layer's matrix products."""
    parts = [_figure(row, name, "ms") for name in (attention.OURS, attention.PRODUCTS)]
    words = [part for part in parts if isinstance(part, str)]
    if words:
        return words[0]
    return _quotient(_figure(row, attention.PLAN, "ms"), sum(map(float, parts)))


def _at_least(rule: str, limit: float, found: Found, **more: Any) -> Verdict:
    return _verdict(rule, ">=", limit, found, lambda figure: figure >= limit, **more)


def _at_most(rule: str, limit: float, found: Found, **more: Any) -> Verdict:
    return _verdict(rule, "<=", limit, found, lambda figure: figure <= limit, **more)


def _verdict(
    rule: str,
    sign: str,
    limit: float,
    found: Found,
    holds: Callable[[float], bool],
    *,
    kind: Literal["must", "target"] = "must",
) -> Verdict:
    limit_text = f"{sign} {limit:g}"
    if isinstance(found, str):
        return Verdict(rule=rule, limit=limit_text, kind=kind, figure=None, is_met=None, why=found)
    return Verdict(rule=rule, limit=limit_text, kind=kind, figure=found, is_met=holds(found))
