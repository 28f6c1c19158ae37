"""Checks of configuration values; every error names the key."""

from __future__ import annotations

import math
import numbers
from dataclasses import is_dataclass
from enum import Enum
from typing import Any, get_type_hints

from vista.errors import ConfigError

PLAIN: dict[Any, Any] = {bool: bool, str: str, int: numbers.Integral, float: numbers.Real}
"""What is taken for a field of these types (NumPy's numbers too)."""


def require(condition: bool, key: str, message: str) -> None:
    """Raise ConfigError, naming the key, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: {message}")


def require_counts(config: Any, prefix: str, keys: tuple[str, ...], least: int = 1) -> None:
    """Whole numbers of at least `least`."""
    for key in keys:
        value = getattr(config, key)
        require(value >= least, f"{prefix}{key}", f"must be at least {least}, got {value}")


def require_finite(config: Any, prefix: str, keys: tuple[str, ...], *, positive: bool = False) -> None:
    """Finite numbers of at least 0, or above it."""
    for key in keys:
        value = getattr(config, key)
        good = math.isfinite(value) and (value > 0 if positive else value >= 0)
        require(good, f"{prefix}{key}", f"must be {'positive' if positive else 'at least 0'} and finite, got {value}")


def check_types(config: Any, prefix: str = "") -> None:
    """Words of choices become the choices that they name; ConfigError for a value of another type than its field's."""
    for name, hint in get_type_hints(type(config)).items():
        value, key = getattr(config, name), f"{prefix}{name}"
        if isinstance(hint, type) and issubclass(hint, Enum):
            try:
                setattr(config, name, hint(value))
            except ValueError:
                known = ", ".join(str(member.value) for member in hint)
                raise ConfigError(f"{key}: {value!r} is none of {known}") from None
        elif hint in PLAIN:
            fits = isinstance(value, PLAIN[hint]) and (hint is bool or not isinstance(value, bool))
            if not fits:
                raise ConfigError(f"{key}: expected {hint.__name__}, got {value!r}")
            if not isinstance(value, hint):
                setattr(config, name, hint(value))  # a whole number for a float, or a number of NumPy's
        elif is_dataclass(hint) and not isinstance(value, hint):  # type: ignore[arg-type]
            raise ConfigError(f"{key}: expected {hint.__name__}, got {value!r}")  # type: ignore[union-attr]
