"""Configurations to dictionaries of plain JSON values, and back."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any, TypeVar, get_type_hints

from vista.errors import ConfigError

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain JSON values; enums become their values."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Enum):
        return value.value
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The inverse of `to_dict`.

    Raises:
        ConfigError: if a key is missing or unknown, or a value is not allowed.
    """
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ConfigError(f"{cls.__name__}: expected a table of keys, got {values!r}")
    other = hints.keys() ^ values.keys()
    if other:
        keys = ", ".join(sorted(other))
        raise ConfigError(
            f"{keys}: missing or unknown in {cls.__name__}; was this written by another version of vista?"
        )
    arguments = {}
    for key, value in values.items():
        hint = hints[key]
        if is_dataclass(hint) and isinstance(value, dict):
            value = from_dict(hint, value)  # type: ignore[arg-type]
        arguments[key] = value
    return cls(**arguments)
