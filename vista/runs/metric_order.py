"""Which value of a metric is better."""

from __future__ import annotations

from collections.abc import Sequence

_LARGER = ("hr@", "ndcg@", "mrr@", "recall@", "precision@", "auc/", "gauc/")


def badness(name: str, value: float) -> float | None:
    """A number that is smaller for better values of a metric; None if no value of it is better than another."""
    return {"lower is better": value, "best at 1": abs(value - 1), "higher is better": -value}.get(better_values(name))


def better_values(name: str) -> str:
    """Which values of a metric are better, in words; "" if none is better than another."""
    name = name.removeprefix("validation ")
    if name.startswith("ne/"):
        return "lower is better"
    if name.startswith("calibration/"):
        return "best at 1"
    return "higher is better" if name.startswith(_LARGER) else ""


def best_places(name: str, values: Sequence[float | None]) -> list[bool]:
    """Where the best of several values is; nowhere if they are all equal, or cannot be compared."""
    ranked = [None if value is None else badness(name, value) for value in values]
    known = [value for value in ranked if value is not None]
    if len(set(known)) < 2:
        return [False] * len(values)
    return [value == min(known) for value in ranked]
