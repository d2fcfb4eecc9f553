"""All rows of the benchmark in order of their worth, with the time each may take."""

from collections.abc import Sequence
from typing import Literal

from megatron_cogview.analysis.kernel_speed.attention import attention_case
from megatron_cogview.analysis.kernel_speed.by_rows import (
    codebook_case,
    junction_case,
    norm_case,
    rates_case,
)
from megatron_cogview.analysis.kernel_speed.peers import Case
from megatron_cogview.analysis.kernel_speed.sizes import Sizes

Operation = Literal["rates", "junction", "attention", "norm", "codebook"]
OPERATIONS: tuple[Operation, ...] = ("rates", "junction", "attention", "norm", "codebook")

JUDGED_ROWS = 32_768
"""Tokens at which norms and the junction are judged: more than a second-level cache holds."""
JUDGED_LENGTHS = (4096, 16384)
"""Lengths at which attention is judged."""


def all_cases(sizes: Sizes, operations: Sequence[Operation] = OPERATIONS) -> list[Case]:
    """What is judged first, then the rest.

    Args:
        sizes: shapes.
        operations: which to keep.
    """
    rows = _first((JUDGED_ROWS,), sizes.rows)
    lengths = _first(JUDGED_LENGTHS, sizes.lengths)
    num_judged = sum(length in JUDGED_LENGTHS for length in lengths)
    cases = [rates_case(sizes, 15)]
    cases += _junctions(sizes, rows[0])
    cases += _attentions(sizes, lengths[:num_judged])
    cases += [norm_case(sizes, rows[0], False, 15), codebook_case(sizes, 20)]
    cases += _attentions(sizes, lengths[num_judged:])
    cases.append(norm_case(sizes, rows[0], True, 20))
    for tokens in rows[1:]:
        cases += _junctions(sizes, tokens)
        cases += [norm_case(sizes, tokens, backward, 15) for backward in (False, True)]
    return [case for case in cases if case.facts["operation"] in operations]


def _first(judged: Sequence[int], all_of_them: Sequence[int]) -> list[int]:
    """Those that are judged, in the order of ``judged``, then the others."""
    chosen = [one for one in judged if one in all_of_them]
    return chosen + [one for one in all_of_them if one not in chosen]


def _junctions(sizes: Sizes, tokens: int) -> list[Case]:
    return [
        junction_case(sizes, tokens, "forward", 20),
        junction_case(sizes, tokens, "backward", 25),
    ]


def _attentions(sizes: Sizes, lengths: Sequence[int]) -> list[Case]:
    """Compiling FlexAttention and Eq. 4 takes most of the time."""
    return [
        attention_case(sizes, length, backward, 75 if backward else 45)
        for length in lengths
        for backward in (True, False)
    ]
