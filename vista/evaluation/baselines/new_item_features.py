"""What trees learn from about items that are new to a user.

Letters: n users, C candidates per user, F features, V items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.baselines.ease import Ease
from vista.evaluation.baselines.item_neighbors import ItemNeighbors
from vista.evaluation.baselines.pooled_means import factor_vectors, pooled_means
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.gaps import DAY_MS

_CANDIDATES = 2000
"""Most items per user: the new ones with the largest score of item neighbors."""
_DIM = 64
_RECENT_DAYS = 30
_DECIMALS = 9


@dataclass(frozen=True, slots=True)
class Candidates:
    """Items that may be the user's next new ones, the best by item neighbors first."""

    item: Int
    """int64 [n, C] rows of the log, distinct per user."""
    is_new: NDArray[np.bool_]
    """bool [n, C]: the user did not have the item. A user who had almost all items has some that are not new."""
    value: Floats
    """float64 [n, C, F]: log(1 + x) of the place among the candidates, the length of the history, and the popularity;
    scores of item neighbors and EASE; cosines with the means of item factors over the last 32, the last 200, and all
    events. In a log with times also log(1 + x) of the item's events in the last 30 days."""


class NewItemFeatures:
    """Features from the first `counts` events of each user of a log."""

    def __init__(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._neighbors, self._ease = ItemNeighbors(), Ease()
        self._neighbors.fit(log, counts, rng)
        self._ease.fit(log, counts, rng)
        self._vectors = factor_vectors(log, counts, _DIM, int(rng.integers(1 << 31)))
        self._popularity = np.log1p(item_counts(log, counts))
        self._recent = _RecentEvents(log, counts) if log.has_time else None

    def candidates(self, user: Int, seen: Int, now: Int | None) -> Candidates:
        """The candidates of users [n] after their first `seen` events, at the times `now` (see `CountingBaseline`)."""
        had = had_items(self._log, user, seen)
        neighbors = self._neighbors.scores(user, seen, now)
        item = np.argsort(-np.where(had, -np.inf, neighbors), axis=1, kind="stable")[:, :_CANDIDATES]
        means = pooled_means(self._log, self._vectors, user, seen)[:3]
        dense = [neighbors, self._ease.scores(user, seen, now), *(mean @ self._vectors.T for mean in means)]
        logs = [np.arange(item.shape[1]), seen[:, None]]
        columns = [np.broadcast_to(np.log1p(each), item.shape) for each in logs]
        columns += [self._popularity[item], *(np.take_along_axis(each, item, axis=1) for each in dense)]
        if self._recent is not None:
            time = self._recent.newest(user, seen) if now is None else now
            columns.append(np.log1p(self._recent.count(item, time)))
        # Products depend on the batch in their last digits, which must not move a value across a tree's threshold.
        value = np.round(np.stack(columns, axis=2), _DECIMALS)
        return Candidates(item, ~np.take_along_axis(had, item, axis=1), value)


class _RecentEvents:
    """Counts the events of an item in the 30 days up to a time, over all users."""

    def __init__(self, log: EventLog, counts: Int) -> None:
        events = log.gather(np.arange(log.num_users), counts, features=False)
        self._log = log
        self._latest = int(events.timestamp.max(initial=0))
        self._origin = int(events.timestamp.min(initial=self._latest))
        self._span = self._latest - self._origin + 1
        self._keys = np.sort(events.item.astype(np.int64) * self._span + events.timestamp - self._origin)

    def newest(self, user: Int, seen: Int) -> Int:
        """int64 [n]: the times of each user's newest event (ms); of the newest of all for users without one."""
        newest = self._log.gather_ranges(user, seen - 1, seen)
        out = np.full(len(user), self._latest)
        out[newest.owner] = newest.timestamp
        return out

    def count(self, item: Int, time: Int) -> Int:
        """int64 [n, C] for items [n, C] and times [n]."""

        def before(end: Int) -> Int:
            return np.searchsorted(self._keys, item * self._span + np.clip(end - self._origin, 0, self._span)[:, None])

        return before(time + 1) - before(time + 1 - _RECENT_DAYS * DAY_MS)


def had_items(log: EventLog, user: Int, seen: Int) -> NDArray[np.bool_]:
    """bool [n, V]: the items of the first `seen` events of users [n]."""
    events = log.gather(user, seen, features=False)
    had = np.zeros((len(user), log.num_items), np.bool_)
    had[events.owner, events.item] = True
    return had
