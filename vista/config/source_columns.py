"""Which columns of a table are what."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types


@dataclass(kw_only=True, slots=True)
class SourceColumns:
    """Names of the columns of events, and of impressions."""

    user: str = "user"
    """Column of user ids, integers or text."""
    item: str = "item"
    """Column of item ids, integers or text."""
    timestamp: str | None = "timestamp"
    """Column of times. null for a table without times, whose events are in input order."""
    action: str | None = None
    """Column of action names, such as click or buy. null if there is only one action."""
    rating: str | None = None
    """Column of ratings, finite numbers. null reads no ratings."""
    sequence: str | None = None
    """Column of integers that orders events with equal timestamps. null orders them as in the input."""
    labels: list[str] = field(default_factory=list)
    """For impressions: the columns of labels, one per task, with the values 0, 1, or empty if unknown."""
    probabilities: list[str] = field(default_factory=list)
    """For simulated impressions: the columns of true label probabilities, in the order of `labels`. Empty reads
    none."""

    def __post_init__(self) -> None:
        check_types(self)
