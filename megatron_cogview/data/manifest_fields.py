"""Which fields a manifest of token shards must have, and what may stand in them.

Its digest shows that nobody damaged it; this shows that whoever wrote it, perhaps another program,
wrote what readers need.
"""

from collections.abc import Callable, Iterator
from typing import Any

from megatron_cogview.configs.sequence import MAX_SHARD_TEXT
from megatron_cogview.data.shards import FORMAT, SHARD_NAME, SPLIT_TABLE

_Rule = tuple[Callable[[Any], bool], str]
_MISSING = object()


def field_errors(manifest: dict[str, Any]) -> list[str]:
    """All errors, each naming its field; none if the manifest can be used."""
    errors = [
        f"{name} is {_shown(value)}, must be {wanted}"
        for name, (holds, wanted) in _FIELDS.items()
        if not holds(value := _value(manifest, name))
    ]
    for name, (holds, wanted) in _OPTIONAL.items():
        value = _value(manifest, name)
        if value is not _MISSING and not holds(value):
            errors.append(f"{name} is {_shown(value)}, must be {wanted}")
    shards = manifest.get("shards")
    if not isinstance(shards, list):
        return [*errors, "shards is not a list"]
    faults = list(_shard_errors(shards))
    if not faults:
        total = sum(entry["records"] for entry in shards)
        if total != manifest.get("records"):
            faults.append(f"records is {manifest.get('records')}, its shards have {total}")
    return errors + faults


def _shard_errors(shards: list[Any]) -> Iterator[str]:
    seen: set[str] = set()
    for index, entry in enumerate(shards):
        for key, (holds, wanted) in _SHARD_FIELDS.items():
            value = _value(entry, key)
            if not holds(value):
                yield f"shards[{index}].{key} is {_shown(value)}, must be {wanted}"
            elif key == "name" and value in seen:
                yield f"shards[{index}].name is {value}, which stands there twice"
            elif key == "name":
                seen.add(value)


def _value(manifest: Any, name: str) -> Any:
    """The value at a dotted path."""
    value = manifest
    for key in name.split("."):
        if not isinstance(value, dict) or key not in value:
            return _MISSING
        value = value[key]
    return value


def _shown(value: Any) -> str:
    return "missing" if value is _MISSING else f"{value!r:.80}"


def _number(low: int, high: int | None = None) -> _Rule:
    def holds(value: Any) -> bool:
        # JSON's true is an int in Python.
        return type(value) is int and low <= value and (high is None or value <= high)

    return holds, f"a whole number from {low}" + ("" if high is None else f" to {high}")


def _matching(pattern: Any, wanted: str) -> _Rule:
    return lambda value: isinstance(value, str) and bool(pattern.fullmatch(value)), wanted


def _is_sides(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (1, 2)
        and all(type(side) is int and 1 <= side <= 4096 for side in value)
    )


def _is_sha256(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and set(value) <= set("0123456789abcdef")


_NAME: _Rule = (lambda value: isinstance(value, str) and bool(value), "a text")
_SHA256: _Rule = (_is_sha256, "a SHA-256, 64 hexadecimal digits")

_FIELDS: dict[str, _Rule] = {
    "format": (lambda value: value == FORMAT, repr(FORMAT)),
    "layout.codes_per_side": (_is_sides, "one or two sides from 1 to 4096"),
    "layout.longest_text": _number(1, MAX_SHARD_TEXT),
    "tokenizers.text.fingerprint": _NAME,
    "tokenizers.text.vocab_size": _number(1, 1 << 16),
    "tokenizers.image.fingerprint": _NAME,
    "tokenizers.image.num_codes": _number(1, 1 << 16),
    "records": _number(1),
    "split_table.name": _matching(SPLIT_TABLE, "a split table's name"),
    "split_table.bytes": _number(1),
    "split_table.sha256": _SHA256,
}
_OPTIONAL: dict[str, _Rule] = {
    "layout.text_ids": _number(MAX_SHARD_TEXT, MAX_SHARD_TEXT),
    "layout.text_budget": _number(1, MAX_SHARD_TEXT),
    "rejected": (
        lambda value: isinstance(value, dict) and all(type(n) is int for n in value.values()),
        "counts by reason",
    ),
    "rejected_log": (
        lambda value: (
            _is_sha256(_value(value, "sha256")) and _value(value, "name") == "rejected.jsonl"
        ),
        "the name rejected.jsonl and its SHA-256",
    ),
}
_SHARD_FIELDS: dict[str, _Rule] = {
    "name": _matching(SHARD_NAME, "a shard's name"),
    "records": _number(0),
    "bytes": _number(1),
    "sha256": _SHA256,
}
