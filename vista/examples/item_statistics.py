"""What is counted in a log: events and users of items, factors from which training starts, counters of histories."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int, offsets_of
from vista.config.model_config import PREVIOUS, parts_of
from vista.counters.counters import CounterCodes, OccurrenceIndex
from vista.counters.keys import ItemKeys, UserCounters
from vista.log.histories import DAY_MS, Histories, ranges
from vista.log.splits import EVENTS_PER_BLOCK, random_users_counts, visible_blocks

if TYPE_CHECKING:
    from vista.log.event_log import EventLog

logger = logging.getLogger(__name__)


def item_frequency(
    log: EventLog,
    item_rows: NDArray[np.int64],
    counts: NDArray[np.int64],
    has_features: NDArray[np.bool_] | None = None,
) -> NDArray[np.int64]:
    """Training events of each model row, as negatives are drawn by them.

    Args:
        item_rows: int64 [num_items], the model row of each of the log's items; 0 is the unknown item.
        counts: int64 [num_users], visible events per user.
        has_features: bool [at least largest row + 1], rows with a vector even without training events.

    Returns:
        int64 [largest row + 1].
    """
    frequency = np.zeros(int(item_rows.max(initial=0)) + 1, np.int64)
    np.add.at(frequency, item_rows, item_counts(log, counts))
    frequency[0] = 0  # the unknown item is never a label, so it must not be a negative
    if frequency.any():
        # With a random vector, an item without training events must be a negative, as often as the rarest items are.
        # Nothing else would keep it out of the top of users' lists.
        is_random = frequency == 0
        is_random[0] = False
        if has_features is not None:
            is_random &= ~has_features[: len(frequency)]
        frequency[is_random] = 1
    return frequency


def item_counts(
    log: EventLog, counts: NDArray[np.int64] | None = None, *, block_events: int = EVENTS_PER_BLOCK
) -> NDArray[np.int64]:
    """Events of each item among the first counts[u] events of every user u.

    Args:
        counts: int64 [num_users]; None counts all events.
        block_events: events that are read at once.

    Returns:
        int64 [num_items].
    """
    total = np.zeros(log.num_items, np.int64)
    for block in visible_blocks(log, log.lengths if counts is None else counts, block_events):
        total += np.bincount(block.item, minlength=log.num_items)
    return total


# How popular items are as of a time: what the retrieval head reads of an item besides its vector.
#
# There is a statistic for all events of an item and, in a log with times, two for each of RECENT_DAYS: events in these
# days, and users whose first event of the item lies in them. A statistic is log(1 + count), standardized at each time
# over the items with an event before it. So its scale is the same early in a log, late in it, and in serving.
#
# A training question must not see what came after it, so statistics are known as of at most MOST_TIMES times, and a
# question reads those of the newest one that is not later. Between two of these times the counts of most items do not
# change, so only changes are stored.
#
# Letters: T times, S statistics, C changes, R rows.

RECENT_DAYS = (30, 7)
MOST_TIMES = 64
"""Most times before the end of the training part as of which statistics are known. They are at least a day apart."""
LEAST_DEVIATION = 0.2
"""Least standard deviation that statistics are divided by. Early in a log, most of its items have one event. Without a
limit, items without events would be arbitrarily far from them."""
ROWS_AT_ONCE = 8192


def num_statistics(*, has_time: bool) -> int:
    """S, the number of statistics of an item in a log with or without times."""
    return 1 + 2 * len(RECENT_DAYS) * has_time


class ItemStatistics:
    """Statistics of items as of some times of the training part of a log."""

    def __init__(
        self,
        log: EventLog,
        item_rows: Int,
        counts: Int,
        *,
        most_times: int = MOST_TIMES,
        block_events: int = EVENTS_PER_BLOCK,
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [num_users], visible events per user. Nothing after them is read.
            most_times: most times before the end of the visible events as of which statistics are known.
            block_events: events that are read at once.
        """
        self._has_time = log.has_time
        self._width = int(item_rows.max(initial=0)) + 1
        self.time = np.full(1, np.iinfo(np.int64).min)
        """int64 [T] ms, ascending: as of each, statistics are those of the events before it. The first is the smallest
        int64, and the last the end of the training part. A log without times has one, which has all events."""
        if log.has_time and counts.any():
            blocks = (block.timestamp for block in visible_blocks(log, counts, block_events) if block.num_events)
            first, last = zip(*((int(times.min()), int(times.max())) for times in blocks), strict=True)
            begin, end = min(first), max(last) + 1
            step = max(DAY_MS, -(-(end - begin) // most_times))
            self.time = np.concatenate([self.time, np.arange(begin + step, end, step), [end]])

        size, num_times = num_statistics(has_time=log.has_time), len(self.time)
        keys = (self._changes(block, item_rows) for block in visible_blocks(log, counts, block_events))
        key, number = distinct_counts(keys)
        cell, leaves = np.divmod(key, 2)
        self._place, change = np.unique(cell // size, return_inverse=True)
        """int64 [C] row * T + time of the changes."""
        total = np.zeros((1 + len(self._place), size), np.int64)
        np.add.at(total, (1 + change, cell % size), (1 - 2 * leaves) * number)
        np.cumsum(total, axis=0, out=total)
        # The sums run over all rows, so those of the rows before are subtracted.
        begin_of_row = np.searchsorted(self._place, self._place // num_times * num_times)
        self._logs = np.log1p(np.append(total[1:] - total[begin_of_row], total[:1], axis=0)).astype(np.float32)
        """float32 [C + 1, S] after each change; the last row is that of items before their first event."""
        self._mean, self._deviation = self._moments()
        """float32 [T, S] each."""

    def latest(self, num_rows: int) -> Float32s:
        """float32 [num_rows, S] as of the end of the training part; 0 for the unknown item."""
        values: Float32s = self._standardized(np.arange(num_rows), np.array([len(self.time) - 1]))[0]
        values[0] = 0
        return values

    def as_of(self, asked: Int, rows: Int) -> tuple[Int, Float32s]:
        """Statistics for questions at any times.

        Args:
            asked: int64 [n] ms of the questions.
            rows: int64 [R] model rows.

        Returns:
            int64 [T'] ms, ascending: a question reads the statistics of the newest time that is not later; and float32
            [T', R, S] the statistics as of each.
        """
        times = np.unique(np.searchsorted(self.time, asked, side="right") - 1)
        return self.time[times], self._standardized(rows, times)

    def of_items(self, asked: Int, rows: Int) -> Float32s:
        """float32 [n, S]: statistics of one item per question; model rows int64 [n] and ms int64 [n]."""
        time = np.searchsorted(self.time, asked, side="right") - 1
        place = rows * len(self.time) + time
        change = np.searchsorted(self._place, place, side="right") - 1  # the newest one, if it is of the same item
        is_own = (change >= 0) & (self._place[change] // len(self.time) == rows) if len(self._place) else change >= 0
        values: Float32s = (self._logs[np.where(is_own, change, -1)] - self._mean[time]) / self._deviation[time]
        return values

    def _changes(self, histories: Histories, item_rows: Int) -> Int:
        """Keys ((row * T + time) * S + statistic) * 2 + 1 if an event leaves the statistic, + 0 if it enters it."""
        row, size, num_times = item_rows[histories.item], num_statistics(has_time=self._has_time), len(self.time)
        known = np.flatnonzero(row > 0)
        first = known[np.unique((histories.owner * self._width + row)[known], return_index=True)[1]]
        place = row * num_times  # of a log without times
        if self._has_time:
            place = place + np.searchsorted(self.time, histories.timestamp, side="right")
        keys = [place[known] * size * 2]
        for index, days in enumerate(RECENT_DAYS if self._has_time else ()):
            until = np.searchsorted(self.time, histories.timestamp + days * DAY_MS, side="right")
            for statistic, events in ((1 + 2 * index, known), (2 + 2 * index, first)):
                leaving = events[until[events] < num_times]
                keys.append((place[events] * size + statistic) * 2)
                keys.append(((row[leaving] * num_times + until[leaving]) * size + statistic) * 2 + 1)
        return np.concatenate(keys)

    def _logs_at(self, rows: Int, times: Int) -> Float32s:
        """float32 [T', R, S] log(1 + count) of model rows int64 [R] as of the times with indices int64 [T']."""
        num_times = len(self.time)
        begin, end = (np.searchsorted(self._place, row * num_times) for row in (rows, rows + 1))
        changes = np.zeros((len(rows), num_times), np.int32)
        changes[np.repeat(np.arange(len(rows)), end - begin), self._place[ranges(begin, end - begin)] % num_times] = 1
        number = changes.cumsum(1)[:, times]
        logs: Float32s = self._logs[np.where(number > 0, begin[:, None] + number - 1, -1).T]
        return logs

    def _moments(self) -> tuple[Float32s, Float32s]:
        """Mean and standard deviation, at least LEAST_DEVIATION, over the items with events: float32 [T, S] each."""
        every, shape = np.arange(len(self.time)), (len(self.time), self._logs.shape[1])
        number, total, squares = np.zeros((shape[0], 1)), np.zeros(shape), np.zeros(shape)
        for first in range(1, self._width, ROWS_AT_ONCE):
            logs = self._logs_at(np.arange(first, min(first + ROWS_AT_ONCE, self._width)), every)
            number += (logs[..., :1] > 0).sum(1)
            logs = logs * (logs[..., :1] > 0)
            total, squares = total + logs.sum(1, np.float64), squares + np.square(logs).sum(1, np.float64)
        mean = total / np.maximum(number, 1)
        deviation = np.sqrt(np.maximum(squares / np.maximum(number, 1) - mean**2, 0))
        return mean.astype(np.float32), np.maximum(deviation, LEAST_DEVIATION).astype(np.float32)

    def _standardized(self, rows: Int, times: Int) -> Float32s:
        """float32 [T', R, S] of model rows int64 [R] as of the times with indices int64 [T']."""
        values = self._logs_at(rows, times)
        values -= self._mean[times, None]
        values /= self._deviation[times, None]
        return values


# How often two items lie close together in the histories of a log, counted in blocks of users.
#
# Letters: P pairs of items, T events of a block.

REACH = 15
"""Two events of a history form a pair if one comes at most this many positions after the other."""
NUM_RECENT = 8
"""Newest events of a request whose items' followers are summed (`vista.examples.transitions`)."""
RECENT_DECAY = 0.7
"""Weight of an event relative to the one after it, among those before the newest."""
BLOCK_EVENTS = 1 << 19
"""Events whose pairs are counted at once (a longer history is read alone)."""


class PairCounts(NamedTuple):
    """How often two different items form a pair, in any order."""

    low: Int
    """int64 [P], the smaller row; ascending."""
    high: Int
    """int64 [P], the larger row; ascending for each `low`."""
    times: Int
    """int64 [P]."""


def pair_counts(
    log: EventLog, item_rows: Int, counts: Int, *, most_events: int, rng: np.random.Generator
) -> PairCounts:
    """Count the pairs of different items within REACH events of each other.

    Args:
        item_rows: int64 [log.num_items], a row for each of the log's items; pairs with row 0 are not counted.
        counts: int64 [num_users], visible events per user. Nothing after them is read.
        most_events: count the pairs of random users if there are more events. Memory grows with the number of distinct
            pairs, which is at most REACH per event.
        rng: chooses these users.
    """
    counts = random_users_counts(counts, most_events, rng, "pairs of items are counted among", least=2)
    width = int(item_rows.max(initial=0)) + 1
    blocks = visible_blocks(log, counts, BLOCK_EVENTS)
    key, times = distinct_counts(_near_keys(block, item_rows, width) for block in blocks)
    return PairCounts(key // width, key % width, times)


def distinct_counts(blocks_of_keys: Iterable[Int]) -> tuple[Int, Int]:
    """The distinct keys int64 (at least 0), ascending, and how often each occurs, int64."""
    key, times = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for keys in blocks_of_keys:
        if keys.max(initial=-1) < 2 * len(keys):  # counting is then faster than sorting
            count = np.bincount(keys)
            new, count = np.flatnonzero(count), count[count > 0]
        else:
            new, count = np.unique(keys, return_counts=True)
        both = np.concatenate([key, new])
        order = np.argsort(both, kind="stable")  # merges two sorted runs, in linear time
        both = both[order]
        first = np.flatnonzero(np.diff(both, prepend=-1))
        key, times = both[first], np.add.reduceat(np.concatenate([times, count])[order], first)
    return key, times


def _near_keys(histories: Histories, item_rows: Int, width: int) -> Int:
    """low * width + high of every pair."""
    item, owner = item_rows[histories.item], histories.owner
    keys = []
    for distance in range(1, REACH + 1):
        a, b = item[:-distance], item[distance:]
        near = (owner[:-distance] == owner[distance:]) & (a != b) & (a > 0) & (b > 0)
        keys.append(np.minimum(a[near], b[near]) * width + np.maximum(a[near], b[near]))
    return np.concatenate(keys)


# Item vectors without a model: a factorization of which items lie close together in the training histories.
#
# Positive pointwise mutual information with a smoothed context distribution (Levy, Goldberg, and Dagan, TACL 2015),
# factorized by a randomized SVD (Halko, Martinsson, and Tropp, SIAM Review 2011). Letters: R items with pairs, M model
# dim, P pairs of items, S columns of the sketch.

SMOOTHING = 0.75
"""Exponent of the context counts. Below 1, rare contexts weigh less."""
MOST_EVENTS = 1 << 20
"""Events whose pairs are counted: those of random users if there are more. It bounds the memory: about 1 GB."""
OVERSAMPLING = 16
"""Columns of the sketch beyond M."""
POWER_ITERATIONS = 4


def item_factors(log: EventLog, item_rows: Int, counts: Int, dim: int, *, seed: int) -> tuple[Int, NDArray[np.float32]]:
    """Factorize the co-occurrences of items among the visible events.

    Items whose pairs are all rarer than chance have no vector, like those without pairs.

    Args:
        item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
        counts: int64 [num_users], visible events per user. Nothing after them is read.
        dim: number of columns M.
        seed: of the sketch, and of the choice of users.

    Returns:
        Sorted model rows int64 [R], and their vectors float32 [R, M] of length 1.
    """
    rng = np.random.default_rng(seed)
    low, high, times = pair_counts(log, item_rows, counts, most_events=MOST_EVENTS, rng=rng)
    rows, index = np.unique(np.concatenate([low, high]), return_inverse=True)
    if not len(rows):
        return rows, np.zeros((0, dim), np.float32)
    first, second = index[: len(low)], index[len(low) :]
    # Both orders of a pair, sorted as a coalesced tensor needs them.
    left, right, twice = np.concatenate([first, second]), np.concatenate([second, first]), np.tile(times, 2)
    order = np.lexsort((right, left))
    value = _ppmi(left, right, twice, len(rows))
    vectors = _factorized(left[order], right[order], value[order], len(rows), dim, seed)
    length = np.linalg.norm(vectors, axis=1)
    kept = length > 1e-6 * length.max()
    return rows[kept], (vectors[kept] / length[kept, None]).astype(np.float32)


def _ppmi(left: Int, right: Int, count: Int, size: int) -> NDArray[np.float32]:
    """max(0, log(N_ij * sum_k n_k^s / (n_i * n_j^s))) of each ordered pair, where s is SMOOTHING."""
    total = np.bincount(left, count, size)
    context = total**SMOOTHING
    ratio = count * context.sum() / (total[left] * context[right])
    value: NDArray[np.float32] = np.maximum(np.log(ratio), 0).astype(np.float32)
    return value


def _factorized(
    left: Int, right: Int, value: NDArray[np.float32], size: int, dim: int, seed: int
) -> NDArray[np.float64]:
    """U sqrt(S) [size, dim] of the truncated SVD of a sparse matrix whose entries are sorted by row and column."""
    import torch  # counting does not need it

    index, values = torch.from_numpy(np.stack([left, right])), torch.from_numpy(value)
    matrix = torch.sparse_coo_tensor(index, values, (size, size), is_coalesced=True, check_invariants=False)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed GPUs, too
        basis, scale, _ = torch.svd_lowrank(matrix, q=min(dim + OVERSAMPLING, size), niter=POWER_ITERATIONS)
    found = (basis * scale.sqrt())[:, :dim].double().numpy()
    return np.pad(found, ((0, 0), (0, dim - found.shape[1])))


# Counters as requests read them, made from whole histories: for training, and for evaluation without a store.
#
# A request reads a record, which holds the counters of the first events of a history, quantized. The scorer advances
# them to the time of the request, and adds the newer events of the tail. What follows here is that computation, by the
# same code, for requests at any place of a history. Letters: B histories, T events, n requests, G fields, F values per
# key.


@dataclass(frozen=True, slots=True)
class CounterRequests:
    """Requests on histories: what the record covers, what of the rest the tail holds, and when."""

    history: Int
    """int64 [n] from 0."""
    covered: Int
    """int64 [n] events that the record covers."""
    tail_start: Int
    """int64 [n] position of the tail's first event. Events between the record and the tail are not counted, because
    nobody tells the scorer of them."""
    seen: Int
    """int64 [n] events before the request."""
    now: Int
    """int64 [n] times in ms."""
    is_timed: NDArray[np.bool_]
    """bool [n]: False where the caller passes no time. Counters are then those of the newest event."""

    @property
    def first(self) -> Int:
        """int64 [n] position of the first event that is added to the record's counters."""
        return np.minimum(np.maximum(self.covered, self.tail_start), self.seen)


class WholeHistories(NamedTuple):
    """The first events of H users of a log, from each history's first event on."""

    item: Int
    """int64 [T] model rows."""
    action: NDArray[np.uint8]
    """[T] codes."""
    time: Int
    """int64 [T] ms."""
    offsets: Int
    """int64 [H + 1]."""
    user: Int
    """int64 [H] distinct rows of the log, ascending."""
    history: Int
    """int64 [n] the history of each entry that was asked for."""

    @classmethod
    def of(cls, log: EventLog, item_rows: Int, user: Int, stop: Int) -> WholeHistories:
        """Those of some users.

        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            user: int64 [n] rows of the log; repeats are allowed.
            stop: int64 [n]; only the first stop[i] events of user[i] are read.
        """
        users, history = np.unique(user, return_inverse=True)
        last = np.zeros(len(users), np.int64)
        np.maximum.at(last, history, stop)
        events = log.gather_ranges(users, np.zeros_like(last), last, features=False)
        times = np.asarray(events.timestamp)
        return cls(item_rows[events.item], events.action, times, events.offsets, users, history)


class HistoryCounters:
    """Counters of B histories, at any place."""

    def __init__(self, keys: ItemKeys, item: Int, action: NDArray[Any], time: Int, offsets: Int) -> None:
        """
        Args:
            keys: what records hold, and what the items are counted as.
            item: int64 [T] model rows, from each history's first event on; action: int [T] codes; time: int64 [T] ms.
            offsets: int64 [B + 1].
        """
        self._keys, self._item, self._time, self._offsets = keys, item, time, offsets
        self._events = keys.of_events(item, action, time, offsets)
        """int64 [T] keys of the events, per field."""
        self._indices = [OccurrenceIndex(keys.spec, key, time, offsets) for key in self._events]

    @classmethod
    def of(cls, keys: ItemKeys, histories: WholeHistories) -> HistoryCounters:
        """Counters of some users of a log."""
        return cls(keys, histories.item, histories.action, histories.time, histories.offsets)

    def at(self, requests: CounterRequests) -> UserCounters:
        """The counters of each request."""
        stored, record = self._stored(requests)
        index, offsets, now = self._added(requests, stored[0].clock[record])
        codes, *others = [
            one.select(record).advanced(now, key, self._time[index], offsets)
            for one, key in zip(stored, self._keys_of_added(requests, index, offsets), strict=True)
        ]
        num_events, newest = requests.covered + np.diff(offsets), self._newest(requests)
        return UserCounters(codes, num_events, tuple(others), self._keys, newest)

    def of_items(self, requests: CounterRequests, item: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, G * F + 1] of one item int64 [n] per request (`UserCounters.of_pairs`). Those of `at`, but in
        half the time, and in memory for one item per request."""
        stored, record = self._stored(requests)
        index, offsets, now = self._added(requests, stored[0].clock[record])
        own, newest = [], self._newest(requests)
        of_added = self._keys_of_added(requests, index, offsets)
        for one, wanted, key in zip(stored, self._keys.of(item, now, newest), of_added, strict=True):
            codes = one.lookup(record, wanted)
            has_codes = codes.any(1)
            bounds = offsets_of(np.asarray(has_codes, np.int64))
            held = wanted[has_codes].astype(np.int32)
            found = CounterCodes(one.spec, held, codes[has_codes], bounds, one.clock[record])
            # Other keys are events too, but not counted: as the unknown item.
            new = np.where(key == np.repeat(wanted, np.diff(offsets)), key, 0)
            own.append(found.advanced(now, new, self._time[index], offsets))
        counters = UserCounters(own[0], requests.covered + np.diff(offsets), tuple(own[1:]), self._keys, newest)
        return counters.of_pairs(np.arange(len(item)), item)

    def _stored(self, requests: CounterRequests) -> tuple[list[CounterCodes], Int]:
        """What records hold in each field, and int64 [n], the record of each request."""
        records, record = np.unique(np.stack([requests.history, requests.covered]), axis=1, return_inverse=True)
        tables = [index.table(records[0], records[1]) for index in self._indices]
        return [table.top(most).codes() for table, most in zip(tables, self._keys.spec.keys, strict=True)], record

    def _newest(self, requests: CounterRequests) -> Int:
        """int64 [n] items of the newest events before the requests; 0 for none."""
        place = self._offsets[requests.history] + requests.seen - 1
        return np.where(requests.seen > 0, np.append(self._item, 0)[place], 0)

    def _keys_of_added(self, requests: CounterRequests, index: Int, offsets: Int) -> list[Int]:
        """Keys int64 [N], per field, of the events that are added (`_added`)."""
        start = np.repeat(self._offsets[requests.history] + requests.tail_start, np.diff(offsets))
        # The scorer does not know which event came before the tail.
        is_first, fields = index == start, self._keys.spec.fields
        return [
            np.where(is_first, 0, key[index]) if PREVIOUS in parts_of(field) else key[index]
            for field, key in zip(fields, self._events, strict=True)
        ]

    def _added(self, requests: CounterRequests, clock: Int) -> tuple[Int, Int, Int]:
        """The events that are added, int64 [N], their offsets int64 [n + 1], and the times of the requests int64 [n].
        `clock`: int64 [n] of the records."""
        first = requests.first
        index = ranges(self._offsets[requests.history] + first, requests.seen - first)
        offsets = offsets_of(requests.seen - first)
        newest = clock.copy()
        has_new = np.flatnonzero(requests.seen > first)
        newest[has_new] = np.maximum(clock[has_new], self._time[index[offsets[has_new + 1] - 1]])
        return index, offsets, np.where(requests.is_timed, requests.now, newest)
