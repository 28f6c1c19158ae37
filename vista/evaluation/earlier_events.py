"""A user's earlier events of an item, or of its category: how many, and how long ago.

Letters: N questions, T events of a history.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.log.event_log import EventLog
from vista.progress_bar import progress_bar


@dataclass(frozen=True, slots=True)
class EarlierEvents:
    """Of N questions, the events of the wanted item or category before each."""

    count: Int
    """int64 [N]."""
    newest_age: Int
    """int64 [N]: events of the user after the newest one, 0 for the last event before the question; -1 if none."""
    recent: dict[int, Int]
    """{n: int64 [N], how many of them are among the last n events before the question}."""

    @classmethod
    def of(
        cls, log: EventLog, group: Int, user: Int, seen: Int, item: Int, last: tuple[int, ...] = ()
    ) -> EarlierEvents:
        """Look up the events.

        Args:
            group: int64 [log.num_items], the category of each item; negative for items without one, which have no
                earlier event. `np.arange(log.num_items)` looks for the same item.
            user: int64 [N] rows of the log.
            seen: int64 [N] events before the question.
            item: int64 [N] rows of the log.
            last: the numbers n of `recent`.
        """
        count, newest = np.zeros(len(user), np.int64), np.full(len(user), -1, np.int64)
        recent = {n: np.zeros(len(user), np.int64) for n in last}
        for row, chosen in questions_by_user(user, "earlier events"):
            events = group[np.asarray(log.slice(row).item)]
            width = len(events) + 1
            # Sorted by category, then place: the events of a category before a place are a range.
            key = np.sort(np.where(events < 0, -1, events) * width + np.arange(len(events)))
            wanted, stop = group[item[chosen]], seen[chosen]
            known = wanted >= 0
            end = np.searchsorted(key, wanted * width + stop)
            count[chosen] = np.where(known, end - np.searchsorted(key, wanted * width), 0)
            has = count[chosen] > 0
            newest[chosen[has]] = stop[has] - 1 - key[end[has] - 1] % width
            for n, counts in recent.items():
                begin = np.searchsorted(key, wanted * width + np.maximum(stop - n, 0))
                counts[chosen] = np.where(known, end - begin, 0)
        return cls(count, newest, recent)


def questions_by_user(user: Int, desc: str) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Each user's row and the places int64 [n] of its questions; user: int64 [N]; desc: of the progress bar."""
    order = np.argsort(user, kind="stable")
    bounds = np.flatnonzero(np.diff(user[order], prepend=-1, append=-1))
    ranges = list(pairwise(bounds.tolist()))
    for low, high in progress_bar(ranges, desc=desc, unit="user", leave=False):
        yield int(user[order[low]]), order[low:high]
