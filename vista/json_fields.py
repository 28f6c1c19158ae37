"""Rules for fields of JSON files that vista reads back: a damaged or crafted file must not cause a TypeError."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vista.errors import shown


@dataclass(frozen=True, slots=True)
class FieldRule:
    """What the value of a field must be."""

    expected: str
    """In words, for the error message."""
    holds: Callable[[Any], bool]


TABLE = FieldRule("a table of keys", lambda value: type(value) is dict)
"""A mapping; its fields are checked on their own."""

NUMBER = FieldRule(
    "a finite number",
    # `math.isfinite` would raise an OverflowError for a whole number that is too large for a float.
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max,
)
"""A number that a float can hold, and not a bool."""


def whole(least: int = 0, most: int = 2**62) -> FieldRule:
    """A whole number in a range, and not a bool."""
    return FieldRule(
        f"a whole number from {least} to {most}", lambda value: type(value) is int and least <= value <= most
    )


def text(most: int = 4_096) -> FieldRule:
    """A string of at most `most` characters."""
    return FieldRule(f"a string of at most {most} characters", lambda value: type(value) is str and len(value) <= most)


def hexadecimal(length: int) -> FieldRule:
    """A string of `length` lowercase hex digits."""
    pattern = re.compile(f"[0-9a-f]{{{length}}}")
    return FieldRule(f"{length} hex digits", lambda value: type(value) is str and pattern.fullmatch(value) is not None)


def one_of(*values: object) -> FieldRule:
    """One of these values, with its type."""
    known = [(type(value), value) for value in values]
    return FieldRule(f"one of {', '.join(map(repr, values))}", lambda value: (type(value), value) in known)


def either(*rules: FieldRule) -> FieldRule:
    """A value that satisfies at least one of these rules."""
    return FieldRule(
        " or ".join(rule.expected for rule in rules), lambda value: any(rule.holds(value) for rule in rules)
    )


def list_of(rule: FieldRule, least: int = 0, most: int | None = None) -> FieldRule:
    """A list of at least `least` and at most `most` values that each satisfy a rule; None for no limit."""
    size = f" of length {least}" if least == most else ""
    return FieldRule(
        f"a list{size} in which each entry is {rule.expected}",
        lambda value: (
            type(value) is list
            and least <= len(value)
            and (most is None or len(value) <= most)
            and all(rule.holds(entry) for entry in value)
        ),
    )


def check_fields(fields: object, rules: Mapping[str, FieldRule]) -> None:
    """Require a mapping with exactly the fields of `rules`, each of which satisfies its rule.

    Raises:
        ValueError: the message names the field, what is expected, and the value.
    """
    if not isinstance(fields, dict):
        raise ValueError(f"expected a mapping of fields, got {shown(fields)}")
    for name in rules:
        if name not in fields:
            raise ValueError(f"the field {name!r} is missing")
    for name, value in fields.items():
        if name not in rules:
            raise ValueError(f"the field {shown(name)} is unknown")
        if not rules[name].holds(value):
            raise ValueError(f"{name}: expected {rules[name].expected}, got {shown(value)}")
