"""The cases that quality is measured on: next items and labeled impressions, each with the events that come before.

Letters: N cases.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.config import DataConfig
from vista.examples.batch_source import Examination, events_before
from vista.examples.item_statistics import CounterRequests, WholeHistories
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS, Histories, RowFeatures, token_groups
from vista.log.splits import EVENTS_PER_BLOCK
from vista.progress_bar import progress_bar


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
    """[N, num_tasks]: True where the label is known, by the end of the cases if they have one."""
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
    """The first label of every user that has one, which is an active event.

    Args:
        seen: int64 [num_users], events that are visible.
        first: int64 [num_users], events before the label; None if they are all visible.
        end: int64 [num_users]: only events before it can be labels (in validation, those before the test labels); None
            allows all events.
        max_users: draw at most so many users, the same ones at every call; 0 takes all.
    """
    active, first = log.active, log.active_counts(seen if first is None else first)
    users = np.flatnonzero(first < (active.lengths if end is None else log.active_counts(end)))
    if max_users and len(users) > max_users:
        users = np.sort(np.random.default_rng(0).choice(users, max_users, replace=False))
    labels = active.gather_ranges(users, first[users], first[users] + 1, features=False)
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
        table.known(chosen, np.iinfo(np.int64).max if end is None else end),
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
    log: EventLog,
    item_rows: Int,
    user: Int,
    seen: Int,
    now: Int | None,
    *,
    covered: Int | None = None,
    tail_len: int = 0,
) -> tuple[WholeHistories, CounterRequests]:
    """The histories of n cases, and requests on them as a store's records and a scorer's requests would have them.

    Args:
        log: holds the histories.
        item_rows: int64 [log.num_items], the model row of each of the log's items.
        user: int64 [n] rows of the log.
        seen: int64 [n] events before the question.
        now: int64 [n] ms of the questions; None if they have no time.
        covered: int64 [n] events that the user's record covers; None for all that come before the question.
        tail_len: newest events before the question that a request passes. Of these, the scorer counts those that the
            record lacks.
    """
    histories = WholeHistories.of(log, item_rows, user, seen)
    return histories, CounterRequests(
        histories.history,
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


def looks_at(log: EventLog, cases: ImpressionCases, examined_tasks: list[str], data: DataConfig) -> Float32s:
    """Probabilities float32 [N, num_tasks] that users looked at impressions, as the training of a model assumed: the
    scores times these are probabilities of the labels. 1 for tasks that are not in `examined_tasks`.

    Raises ConfigError if the log has neither positions nor propensities."""
    found = Examination.of(log, examined_tasks, data, cases.tasks)
    return np.ones_like(cases.label) if found is None else found.of_rows(cases.features)


def cases_digest(log: EventLog, user: Int, item: Int, *numbers: Int | None) -> str:
    """SHA-256 of the ids of users and labels, and of other numbers: equal for copies of one log."""
    digest = hashlib.sha256()
    for ids in (log.users.ids(user).tolist(), log.items.ids(item).tolist()):
        digest.update(f"{len(ids)}\0{chr(0).join(map(str, ids))}".encode())
    for each in numbers:
        digest.update(b"none" if each is None else each.astype("<i8").tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, slots=True)
class WindowCases:
    """One question per user, with the distinct items of the window that follows. Letters: L labels of all cases."""

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

    All items of the window are labels, also those that a model does not know. Its events, and those that the least
    numbers count, are active ones (`EventLog.active`).

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
    active, known = log.active, log.active_counts(seen)
    first = known if first is None else log.active_counts(first)
    stop = active.lengths if end is None else log.active_counts(end)
    user = np.flatnonzero((known >= min_seen) & (stop - first >= min_after))
    if max_users and len(user) > max_users:
        user = np.sort(np.random.default_rng(0).choice(user, max_users, replace=False))
    high = np.minimum(first + horizon_events, stop) if horizon_events else stop
    item, is_new, lengths = [np.zeros(0, np.int64)], [np.zeros(0, np.bool_)], [np.zeros(0, np.int64)]
    for part in token_groups(high[user], EVENTS_PER_BLOCK):
        rows = user[part]
        before = active.gather(rows, known[rows], features=False)
        after = active.gather_ranges(rows, first[rows], high[rows], features=False)
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
