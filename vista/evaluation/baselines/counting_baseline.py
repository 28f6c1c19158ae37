"""What every counting baseline can do.

Letters: n users that are asked at once, V items of the log.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from vista.arrays import Floats, Int
from vista.log.event_log import EventLog


class CountingBaseline(Protocol):
    """Scores of all items of a log, from events before a cut."""

    name: str
    """Short name, as tables print it."""

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        """Count the visible events.

        Args:
            counts: int64 [num_users]; only the first counts[u] events of user u are read.
            rng: for all random choices.
        """

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        """Score all items for some users; a larger score ranks higher.

        Args:
            user: int64 [n] rows of the log.
            seen: int64 [n]; only the first seen[b] events of user[b] are read.
            now: int64 [n] times of the questions, ms; None asks right after each user's newest event.

        Returns:
            float64 [n, V], finite.
        """
