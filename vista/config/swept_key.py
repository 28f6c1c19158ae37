"""A setting with several values."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SweptKey:
    """A key of `vista train` with several values, of which each trial of a sweep takes one."""

    key: str
    values: tuple[str, ...] = ()
    """As written; empty for an interval."""
    interval: tuple[float, float] | None = None
    log: bool = False
    """Whether values of the interval are drawn on a logarithmic scale."""
    whole: bool = False
    """Whether the values of the interval are whole numbers."""
