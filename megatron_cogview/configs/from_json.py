"""Dataclasses from JSON values, with errors that name the field."""

import dataclasses
import typing
from typing import Any, Literal

from megatron_cogview.configs.errors import ConfigError


def build(kind: Any, value: Any, where: str) -> Any:
    """Rebuild nested dataclasses and tuples from JSON values.

    Args:
        kind: the type to build.
        value: what the JSON holds.
        where: its dotted name, for errors.

    Raises:
        ConfigError: naming the field that is unknown, missing or of another type.
    """
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise ConfigError(f"{where or 'configuration'}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            raise ConfigError(f"{where or 'configuration'}: unknown fields {sorted(unknown)}")
        needed = {f.name for f in dataclasses.fields(kind) if _is_required(f)}
        if needed - set(value):
            missing = sorted(needed - set(value))
            raise ConfigError(f"{where or 'configuration'}: missing fields {missing}")
        prefix = f"{where}." if where else ""
        return kind(**{k: build(hints[k], v, prefix + k) for k, v in value.items()})  # type: ignore[operator]
    if typing.get_origin(kind) is tuple:
        return _tuple(kind, value, where)
    accepted = (int, float) if kind is float else kind
    if isinstance(kind, type) and (
        not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool)
    ):
        raise ConfigError(f"{where} = {value!r}: must be of type {kind.__name__}")
    if typing.get_origin(kind) is Literal and value not in typing.get_args(kind):
        raise ConfigError(f"{where} = {value!r}: must be one of {list(typing.get_args(kind))}")
    return value


def _is_required(field_: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field_.default is missing and field_.default_factory is missing


def _tuple(kind: Any, value: Any, where: str) -> tuple[Any, ...]:
    """``tuple[X, ...]`` from a list."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} = {value!r}: must be a list")
    (element, *_) = typing.get_args(kind)
    return tuple(build(element, item, f"{where}[{i}]") for i, item in enumerate(value))
