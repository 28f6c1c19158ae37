"""Checks of configuration values. Every error names the key."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from vista.errors import ConfigError, shown

PLAIN: dict[Any, Any] = {bool: bool, str: str, int: numbers.Integral, float: numbers.Real}
"""Which values a field of these types accepts; NumPy's numbers are among them."""

LARGEST_COUNT = 2**63 - 1
"""What fits into int64, as counts are stored and as torch takes them."""

MAX_THREADS = 1024
MAX_DAYS = 36_500
"""The longest time in days that a setting may name."""
Value = TypeVar("Value")


def without_none(hint: Any) -> tuple[Any, bool]:
    """`X | None` -> (X, True); any other type -> (itself, False)."""
    if get_origin(hint) in (Union, UnionType):
        inner = [arg for arg in get_args(hint) if arg is not NoneType]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def planned(value: Value | None, key: str) -> Value:
    """The value of a key that may be null in a configuration, but not where it is used.

    Raises:
        ConfigError: if it is null.
    """
    if value is None:
        raise ConfigError(f"{key}: is null, which training resolves from the log; call plan_run, or set a value")
    return value


def require(condition: bool, key: str, message: str) -> None:
    """Raise ConfigError, naming the key, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_only_with(is_set: bool, applies: bool, key: str, setting: str) -> None:
    """Require that a key is set exactly when it applies, which is with a setting such as data.split=time."""
    require(is_set or not applies, key, f"is required with {setting}")
    require(applies or not is_set, key, f"only applies with {setting}; set that, or leave this out")


def require_counts(config: Any, prefix: str, keys: tuple[str, ...], least: int = 1, most: int = LARGEST_COUNT) -> None:
    """Require whole numbers from `least` to `most`, or null where a key allows it."""
    for key in keys:
        value = getattr(config, key)
        if value is None:
            continue
        require(value >= least, f"{prefix}{key}", f"must be at least {least}, got {shown(value)}")
        require(value <= most, f"{prefix}{key}", f"must be at most {most}, got {shown(value)}")


def require_share(config: Any, prefix: str, keys: tuple[str, ...], *, below_one: bool = False) -> None:
    """Require numbers in [0, 1], or with `below_one` in [0, 1)."""
    for key in keys:
        value = getattr(config, key)
        good = 0 <= value <= 1 and not (below_one and value == 1)
        require(good, f"{prefix}{key}", f"must lie in [0, 1{')' if below_one else ']'}, got {value}")


def require_finite(
    config: Any, prefix: str, keys: tuple[str, ...], *, positive: bool = False, most: float = math.inf
) -> None:
    """Require finite numbers of at least 0, or with `positive` above 0, and of at most `most`; or null."""
    for key in keys:
        value = getattr(config, key)
        if value is None:
            continue
        good = math.isfinite(value) and (value > 0 if positive else value >= 0)
        require(good, f"{prefix}{key}", f"must be {'positive' if positive else 'at least 0'} and finite, got {value}")
        require(value <= most, f"{prefix}{key}", f"must be at most {most:g}, got {value}")


def require_numbers(config: Any, prefix: str, key: str, least: float, most: float) -> None:
    """Require a list of numbers from `least` to `most`."""
    values = getattr(config, key)
    good = isinstance(values, list) and all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value <= most for value in values
    )
    require(good, f"{prefix}{key}", f"must be a list of numbers from {least:g} to {most:g}, got {shown(values)}")


def check_types(config: Any, prefix: str = "") -> None:
    """Replace the names of choices by the choices, and plain numbers by those of the field's type.

    Raises:
        ConfigError: naming the key, if a value has another type than its field.
    """
    for name, annotation in get_type_hints(type(config)).items():
        value, key = getattr(config, name), f"{prefix}{name}"
        hint, optional = without_none(annotation)
        if value is None and optional:
            continue
        if isinstance(hint, type) and issubclass(hint, Enum):
            try:
                setattr(config, name, hint(value))
            except ValueError:
                known = ", ".join(str(member.value) for member in hint)
                raise ConfigError(f"{key}: {shown(value)} is not one of {known}") from None
        elif hint in PLAIN:
            fits = isinstance(value, PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
            if not fits:
                raise ConfigError(f"{key}: expected {hint.__name__}, got {shown(value)}")
            if not isinstance(value, hint):
                setattr(config, name, hint(value))  # an int for a float, or a NumPy number
        elif is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
            raise ConfigError(f"{key}: expected {hint.__name__}, got {shown(value)}")  # type: ignore[union-attr]


class Checked:
    """Base of configurations whose values need no check beyond their types."""

    __slots__ = ()

    def __post_init__(self) -> None:
        check_types(self)


# How many values a category of a log may have.

MAX_VALUES = 1_000_000
"""The limit unless the configuration of the table raises it: far more values are likely a mistake, such as a column of
ids or times."""
_MOST = 2**31 - 2
"""Codes are int32."""


def check_max_values(value: int, key: str) -> None:
    """Check the limit of a table. Raises ConfigError."""
    require(1 <= value <= _MOST, key, f"must lie in 1 … {_MOST:,}")


# The size of a YAML document, measured before it is built.

MAX_YAML_VALUES, MAX_LEVELS = 10_000, 50
"""Of a document, with every alias replaced by what it stands for."""


@dataclass(eq=False, slots=True)
class _Node:
    """Values and levels of a list, a mapping or a scalar, including itself."""

    values: int = 1
    levels: int = 1

    def add(self, child: _Node) -> None:
        self.values += child.values
        self.levels = max(self.levels, child.levels + 1)


def check_size(text: str) -> None:
    """Refuse a document that is huge once its aliases are replaced, or that contains itself, without building it.

    Raises:
        yaml.YAMLError: it is, or the text is not YAML.
    """
    import yaml  # takes a while, and most configurations are built without it

    anchors: dict[str, _Node] = {}
    open_nodes = [_Node()]  # the document, and the lists and mappings that have begun
    for event in yaml.parse(text, yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.CollectionStartEvent):
            node = _Node()
            open_nodes.append(node)
        elif isinstance(event, yaml.CollectionEndEvent):
            node = open_nodes.pop()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.ScalarEvent):
            node = _Node()
            open_nodes[-1].add(node)
        elif isinstance(event, yaml.AliasEvent):
            node = anchors.get(event.anchor, _Node())  # building the document names an anchor that is missing
            if node in open_nodes:
                raise yaml.YAMLError(f"line {line}: *{event.anchor} contains itself")
            open_nodes[-1].add(node)
        else:
            continue
        if isinstance(event, yaml.CollectionStartEvent | yaml.ScalarEvent) and event.anchor:
            anchors[event.anchor] = node
        if open_nodes[-1].values > MAX_YAML_VALUES or len(open_nodes) + open_nodes[-1].levels - 1 > MAX_LEVELS:
            raise yaml.YAMLError(
                f"line {line}: more than {MAX_YAML_VALUES} values or {MAX_LEVELS} levels, counting each alias as what "
                "it stands for"
            )


# Configurations to dictionaries of plain JSON values, and back.

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
