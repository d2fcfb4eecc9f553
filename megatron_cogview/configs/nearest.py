"""The legal values next to a refused one, and how a message names them."""

from collections.abc import Callable, Mapping, Sequence


def nearest(value: int, is_legal: Callable[[int], bool], highest: int) -> list[int]:
    """The largest legal number below ``value`` and the smallest above it, from 1 to ``highest``."""
    below = next((n for n in range(min(value - 1, highest), 0, -1) if is_legal(n)), None)
    above = next((n for n in range(max(value + 1, 1), highest + 1) if is_legal(n)), None)
    return [n for n in (below, above) if n is not None]


def advice(own: Sequence[object], others: Mapping[str, Sequence[object]] | None = None) -> str:
    """The end of a refusal's reason.

    Args:
        own: nearest legal values of the refused field.
        others: other fields that would lift the refusal instead, and their nearest legal values.
    """
    values = " and ".join(map(str, own))
    text = f"the nearest legal value{'s are' if len(own) > 1 else ' is'} {values}"
    for field, alternatives in (others or {}).items():
        text += f", or {field} = {' or '.join(map(str, alternatives))}"
    return text
