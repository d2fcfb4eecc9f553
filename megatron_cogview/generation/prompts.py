"""Prompt files: captions to draw, each with an id that names its picture."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_cogview.configs.errors import DataError

_SAFE_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True, slots=True)
class Prompt:
    """One picture to draw."""

    id: str
    """Name of the picture's file."""
    caption: str
    """What it shows."""


def read_prompts(path: Path) -> list[Prompt]:
    """Read JSON lines with ``id`` and ``caption``, or a text file with one caption per line.

    Lines of a text file are numbered from 0; empty lines are left out.

    Raises:
        DataError: naming the line that cannot be used.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: prompts cannot be read: {error}") from error
    as_json = path.suffix in (".jsonl", ".json")
    prompts = [
        _from_json(path, number, line) if as_json else Prompt(f"{number:06d}", line.strip())
        for number, line in enumerate(lines)
        if line.strip()
    ]
    if not prompts:
        raise DataError(f"{path}: holds no prompts")
    seen: set[str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise DataError(f"{path}: id {prompt.id!r} occurs twice; pictures are named by it")
        seen.add(prompt.id)
    return prompts


def _from_json(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}, line {number + 1}"
    try:
        value = json.loads(line)
        prompt = Prompt(str(value["id"]), value["caption"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where}: expected an object with id and caption: {error!r}") from error
    if not _SAFE_ID.fullmatch(prompt.id):
        raise DataError(
            f"{where}: id {prompt.id!r} cannot name a file; use letters, digits, '.', '_' and '-'"
        )
    if not isinstance(prompt.caption, str) or not prompt.caption.strip():
        raise DataError(f"{where}: caption {prompt.caption!r} is not a text")
    return prompt
