"""The cases that quality is measured on: next items and labeled impressions, each with the events that come before.

Letters: N cases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.counters.counter_codes import ItemKeys
from vista.examples.batch_source import events_before
from vista.examples.history_counters import CounterRequests, HistoryCounters
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures


@dataclass(frozen=True, slots=True)
class NextItemCases:
    """Next items to rank, one per user."""

    user: Int
    """int64 [N] rows of the log."""
    seen: Int
    """int64 [N] visible events before the label."""
    item: Int
    """int64 [N] labels, rows of the log."""
    now: Int | None
    """int64 [N] times of the labels (ms), when the users are asked; None in a log without times."""

    def __len__(self) -> int:
        return len(self.user)

    def part(self, cases: slice) -> NextItemCases:
        """Consecutive cases."""
        now = None if self.now is None else self.now[cases]
        return NextItemCases(self.user[cases], self.seen[cases], self.item[cases], now)


@dataclass(frozen=True, slots=True)
class ImpressionCases:
    """Impressions to predict the labels of."""

    user: Int
    """int64 [N] rows of the log."""
    seen: Int
    """int64 [N] events strictly before the impression."""
    item: Int
    """int64 [N] rows of the log."""
    timestamp: Int
    """int64 [N] ms."""
    label: Float32s
    """[N, num_tasks]."""
    mask: NDArray[np.bool_]
    """[N, num_tasks]: True where the label is known."""
    probability: Float32s | None
    """[N, num_tasks] true probabilities of a simulated log."""
    tasks: list[str]
    features: RowFeatures
    """Of the requests and their candidates, N rows with the log's codes."""

    def part(self, cases: slice | Int) -> ImpressionCases:
        """Some of the cases."""
        names = ("user", "seen", "item", "timestamp", "label", "mask")
        probability = None if self.probability is None else self.probability[cases]
        own = {name: getattr(self, name)[cases] for name in names}
        return replace(self, **own, probability=probability, features=self.features.select(cases))


def next_item_cases(
    log: EventLog, seen: Int, first: Int | None = None, end: Int | None = None, *, max_users: int = 0
) -> NextItemCases:
    """The first label of every user that has one.

    Args:
        seen: int64 [num_users], events that are visible.
        first: int64 [num_users], events before the label; None if they are all visible.
        end: int64 [num_users]: only events before it can be labels (in validation, those before the test labels); None
            allows all events.
        max_users: draw at most so many users, the same ones at every call; 0 takes all.
    """
    first = seen if first is None else first
    users = np.flatnonzero(first < (log.lengths if end is None else end))
    if max_users and len(users) > max_users:
        users = np.sort(np.random.default_rng(0).choice(users, max_users, replace=False))
    labels = log.gather_ranges(users, first[users], first[users] + 1, features=False)
    now = np.asarray(labels.timestamp) if log.has_time else None
    return NextItemCases(users, seen[users], np.asarray(labels.item).astype(np.int64), now)


def impression_cases(log: EventLog, begin: int, end: int | None, *, max_cases: int = 0) -> ImpressionCases:
    """Impressions of a log in [begin, end) ms, each with the number of events strictly before it.

    Args:
        max_cases: draw at most so many impressions, the same ones at every call; 0 takes all.

    Raises:
        ValueError: if the log has no impressions.
    """
    table = log.impressions
    if table is None:
        raise ValueError(f"{log.path} has no impressions; prepare it with impressions.*")
    time = np.asarray(table.timestamp)
    chosen = np.flatnonzero((time >= begin) & (time < end if end is not None else True))
    if max_cases and len(chosen) > max_cases:
        chosen = np.sort(np.random.default_rng(0).choice(chosen, max_cases, replace=False))
    user = np.searchsorted(table.offsets, chosen, side="right") - 1
    seen = np.zeros(len(chosen), np.int64)
    for low, high in pairwise(np.append(np.flatnonzero(np.diff(user, prepend=-1)), len(user)).tolist()):
        seen[low:high] = events_before(log, int(user[low]), time[chosen[low:high]], int(log.lengths[user[low]]))
    probability = None if table.probability is None else np.asarray(table.probability)[chosen]
    return ImpressionCases(
        user,
        seen,
        np.asarray(table.item)[chosen].astype(np.int64),
        time[chosen],
        np.asarray(table.label)[chosen].astype(np.float32),
        np.asarray(table.mask)[chosen].astype(np.bool_),
        probability,
        list(table.tasks),
        table.features.select(chosen),
    )


def request_starts(cases: ImpressionCases) -> Int:
    """int64 [R]: the first impression of each request, which is what a user was shown at one time."""
    starts = np.ones(len(cases.user), np.bool_)
    starts[1:] = (np.diff(cases.user) != 0) | (np.diff(cases.timestamp) != 0)
    return np.flatnonzero(starts)


def case_requests(
    keys: ItemKeys,
    log: EventLog,
    item_rows: Int,
    user: Int,
    seen: Int,
    now: Int | None,
    *,
    covered: Int | None = None,
    tail_len: int = 0,
) -> tuple[HistoryCounters, CounterRequests]:
    """Requests for the counters of n cases, as a store's records and a scorer's requests would have them.

    Args:
        keys: of the model.
        log: holds the histories.
        item_rows: int64 [log.num_items], the model row of each of the log's items.
        user: int64 [n] rows of the log.
        seen: int64 [n] events before the question.
        now: int64 [n] ms of the questions; None if they have no time.
        covered: int64 [n] events that the user's record covers; None for all that come before the question.
        tail_len: newest events before the question that a request passes. Of these, the scorer counts those that the
            record lacks.
    """
    histories, history = HistoryCounters.of(keys, log, item_rows, user, seen)
    return histories, CounterRequests(
        history,
        covered=seen if covered is None else covered,
        tail_start=np.maximum(seen - tail_len, 0),
        seen=seen,
        now=np.zeros_like(seen) if now is None else now,
        is_timed=np.full(len(user), now is not None),
    )


def with_tasks(cases: ImpressionCases, tasks: list[str]) -> ImpressionCases:
    """The same impressions, with only those of their tasks that are in `tasks`."""
    columns = [index for index, task in enumerate(cases.tasks) if task in tasks]
    probability = None if cases.probability is None else cases.probability[:, columns]
    return replace(
        cases,
        label=cases.label[:, columns],
        mask=cases.mask[:, columns],
        probability=probability,
        tasks=[cases.tasks[index] for index in columns],
    )
