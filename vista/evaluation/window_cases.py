"""What users do in a window after a question: the next N events, or the next days.

Letters: N cases, L labels of all cases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS
from vista.log.histories import Histories, token_groups
from vista.log.splits import EVENTS_PER_BLOCK


@dataclass(frozen=True, slots=True)
class WindowCases:
    """One question per user, with the distinct items of the window that follows."""

    user: Int
    """int64 [N] rows of the log."""
    seen: Int
    """int64 [N] visible events before the question."""
    now: Int | None
    """int64 [N] times of the questions (ms), or None if the split gives no time."""
    item: Int
    """int64 [L] labels: rows of the log, distinct and ascending per case."""
    is_new: NDArray[np.bool_]
    """bool [L]: the item is not among the visible events before the question."""
    offsets: Int
    """int64 [N + 1]: the labels of case n are item[offsets[n]:offsets[n + 1]]."""

    def __len__(self) -> int:
        return len(self.user)

    def part(self, cases: slice) -> WindowCases:
        """Consecutive cases."""
        low, high, _ = cases.indices(len(self))
        labels = slice(self.offsets[low], self.offsets[high])
        now = None if self.now is None else self.now[low:high]
        offsets = self.offsets[low : high + 1] - self.offsets[low]
        return WindowCases(
            self.user[low:high], self.seen[low:high], now, self.item[labels], self.is_new[labels], offsets
        )


def window_cases(
    log: EventLog,
    seen: Int,
    end: Int | None,
    *,
    first: Int | None = None,
    horizon_events: int = 0,
    horizon_days: float = 0,
    now: int | None = None,
    min_seen: int,
    min_after: int,
    max_users: int = 0,
) -> WindowCases:
    """Ask every user with enough events what follows the question.

    All items of the window are labels, also those that a model does not know.

    Args:
        seen: int64 [num_users], events that are visible before the question (`part_counts`).
        end: int64 [num_users], where windows stop at the latest (in validation, at the test labels); None for the end
            of the log.
        first: int64 [num_users], events before the window; None if they are all visible.
        horizon_events: length of the window in events, or 0.
        horizon_days: length of the window in days, or 0, as in a log without times. The window begins at `now`, or
            without it at the time of the newest event before the question. Exactly one of the two lengths is above 0.
        now: time of the question in ms; None asks each user just after the newest event before it.
        min_seen: fewest visible events before the question, at least 1.
        min_after: fewest events between the start of the window and `end`, at least 1.
        max_users: draw at most so many users, the same ones at every call; 0 asks all.

    Raises:
        ValueError: if not exactly one length is positive.
    """
    if (horizon_events > 0) == (horizon_days > 0):
        raise ValueError(
            f"horizon_events={horizon_events}, horizon_days={horizon_days}: set exactly one of them above 0"
        )
    stop = log.lengths if end is None else end
    first = seen if first is None else first
    user = np.flatnonzero((seen >= min_seen) & (stop - first >= min_after))
    if max_users and len(user) > max_users:
        user = np.sort(np.random.default_rng(0).choice(user, max_users, replace=False))
    high = np.minimum(first + horizon_events, stop) if horizon_events else stop
    item, is_new, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)], [np.zeros(0, np.int64)]
    for part in token_groups(high[user], EVENTS_PER_BLOCK):
        rows = user[part]
        before = log.gather(rows, seen[rows], features=False)
        after = log.gather_ranges(rows, first[rows], high[rows], features=False)
        if horizon_days:
            begin = np.full(len(rows), now) if now is not None else before.timestamp[before.offsets[1:] - 1]
            after = _until(after, begin + math.ceil(horizon_days * DAY_MS))
        keys = distinct_items(after, log.num_items)
        owner, own = np.divmod(keys, log.num_items)
        item.append(own)
        is_new.append(~np.isin(keys, distinct_items(before, log.num_items), assume_unique=True))
        lengths.append(np.bincount(owner, minlength=len(rows)))
    return WindowCases(
        user,
        seen[user],
        None if now is None else np.full(len(user), now, np.int64),
        np.concatenate(item),
        np.concatenate(is_new),
        offsets_of(np.concatenate(lengths)),
    )


def _until(events: Histories, end: Int) -> Histories:
    """The leading events of each history strictly before a time, int64 [B]."""
    early = offsets_of(events.timestamp < np.repeat(end, events.lengths))
    return events.select(np.zeros(events.num_users, np.int64), np.diff(early[events.offsets]))


def distinct_items(events: Histories, num_items: int) -> Int:
    """int64: number of the history times num_items plus item, ascending, each once."""
    return np.unique(events.owner * num_items + events.item)
