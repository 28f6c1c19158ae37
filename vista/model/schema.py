"""What a model may read of a log, and what it is trained to predict."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Schema:
    """The fields and tasks of the log that a model was trained on."""

    actions: list[str]
    has_time: bool
    rating_range: tuple[float, float] | None
    """Smallest and largest rating; None if ratings are not used."""
    tasks: list[str]
    """Labeled tasks that were trained."""
    has_retrieval: bool = True
    """Whether the retrieval head was trained on next items."""
