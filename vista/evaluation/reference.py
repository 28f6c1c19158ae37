"""What is normal in the training data, window by window: the reference that `vista monitor` compares a window with.

The newest windows of the training data, of equal length, are read in the same way as a window of production. Each check
has one number per window, transformed so that it is about normal: the log of a count, the arcsine of a share, the cube
root of a population stability index, or a mean. Its mean and standard deviation over the R reference windows hold the
sampling error and the usual change from window to window. They say within which limits the next one lies (a prediction
interval of Student's t). The limits follow from `FALSE_ALARMS` alone, divided among all checks.

Letters: R reference windows, n rows of a window, U users, C candidates.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.errors import CheckpointError
from vista.files import read_limited, replace_text
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.histories import DAY_MS, NUM_GAPS, UNKNOWN_GAP, Histories, history_gaps
from vista.log.splits import visible_blocks
from vista.log.vocabulary import Vocabulary
from vista.model.saved_model import REFERENCE_FILE, checksum_of

FORMAT_VERSION = 1
MAX_BYTES = 4 << 20
"""Of reference.json."""
FALSE_ALARMS = 1e-4
"""Probability that any check of a healthy window raises an alarm."""
MOST_WINDOWS, LEAST_WINDOWS = 28, 8
LENGTHS_MS = (DAY_MS, 7 * DAY_MS, 28 * DAY_MS)
LEAST_EVENTS = 1000
"""Events per window from which a shorter window is preferred to a longer one."""
MAX_EVENTS = 1 << 21
"""Most events that are read of all windows of a reference, or of one window; of more, random users are read."""
NUM_BUCKETS = 32
"""Into which items are hashed by their ids, so that a change of the ids changes the shares of the buckets."""
MOST_VALUES = 20
"""Most values of a category that are counted one by one."""
NUM_SCORED_USERS, NUM_SCORED_ITEMS = 32, 32
HOUR_MS = DAY_MS // 24

KnownItems = Callable[[Int], NDArray[np.bool_]]
"""Whether a model knows items, by rows of the log."""


def student_quantile(tail: float, degrees: int) -> float:
    """The value that Student's t with integer degrees of freedom exceeds with probability `tail`, below 0.5."""
    if degrees > 200:
        return -NormalDist().inv_cdf(tail)
    low, high = 0.0, 1.0
    while _student_tail(high, degrees) > tail:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_tail(middle, degrees) > tail else (low, middle)
    return high


def _student_tail(value: float, degrees: int) -> float:
    """P(t > value), from the closed form of the distribution for integer degrees of freedom."""
    angle = math.atan(value / math.sqrt(degrees))
    term = total = math.cos(angle) if degrees % 2 else 1.0
    for index in range(3 if degrees % 2 else 2, degrees, 2):
        term *= math.cos(angle) ** 2 * (index - 1) / index
        total += term
    if degrees == 1:
        total = 0.0
    inside = math.sin(angle) * total
    return (1 - (2 / math.pi * (angle + inside) if degrees % 2 else inside)) / 2


@dataclass(frozen=True, slots=True)
class Check:
    """What is normal for one number of a window."""

    kind: str
    """amount | share | bins | mean"""
    mean: float
    """Of the transformed number over the reference windows."""
    deviation: float
    """Its standard deviation over them."""
    size: float
    """Mean number of rows that it was computed from."""
    num_windows: int
    """Reference windows that have it."""
    counts: list[int] = field(default_factory=list)
    """Of bins: the rows of all reference windows by bin."""
    edges: list[float] | list[str] = field(default_factory=list)
    """Of bins: bounds between numbers, or values of a category; others fall into the last bin."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What is normal per window of the training data."""

    window_ms: int
    num_windows: int
    first_ms: int
    """Time of the first event of the log."""
    end_ms: int
    """End of the last reference window."""
    items: list[int] | list[str]
    """Ids of C items that are scored for the users of each window; empty if no scores were recorded."""
    num_users: int
    """Most users of a window whose scores are recorded."""
    checks: dict[str, Check]

    def write(self, folder: Path) -> None:
        """Write it into the folder of a model. Raises OSError."""
        fields = {"format_version": FORMAT_VERSION, **asdict(self)}
        replace_text(folder / REFERENCE_FILE, json.dumps(fields | {"checksum": checksum_of(fields)}) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read that of a model. Raises CheckpointError if the model has none, or it is damaged or of another format."""
        path = folder / REFERENCE_FILE
        try:
            fields = json.loads(read_limited(path, MAX_BYTES))
            if fields.get("format_version") != FORMAT_VERSION or checksum_of(fields) != fields.pop("checksum", None):
                raise ValueError(f"its checksum does not match, or it is not of format {FORMAT_VERSION}")
            del fields["format_version"]
            checks = {name: Check(**each) for name, each in fields.pop("checks").items()}
            return cls(**fields, checks=checks)
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: has no {REFERENCE_FILE}, which `vista train` writes when it ends, for a vista model and a "
                f"log with times that covers {LEAST_WINDOWS} windows; train the model on such a log"
            ) from None
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); train the model again") from error

    def limit(self, name: str, size: float) -> float:
        """How far the transformed number of a healthy window may lie from the mean."""
        check = self.checks[name]
        variance = max(check.deviation**2, _sampling_variance(check, check.size))
        if size < check.size and check.kind != "amount":  # A window with fewer rows has a larger sampling error.
            variance += _sampling_variance(check, size) - _sampling_variance(check, check.size)
        tail = FALSE_ALARMS / len(self.checks) / (1 if is_one_sided(name, check) else 2)
        return student_quantile(tail, check.num_windows - 1) * math.sqrt(variance * (1 + 1 / check.num_windows))


def is_one_sided(name: str, check: Check) -> bool:
    """Whether only large values are unusual."""
    return check.kind == "bins" or name in ("unknown items", "duplicates")


def _sampling_variance(check: Check, size: float) -> float:
    """Least variance of a transformed number of `size` independent rows."""
    if check.kind == "amount":
        return 1 / max(size, 1.0)
    if check.kind == "share":
        return 1 / (4 * size + 2)
    if check.kind == "bins":  # Wilson and Hilferty: the cube root of a chi-square of k degrees.
        return check.mean**2 * 2 / (9 * max(len(check.counts) - 1, 1))
    return 1e-12 * (1 + check.mean**2)


@dataclass(frozen=True, slots=True)
class WindowRows:
    """The events and impressions of a window, as in the log."""

    log: EventLog
    begin: int
    end: int
    num_events: int
    num_users: int
    """Of all events; those below may be of some users only."""
    users: Int
    """int64 [U] rows of the log."""
    starts: Int
    """int64 [U] events before the window."""
    events: Histories
    """Of these users in the window."""
    impressions: Int
    """int64 rows of the log's impressions in the window."""

    @classmethod
    def read(cls, log: EventLog, begin: int, end: int, most: int = MAX_EVENTS) -> WindowRows:
        """Read a window [begin, end) in ms; of more than `most` events, those of random users."""
        before, after = log.counts_before(begin), log.counts_before(end)
        count = after - before
        users, total = np.flatnonzero(count), int(count.sum())
        num_users = len(users)
        if total > most:
            order = np.random.default_rng(0).permutation(users)
            users = np.sort(order[: max(1, int(np.searchsorted(np.cumsum(count[order]), most)))])
        events = log.gather_ranges(users, before[users], after[users])
        shown, rows = log.impressions, np.zeros(0, np.int64)
        if shown is not None:
            rows = np.flatnonzero((shown.timestamp >= begin) & (shown.timestamp < end))
        return cls(log, begin, end, total, num_users, users, before[users], events, rows)

    def columns(self) -> dict[str, Column]:
        """Features by name, with that of their owner: of events, their users and items, and impressions."""
        log, events, found = self.log, self.events, dict[str, Column]()
        for name, data in events.features.columns.items():
            found[f"event.{name}"] = Column(np.asarray(data), log.event_features[name])
        if events.rating is not None:
            found["event.rating"] = Column(events.rating)
        for name, column in log.user_features.items():
            found[f"user.{name}"] = column.select(self.users)
        for name, column in log.item_features.items():
            if column.kind == "vector":  # Only whether it is missing matters.
                column = Column(column.data[:, :1])
            found[f"item.{name}"] = column.select(np.asarray(events.item, np.int64))
        if log.impressions is not None:
            for name, data in log.impressions.features.columns.items():
                found[f"request.{name}"] = Column(np.asarray(data[self.impressions]), log.request_features[name])
        return found


@dataclass(frozen=True, slots=True)
class WindowNumber:
    """A number of a window."""

    kind: str
    """amount | share | bins | mean"""
    value: float = 0.0
    """The amount, the rows that a share counts, or the mean."""
    size: int = 0
    """Rows that it was computed from."""
    bins: Int | None = None
    """Rows by bin."""

    def transformed(self, check: Check) -> float:
        """What is compared; NaN without rows."""
        if self.kind == "amount":
            return math.log(max(self.value, 0.5))
        if not self.size:
            return math.nan
        if self.bins is not None:
            return float(np.cbrt(_scaled_index(self.bins, np.array(check.counts), check.size)))
        return arcsine(self.value, self.size) if self.kind == "share" else self.value

    def shown(self, check: Check) -> float:
        """The number as people know it: a count, a share, a population stability index, or a mean."""
        if self.bins is not None:
            return stability_index(self.bins, np.array(check.counts))
        return self.value / self.size if self.kind == "share" else self.value


WindowCounts = dict[str, WindowNumber]
"""The numbers of a window, by name."""


def share(value: float, size: int) -> WindowNumber:
    """A share of rows."""
    return WindowNumber("share", value, size)


def _bins(rows: Int) -> WindowNumber:
    return WindowNumber("bins", 0.0, int(rows.sum()), rows)


def arcsine(k: float, n: float) -> float:
    """The arcsine of a share k of n, whose variance is about 1 / (4 n + 2) (Anscombe, 1948)."""
    return math.asin(math.sqrt((k + 0.375) / (n + 0.75)))


def stability_index(own: Int, reference: Int) -> float:
    """Population stability index of counts [bins]: the sum of (p - q) ln(p / q), with half a row added to each bin."""
    p = (own + 0.5) / (own + 0.5).sum()
    q = (reference + 0.5) / (reference + 0.5).sum()
    return float(((p - q) * np.log(p / q)).sum())


def _scaled_index(own: Int, reference: Int, size: float) -> float:
    """The index, without the part that fewer rows than usual explain."""
    total = int(reference.sum())
    usual, here = 1 / size + 1 / total, 1 / int(own.sum()) + 1 / total
    return stability_index(own, reference) * min(1.0, usual / here)


Edges = Mapping[str, Sequence[float] | Sequence[str]]


def count_window(
    window: WindowRows, edges: Edges, actions: Sequence[str], is_known: KnownItems, first_ms: int
) -> WindowCounts:
    """Count a window.

    Args:
        edges: of the bins of features, by name.
        actions: that training knows.
        is_known: whether the model knows items.
        first_ms: time of the first event of the training data.
    """
    log, events, n = window.log, window.events, window.events.num_events
    early = _num_early(log, first_ms)
    rows, inverse = np.unique(np.asarray(events.item, np.int64), return_inverse=True)
    hashed = [xxhash.xxh3_64_intdigest(str(one).encode()) % NUM_BUCKETS for one in log.items.ids(rows).tolist()]
    gaps = history_gaps(events.timestamp, events.offsets)
    counts = {
        "events": WindowNumber("amount", window.num_events, window.num_events),
        "users": WindowNumber("amount", window.num_users, window.num_users),
        "new users": share(int((window.starts == 0).sum()), len(window.users)),
        "events before the training data": share(early, early + window.num_events),
        "unknown items": share(int((~is_known(rows))[inverse].sum()), n),
        "duplicates": share(n - _num_distinct(events), n),
        "hour of the day": _bins(np.bincount(events.timestamp // HOUR_MS % 24, minlength=24)),
        "gap between events": _bins(np.bincount(gaps[gaps != UNKNOWN_GAP], minlength=NUM_GAPS)),
        "items": _bins(np.bincount(np.array(hashed, np.int64)[inverse], minlength=NUM_BUCKETS)),
    }
    code = np.bincount(np.asarray(events.action, np.int64), minlength=len(log.actions))
    named = dict(zip(log.actions, code.tolist(), strict=False))
    counts |= {f"action {action}": share(named.pop(action, 0), n) for action in actions}
    counts["other actions"] = share(sum(named.values()), n)
    if (shown := log.impressions) is not None:
        mask, label = shown.mask[window.impressions], shown.label[window.impressions]
        counts["impressions"] = WindowNumber("amount", len(mask), len(mask))
        for place, task in enumerate(shown.tasks):
            known = mask[:, place] > 0
            counts[f"label {task}"] = share(int(label[known, place].sum()), int(known.sum()))
            counts[f"unlabeled {task}"] = share(int((~known).sum()), len(mask))
    columns, sizes = window.columns(), {"user": len(window.users), "request": len(window.impressions)}
    for name in edges:
        size, column = sizes.get(name.partition(".")[0], n), columns.get(name)
        counts[f"missing {name}"] = share(size if column is None else int((~column.is_known).sum()), size)
        if column is not None and edges[name]:
            counts[name] = _bins(_binned(column, edges[name]))
    return counts


def _num_early(log: EventLog, first_ms: int) -> int:
    """Events before `first_ms` in the newest segment; older ones, such as a backfill, are no longer news."""
    newest = log.segments[-1]
    if len(log.segments) == 1 or newest.first < newest.last:  # The whole log, or compacted with older segments.
        return 0
    events, start = newest.events, newest.events.offsets[:-1]
    first = events.first_since(start, events.offsets[1:], np.full(len(start), first_ms))
    return int((first - start).sum())


def _num_distinct(events: Histories) -> int:
    """Number of different combinations of user, time, item, and action."""
    if not events.num_events:
        return 0
    order = np.lexsort((events.action, events.item, events.timestamp, events.owner))
    keys = (events.action, events.item, events.timestamp, events.owner)
    differs = np.zeros(events.num_events - 1, bool)
    for key in keys:
        ordered = np.asarray(key)[order]
        differs |= ordered[1:] != ordered[:-1]
    return 1 + int(differs.sum())


def _edges_of(columns: Sequence[Column]) -> list[float] | list[str]:
    """Bins for what a column holds in all windows: tenths of numbers, or frequent values; empty for vectors."""
    if columns[0].kind == "vector":
        return []
    if columns[0].values is None:
        data = np.concatenate([column.data[column.is_known] for column in columns]).astype(np.float64)
        data = data[np.isfinite(data)]
        return np.unique(np.quantile(data, np.arange(1, 10) / 10)).tolist() if len(data) else []
    values = columns[0].values
    counts = np.bincount(np.concatenate([c.data[c.data >= 0] for c in columns]), minlength=len(values))
    top = np.argsort(-counts, kind="stable")[:MOST_VALUES]
    top = top[counts[top] > 0]
    return [str(value) for value in values.ids(top).tolist()]


def _binned(column: Column, edges: Sequence[float] | Sequence[str]) -> Int:
    if column.values is None:
        data = column.data[column.is_known]
        return np.bincount(np.searchsorted(np.array(edges, np.float64), data), minlength=len(edges) + 1)
    codes = np.full(len(column.values), len(edges))
    rows = column.values.rows([str(edge) for edge in edges])
    codes[rows[rows >= 0]] = np.flatnonzero(rows >= 0)
    return np.bincount(codes[column.data[column.data >= 0]], minlength=len(edges) + 1)


Scores = Mapping[str, NDArray[Any]]
"""By task: [U, C]; NaN for what was not scored."""


def count_scores(counts: WindowCounts, scores: Scores, edges: Edges) -> None:
    """Add the scores of a window's users for the items of the reference."""
    for task, values in scores.items():
        known = values[np.isfinite(values)].astype(np.float64)
        if len(known):
            counts[f"mean score {task}"] = WindowNumber("mean", float(known.mean()), len(known))
            counts[f"score {task}"] = _bins(_binned(Column(known), edges[f"score {task}"]))


def scored_users(window: WindowRows, most: int = NUM_SCORED_USERS, taken: NDArray[np.bool_] | None = None) -> Int:
    """Rows of the log of users whose scores are recorded: random ones who have events before the window. `taken`: bool
    [num_users], True for users to leave out."""
    users = window.users[window.starts > 0]
    if taken is not None:
        users = users[~taken[users]]
    return np.sort(np.random.default_rng(0).permutation(users)[:most])


def reference_windows(log: EventLog, end: int) -> tuple[int, int] | None:
    """Length in ms and number of the windows before `end`; None if the log has too few."""
    newest = log.time_range() if log.has_time else None
    if newest is None:
        return None
    first, total = newest[0], int(log.counts_before(end).sum())
    chosen = None
    for length in LENGTHS_MS:
        num = (end - first) // length
        if num < LEAST_WINDOWS:
            break
        chosen = length, min(num, MOST_WINDOWS)
        if total / num >= LEAST_EVENTS:
            break
    return chosen


def make_reference(
    log: EventLog, end: int, items: Vocabulary, score: Callable[[Int, Int, Int, Int], Scores] | None = None
) -> Reference | None:
    """What is normal in the windows before `end`; None if the log has no times, or too few windows.

    Args:
        end: of the training data, ms.
        items: that the model knows.
        score: maps rows of the log's users [U], the events [U] that summaries cover, times [U] in ms, and rows of
            `items` [C] to scores; None records none.
    """
    chosen = reference_windows(log, end)
    if chosen is None:
        return None
    length, num = chosen
    begins = [end - length * (num - place) for place in range(num)]
    windows = [WindowRows.read(log, begin, begin + length, MAX_EVENTS // num) for begin in begins]
    first_seen, in_model = _first_times(log, end), items.rows(log.items.ids(np.arange(log.num_items)).tolist()) >= 0
    range_ms = log.time_range()
    assert range_ms is not None
    columns = [window.columns() for window in windows]
    edges: dict[str, list[float] | list[str]] = {
        name: _edges_of([each[name] for each in columns]) for name in columns[0]
    }
    counts = []
    for window in windows:
        # Of a model that is trained when the window begins, items that come later are unknown.
        old = in_model & (first_seen < window.begin)
        counts.append(count_window(window, edges, log.actions, old.__getitem__, range_ms[0]))
    scored: list[int] | list[str] = []
    if score is not None and len(items):
        rows = np.sort(np.random.default_rng(0).permutation(len(items))[:NUM_SCORED_ITEMS])
        rows = rows[items.has_ids(rows)]
        scored = items.ids(rows).tolist()
        users = _users_to_score(windows)
        covered = [
            window.starts[np.searchsorted(window.users, own)] for window, own in zip(windows, users, strict=True)
        ]
        now = np.repeat(begins, [len(own) for own in users])
        scores = score(np.concatenate(users), np.concatenate(covered), now, rows)
        bounds = np.cumsum([len(own) for own in users])[:-1]
        for task, values in scores.items():
            edges[f"score {task}"] = _edges_of([Column(values.reshape(-1))])
            for own, part in zip(counts, np.split(values, bounds), strict=True):
                count_scores(own, {task: part}, edges)
    names = dict.fromkeys(name for each in counts for name in each)
    checks = {name: _check(name, counts, edges.get(name, [])) for name in names}
    usable = {name: check for name, check in checks.items() if check is not None}
    return Reference(length, num, range_ms[0], end, scored, NUM_SCORED_USERS, usable)


def _users_to_score(windows: Sequence[WindowRows]) -> list[Int]:
    """Per window, the users whose scores are recorded; each user only once, so that all are summarized in one pass."""
    log = windows[0].log
    taken = np.zeros(log.num_users, bool)
    active = len(np.unique(np.concatenate([window.users for window in windows])))
    chosen = []
    for window in windows:
        users = scored_users(window, min(NUM_SCORED_USERS, max(1, active // len(windows))), taken)
        covered = np.cumsum(window.starts[np.searchsorted(window.users, users)])
        users = users[covered <= max(MAX_EVENTS // len(windows), covered[0] if len(covered) else 0)]
        taken[users] = True
        chosen.append(users)
    return chosen


def _check(name: str, windows: Sequence[WindowCounts], edges: list[float] | list[str]) -> Check | None:
    """What is normal for a number; None if it is missing in more than half of the windows."""
    numbers = [window[name] for window in windows if name in window]
    numbers = [number for number in numbers if number.size or number.kind == "amount"]
    if len(numbers) < 2 or 2 * len(numbers) < len(windows):
        return None
    size, total = float(np.mean([number.size for number in numbers])), np.zeros(0, np.int64)
    own = [number.bins for number in numbers if number.bins is not None]
    if own:  # Each window is compared with the others.
        total = np.sum(own, axis=0)
        values = np.cbrt([_scaled_index(one, total - one, size) for one in own])
    else:
        blank = Check("", 0.0, 0.0, 1.0, 1)
        values = np.array([number.transformed(blank) for number in numbers])
    mean, deviation = float(values.mean()), float(values.std(ddof=1))
    return Check(numbers[0].kind, mean, deviation, size, len(numbers), total.tolist(), edges)


def _first_times(log: EventLog, end: int) -> Int:
    """Time of the first event of each item before `end`: int64 [num_items]; the largest number without any."""
    first = np.full(log.num_items, np.iinfo(np.int64).max)
    for block in visible_blocks(log, log.counts_before(end)):
        np.minimum.at(first, block.item, block.timestamp)
    return first


def spread(values: Floats) -> float:
    """The largest step between neighbors; 0 without two known ones."""
    steps = np.abs(np.diff(values[np.isfinite(values)]))
    return float(steps.max()) if len(steps) else 0.0
