"""Which value of a metric is better."""

from __future__ import annotations

from collections.abc import Sequence

_LARGER = ("hr@", "ndcg@", "mrr@", "recall@", "precision@", "auc/", "gauc/")


def badness(name: str, value: float) -> float | None:
    """A number that is smaller for better values of a metric; None if no value of it is better than another."""
    if name.startswith("ne/"):
        return value
    if name.startswith("calibration/"):
        return abs(value - 1)
    return -value if name.startswith(_LARGER) else None


def best_places(name: str, values: Sequence[float | None]) -> list[bool]:
    """Where the best of several values is; nowhere if they are all equal, or cannot be compared."""
    ranked = [None if value is None else badness(name, value) for value in values]
    known = [value for value in ranked if value is not None]
    if len(set(known)) < 2:
        return [False] * len(values)
    return [value == min(known) for value in ranked]
