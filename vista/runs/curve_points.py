"""Fewer points of a long curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


def thinned(points: Sequence[T], limit: int) -> list[T]:
    """At most `limit` (two or more) of the points, evenly chosen, with the first and the last one."""
    if len(points) <= limit:
        return list(points)
    return [points[place] for place in np.linspace(0, len(points) - 1, limit).round().astype(int).tolist()]
