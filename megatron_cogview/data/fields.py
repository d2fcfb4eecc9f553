"""What a field of a source may hold: JSON objects, ids, and why something cannot be used.

Knows no source.
"""

import json
from dataclasses import dataclass
from typing import Any

from megatron_cogview.data.raw import printable


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why a field, a row or a file cannot be used."""

    reason: str
    """One of a few fixed phrases."""
    detail: str = ""
    """What exactly; the same on every run."""


def parse_object(text: bytes | str) -> dict[str, Any] | None:
    """A JSON object, or None where the text is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def given_id(value: object) -> str | None:
    """The id a user gave: a text that is not empty, or an integer; None for anything else."""
    # True is an integer for Python and no id for anybody.
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        return None
    return printable(str(value))
