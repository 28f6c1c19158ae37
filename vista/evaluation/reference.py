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
from vista.files import FieldRule, check_fields, either, list_of, one_of, read_limited, replace_text, text, whole
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.histories import DAY_MS, NUM_GAPS, UNKNOWN_GAP, Histories, history_gaps
from vista.log.splits import visible_blocks
from vista.log.vocabulary import Vocabulary
from vista.model.saved_model import REFERENCE_FILE

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
    counts: list[int] = field(default_factory=list)
    """Of bins: the rows of all reference windows by bin."""
    edges: list[float] | list[str] = field(default_factory=list)
    """Of bins: bounds between numbers, or values of a category; others fall into the last bin."""


_IS_NUMBER = FieldRule("a finite number", lambda value: type(value) in (int, float) and math.isfinite(value))
_CHECK_RULES = {
    "kind": one_of("amount", "share", "bins", "mean"),
    "mean": _IS_NUMBER,
    "deviation": _IS_NUMBER,
    "size": _IS_NUMBER,
    "counts": list_of(whole()),
    "edges": either(list_of(_IS_NUMBER), list_of(text())),
}
_RULES = {
    "format_version": whole(),
    "window_ms": whole(1),
    "num_windows": whole(2),
    "first_ms": FieldRule("an integer", lambda value: type(value) is int),
    "end_ms": FieldRule("an integer", lambda value: type(value) is int),
    "items": list_of(either(text(), FieldRule("an integer", lambda value: type(value) is int))),
    "num_users": whole(),
    "checks": FieldRule("a table", lambda value: type(value) is dict),
}


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
        replace_text(folder / REFERENCE_FILE, json.dumps(fields) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Reference:
        """Read that of a model.

        Raises:
            CheckpointError: the model has none, or it is damaged or of another format.
        """
        path = folder / REFERENCE_FILE
        try:
            fields = json.loads(read_limited(path, MAX_BYTES))
        except FileNotFoundError:
            raise CheckpointError(
                f"{folder}: has no {REFERENCE_FILE}, which `vista train` writes when it ends, for a vista model and a "
                f"log with times that covers {LEAST_WINDOWS} windows; train the model on such a log"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error}); train the model again") from error
        try:
            check_fields(fields, _RULES)
            if fields.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"is not of format {FORMAT_VERSION}")
            for each in fields["checks"].values():
                check_fields(each, _CHECK_RULES)
            checks = {name: Check(**each) for name, each in fields.pop("checks").items()}
            return cls(**fields, checks=checks)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: {error}; train the model again") from error

    def limit(self, name: str, size: float) -> float:
        """How far the transformed number of a healthy window may lie from the mean."""
        check = self.checks[name]
        variance = max(check.deviation**2, _sampling_variance(check, check.size))
        if size < check.size:  # A window with fewer rows has a larger sampling error.
            variance += _sampling_variance(check, size) - _sampling_variance(check, check.size)
        tail = FALSE_ALARMS / len(self.checks) / (1 if is_one_sided(name, check) else 2)
        return student_quantile(tail, self.num_windows - 1) * math.sqrt(variance * (1 + 1 / self.num_windows))


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
            found[f"item.{name}"] = column.select(np.asarray(events.item, np.int64))
        if log.impressions is not None:
            for name, data in log.impressions.features.columns.items():
                found[f"request.{name}"] = Column(np.asarray(data[self.impressions]), log.request_features[name])
        return found


@dataclass(frozen=True, slots=True)
class WindowCounts:
    """The numbers of a window, by name."""

    amounts: dict[str, float] = field(default_factory=dict)
    shares: dict[str, tuple[int, int]] = field(default_factory=dict)
    """(k, n): k of n rows."""
    bins: dict[str, Int] = field(default_factory=dict)
    """Rows by bin."""
    means: dict[str, tuple[float, int]] = field(default_factory=dict)
    """(mean, n): of n numbers."""

    def transformed(self, name: str, check: Check) -> tuple[float, float]:
        """The number that is compared, and the number of its rows; NaN without any."""
        if check.kind == "amount":
            value = self.amounts.get(name, 0.0)
            return math.log(max(value, 0.5)), value
        if check.kind == "share":
            k, n = self.shares.get(name, (0, 0))
            return (arcsine(k, n), n) if n else (math.nan, 0)
        if check.kind == "mean":
            return self.means.get(name, (math.nan, 0))
        own, all_windows = self.bins.get(name), np.array(check.counts)
        if own is None or not own.sum():
            return math.nan, 0
        return float(np.cbrt(_scaled_index(own, all_windows, check.size))), float(own.sum())

    def shown(self, name: str, check: Check) -> float:
        """The number as people know it: a count, a share, a population stability index, or a mean."""
        if check.kind == "amount":
            return self.amounts.get(name, 0.0)
        if check.kind == "share":
            k, n = self.shares.get(name, (0, 0))
            return k / n if n else math.nan
        if check.kind == "mean":
            return self.means.get(name, (math.nan, 0))[0]
        own = self.bins.get(name)
        return math.nan if own is None or not own.sum() else stability_index(own, np.array(check.counts))


def arcsine(k: int, n: int) -> float:
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
    log, events, counts = window.log, window.events, WindowCounts()
    n = events.num_events
    counts.amounts.update(events=window.num_events, users=window.num_users)
    counts.shares["new users"] = int((window.starts == 0).sum()), len(window.users)
    early = int(log.counts_before(first_ms).sum())
    counts.shares["events before the training data"] = early, early + window.num_events
    rows, inverse = np.unique(np.asarray(events.item, np.int64), return_inverse=True)
    counts.shares["unknown items"] = int((~is_known(rows))[inverse].sum()), n
    counts.shares["duplicates"] = n - _num_distinct(events), n
    code = np.bincount(np.asarray(events.action, np.int64), minlength=len(log.actions))
    named = dict(zip(log.actions, code.tolist(), strict=False))
    for action in actions:
        counts.shares[f"action {action}"] = named.get(action, 0), n
    counts.shares["other actions"] = sum(k for action, k in named.items() if action not in actions), n
    counts.bins["hour of the day"] = np.bincount(events.timestamp // HOUR_MS % 24, minlength=24)
    gaps = history_gaps(events.timestamp, events.offsets)
    counts.bins["gap between events"] = np.bincount(gaps[gaps != UNKNOWN_GAP], minlength=NUM_GAPS)
    hashed = [xxhash.xxh3_64_intdigest(str(one).encode()) % NUM_BUCKETS for one in log.items.ids(rows).tolist()]
    counts.bins["items"] = np.bincount(np.array(hashed, np.int64)[inverse], minlength=NUM_BUCKETS)
    if (shown := log.impressions) is not None:
        mask, label = shown.mask[window.impressions], shown.label[window.impressions]
        counts.amounts["impressions"] = len(mask)
        for place, task in enumerate(shown.tasks):
            known = mask[:, place] > 0
            counts.shares[f"label {task}"] = int(label[known, place].sum()), int(known.sum())
            counts.shares[f"unlabeled {task}"] = int((~known).sum()), len(mask)
    columns = window.columns()
    for name in edges:
        num_rows = len(window.users) if name.startswith("user.") else n
        num_rows = len(window.impressions) if name.startswith("request.") else num_rows
        column = columns.get(name)
        missing = num_rows if column is None else int((~column.is_known).sum())
        counts.shares[f"missing {name}"] = missing, num_rows
        if column is not None and edges[name]:
            counts.bins[name] = _binned(column, edges[name])
    return counts


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
            counts.means[f"mean score {task}"] = float(known.mean()), len(known)
            name = f"score {task}"
            counts.bins[name] = _binned(Column(known), edges[name])


def scored_users(window: WindowRows, most: int = NUM_SCORED_USERS, taken: NDArray[np.bool_] | None = None) -> Int:
    """Rows of the log of users whose scores are recorded: random ones who have events before the window.

    Args:
        taken: bool [num_users], True for users to leave out.
    """
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
    log: EventLog,
    end: int,
    items: Vocabulary,
    score: Callable[[Int, Int, Int, Int], Scores] | None = None,
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
    names = dict.fromkeys(name for each in counts for part in _parts(each).values() for name in part)
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
        users = users[covered <= max(2 * MAX_EVENTS // len(windows), covered[0] if len(covered) else 0)]
        taken[users] = True
        chosen.append(users)
    return chosen


def _parts(counts: WindowCounts) -> dict[str, Mapping[str, object]]:
    return {"amount": counts.amounts, "share": counts.shares, "bins": counts.bins, "mean": counts.means}


def _check(name: str, windows: Sequence[WindowCounts], edges: list[float] | list[str]) -> Check | None:
    """What is normal for a number; None if it is missing in more than half of the windows."""
    kind = next(kind for kind, part in _parts(windows[0]).items() if any(name in _parts(w)[kind] for w in windows))
    if kind != "bins":
        blank = Check(kind, 0.0, 0.0, 1.0)
        found = [window.transformed(name, blank) for window in windows]
        values, sizes = (np.array(part, np.float64) for part in zip(*found, strict=True))
        total = np.zeros(0, np.int64)
    else:
        of_window = [window.bins[name] for window in windows if name in window.bins and window.bins[name].sum()]
        if len(of_window) < 2:
            return None
        total, sizes = np.sum(of_window, axis=0), np.array([own.sum() for own in of_window], np.float64)
        size = float(sizes.mean())
        values = np.cbrt([_scaled_index(own, total - own, size) for own in of_window])
    known = np.isfinite(values)
    if 2 * known.sum() < len(windows):
        return None
    values = values[known]
    return Check(
        kind, float(values.mean()), float(values.std(ddof=1)), float(sizes[known].mean()), total.tolist(), edges
    )


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
