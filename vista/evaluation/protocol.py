"""How quality is measured: next items and windows by full ranking, impressions by their labels.

Validation during training asks the model and `vista evaluate` asks the scorer; both are measured here, and so are
counting baselines. Letters: N cases, V items of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.config import DataConfig, EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.cases import (
    ImpressionCases,
    NextItemCases,
    WindowCases,
    cases_digest,
    next_item_cases,
    window_cases,
)
from vista.evaluation.comparison import PerUserMetrics, mean_cell
from vista.evaluation.metrics import (
    auc,
    auc_values,
    calibration,
    gauc,
    log_loss_values,
    mean_and_error,
    normalized_entropy,
    ranks_of_targets,
    top_items,
)
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import DAY_MS, token_groups
from vista.log.splits import EVENTS_PER_BLOCK, leaves_out_seen, part_counts, part_times, split_until, visible_counts
from vista.logistic_regression import fit_calibration
from vista.progress_bar import progress_bar
from vista.ranks import ALONE, Ranks
from vista.text_table import text_table

# How well scores rank the items of a window: precision, recall and NDCG over a set of labels.
#
# Letters: n cases, V items, L labels of all cases, K longest list.

COLD = ":cold"
KINDS = ("", ":returns", ":new", COLD)
"""Suffixes of the metrics: all items, the items that the user had before, the items that are new to the user, and those
that no user had before."""
SCORES_PER_CHUNK = 1 << 22


def window_metrics(
    scores: NDArray[np.floating[Any]],
    cases: WindowCases,
    columns: Int,
    seen_columns: tuple[Int, Int],
    ks: Sequence[int],
    cold: NDArray[np.bool_] | None = None,
) -> dict[str, Floats]:
    """Metrics per case, for lists of all items, and of each other of KINDS.

    With n labels, precision@k is hits / k, recall@k is hits / min(k, n), so that a perfect list reaches 1, and ndcg@k
    is the discounted gain of the hits over that of a perfect list. Equal scores count as if they were in random order:
    each metric is its expected value. A score of -inf is never in a list.

    Args:
        scores: [n, V] of any float dtype.
        cases: n of them.
        columns: int64 [log.num_items], the column of each of the log's items in `scores`; -1 where the model does not
            know the item, which then is a miss.
        seen_columns: (columns of the items before each question, repeats allowed; offsets int64 [n + 1]).
        ks: lengths of the lists.
        cold: bool [log.num_items], the log's items that no user had before; None leaves out their metrics.

    Returns:
        {"precision@10": float64 [n], "precision@10:returns": …, "precision@10:new": …, …}; NaN where a case has no
        label of the kind.

    Raises:
        ValueError: on NaN scores, with the row.
    """
    owner = np.repeat(np.arange(len(cases)), np.diff(cases.offsets))
    column = columns[cases.item]
    seen_row = np.repeat(np.arange(len(cases)), np.diff(seen_columns[1]))
    kinds = KINDS if cold is not None else KINDS[:-1]
    metrics = {f"{name}@{k}{kind}": np.full(len(cases), np.nan) for name in _NAMES for k in ks for kind in kinds}
    step = max(1, SCORES_PER_CHUNK // max(scores.shape[1], 1))
    for start in range(0, len(cases), step):
        stop = min(start + step, len(cases))
        chunk = scores[start:stop]
        invalid = np.flatnonzero(np.isnan(chunk.max(axis=1, initial=-np.inf)))
        if len(invalid):
            raise ValueError(f"scores: row {start + int(invalid[0])} holds NaN and cannot be ranked")
        low, high = np.searchsorted(seen_row, [start, stop])
        seen = seen_row[low:high] - start, seen_columns[0][low:high]
        had = np.full_like(chunk, -np.inf)
        had[seen] = chunk[seen]
        fresh = chunk.copy()
        fresh[seen] = -np.inf
        labels = slice(cases.offsets[start], cases.offsets[stop])
        is_new = cases.is_new[labels]
        lists = [(chunk, np.ones_like(is_new)), (had, ~is_new), (fresh, is_new)]
        if cold is not None:
            of_cold = columns[cold & (columns >= 0)]
            never = np.full_like(chunk, -np.inf)
            never[:, of_cold] = chunk[:, of_cold]
            lists.append((never, cold[cases.item[labels]]))
        for kind, (part, wanted) in zip(kinds, lists, strict=True):
            values = _list_metrics(part, owner[labels][wanted] - start, column[labels][wanted], ks)
            for name, value in values.items():
                metrics[name + kind][start:stop] = value
    return metrics


_NAMES = ("precision", "recall", "ndcg")


def _list_metrics(scores: NDArray[np.floating[Any]], owner: Int, column: Int, ks: Sequence[int]) -> dict[str, Floats]:
    """Metrics float64 [n] of one kind of list; owner, column: int64 [L] of the labels, column -1 for a miss."""
    num_cases, num_items = scores.shape
    num_labels = np.bincount(owner, minlength=num_cases)
    known = column >= 0
    owner, column = owner[known], column[known]
    own = scores[owner, column]
    listed = own > -np.inf
    owner, own = owner[listed], own[listed]
    longest = min(max(ks), num_items)
    top = -np.sort(np.partition(-scores, longest - 1, axis=1)[:, :longest], axis=1)  # [n, K], descending
    before, ties = np.zeros(len(own), np.int64), np.ones(len(own), np.int64)
    first = np.searchsorted(owner, np.arange(num_cases + 1))
    for row in np.flatnonzero(np.diff(first)):
        labels = slice(first[row], first[row + 1])
        ascending = top[row, ::-1]
        before[labels] = longest - np.searchsorted(ascending, own[labels], side="right")
        ties[labels] = np.maximum(longest - np.searchsorted(ascending, own[labels], side="left") - before[labels], 1)
        at_the_end = own[labels] == ascending[0]  # these ties may continue beyond the longest list
        if at_the_end.any():
            ties[labels][at_the_end] = np.count_nonzero(scores[row] == ascending[0])
    gains = np.concatenate([[0], np.cumsum(1 / np.log2(np.arange(max(ks)) + 2))])
    out: dict[str, Floats] = {}
    has = num_labels > 0
    for k in ks:
        # A label is at each of the ranks before .. before + ties - 1 with the same probability.
        low, high = np.minimum(before, k), np.minimum(before + ties, k)
        hits = np.bincount(owner, (high - low) / ties, num_cases)
        gain = np.bincount(owner, (gains[high] - gains[low]) / ties, num_cases)
        best = np.minimum(num_labels, k)
        for name, value, whole in (("precision", hits, k), ("recall", hits, best), ("ndcg", gain, gains[best])):
            out[f"{name}@{k}"] = np.divide(value, whole, out=np.full(num_cases, np.nan), where=has)
    return out


USERS_PER_BATCH = 512
"""Users that are ranked at once."""
SCORES_PER_BATCH = 1 << 25
"""Most scores, users times items, that are held at once."""
LAST_RANK = 1 << 62
"""Rank of a label that the model does not know: beyond every list, even if there are few items."""


def rank_next_items(
    log: EventLog,
    cases: NextItemCases,
    item_columns: Int,
    score: Callable[[NextItemCases], NDArray[np.floating[Any]]],
    batches: Iterable[slice],
    *,
    exclude_seen: bool,
    observe: Callable[[Float32s, Int, tuple[Int, Int] | None], None] | None = None,
) -> Int:
    """0-based rank of each case's label among all items of the model.

    Args:
        item_columns: int64 [log.num_items], the column of each of the log's items in the output of `score`; -1 where
            the model does not know the item, whose labels then get LAST_RANK.
        score: some cases -> [n, V] of any float dtype.
        batches: which cases `score` is called with at a time, by `case_batches`; they cover all cases.
        exclude_seen: leave the user's earlier items out of the list (never the label).
        observe: called with each batch's scores [n, V], the labels' columns [n] (-1 unknown) and excluded cells, to
            count lists in the same pass (`RecommendedLists.add`).

    Returns:
        int64 [N].
    """
    ranks = np.zeros(len(cases), np.int64)
    for part in batches:
        batch = cases.part(part)
        scores = score(batch)
        target = item_columns[batch.item]
        known = target >= 0
        excluded = seen_columns(log, batch, item_columns) if exclude_seen else None
        ranks[part] = np.where(known, ranks_of_targets(scores, np.where(known, target, 0), excluded), LAST_RANK)
        if observe is not None:
            observe(scores, target, excluded)
    return ranks


def rank_windows(
    log: EventLog,
    cases: Mapping[str, WindowCases],
    item_columns: Int,
    score: Callable[[WindowCases], NDArray[np.floating[Any]]],
    batches: Iterable[slice],
    top_k: Sequence[int],
    cold: NDArray[np.bool_] | None = None,
) -> dict[str, dict[str, Floats]]:
    """Metrics of each case by `window_metrics`, over windows of one or several lengths.

    Args:
        cases: the same users and questions for all lengths, at least one of them.
        item_columns, score, batches: as in `rank_next_items`.
        cold: as in `window_metrics`.

    Returns:
        {length: {metric: float64 [N]}}; no metrics without cases.
    """
    first = next(iter(cases.values()))
    parts: dict[str, list[dict[str, Floats]]] = {name: [] for name in cases}
    for batch in batches:
        asked = first.part(batch)
        scores, seen = score(asked), seen_columns(log, asked, item_columns)
        for name, each in cases.items():
            parts[name].append(window_metrics(scores, each.part(batch), item_columns, seen, top_k, cold))
    return {
        name: {metric: np.concatenate([part[metric] for part in own]) for metric in (own[0] if own else ())}
        for name, own in parts.items()
    }


def case_batches(
    cases: NextItemCases | WindowCases, num_items: int, users_per_batch: int, events_per_batch: int = EVENTS_PER_BLOCK
) -> list[slice]:
    """Consecutive cases that fit into one batch, by their users, scores, and events.

    Args:
        num_items: number of items of the log, which bounds the users by SCORES_PER_BATCH.
        users_per_batch: most users of a batch.
        events_per_batch: most events in the histories of a batch (a longer history is a batch by itself).
    """
    users_per_batch = min(users_per_batch, max(1, SCORES_PER_BATCH // max(num_items, 1)))
    # A case weighs at least a batch's fair share, so that neither users nor events of a batch become too many.
    weight = np.maximum(cases.seen, events_per_batch // users_per_batch)
    return list(token_groups(weight, events_per_batch))


def seen_columns(log: EventLog, cases: NextItemCases | WindowCases, item_columns: Int) -> tuple[Int, Int]:
    """(columns of the items of each user's active events before the question, with repeats; offsets int64 [N+1])."""
    history = log.active.gather(cases.user, log.active_counts(cases.seen, cases.user), features=False)
    columns = item_columns[history.item]
    known = columns >= 0
    # The number of known items among the first t packed events; at the histories' offsets it gives the new offsets.
    known_before = offsets_of(known)
    return columns[known], known_before[history.offsets]


def ranking_metrics(ranks: Int, top_k: Sequence[int]) -> dict[str, float]:
    """Means of `ranking_values`; NaN without ranks."""
    return {name: mean_and_error(values)[0] for name, values in ranking_values(ranks, top_k).items()}


def ranking_values(ranks: Int, top_k: Sequence[int]) -> dict[str, Floats]:
    """{"hr@10": float64 [N], "ndcg@10": float64 [N], …} of 0-based ranks [N]."""
    gain = 1 / np.log2(ranks + 2)
    return {
        f"{name}@{k}": np.where(ranks < k, value, 0.0) for k in top_k for name, value in (("hr", 1.0), ("ndcg", gain))
    }


def _known_labels(
    cases: ImpressionCases, probability: Float32s
) -> Iterator[tuple[str, NDArray[np.bool_], Float32s, Float32s]]:
    """Of each task with labels of both kinds: its name, which of the N impressions have a label, these labels, and
    their probabilities."""
    for index, task in enumerate(cases.tasks):
        known = cases.mask[:, index]
        label, predicted = cases.label[known, index], probability[known, index]
        if len(np.unique(label)) >= 2:
            yield task, known, label, predicted


def impression_metrics(cases: ImpressionCases, probability: Float32s) -> dict[str, float]:
    """AUC, GAUC, NE and calibration of each task with labels of both kinds; probability: float32 [N, num_tasks]."""
    metrics: dict[str, float] = {}
    for task, known, label, predicted in _known_labels(cases, probability):
        metrics[f"auc/{task}"] = auc(label, predicted)
        metrics[f"gauc/{task}"] = gauc(cases.user[known], label, predicted)
        metrics[f"ne/{task}"] = normalized_entropy(label, predicted)
        metrics[f"calibration/{task}"] = calibration(label, predicted).ratio
    return metrics


def calibrated(cases: ImpressionCases, predicted: Float32s, looks: Float32s) -> tuple[Float32s, Floats]:
    """Probabilities float32 [N, num_tasks] after calibration, and the calibration, float64 [num_tasks, 2]. Both are
    fitted to the same labels, which hardly matters: two numbers per task from thousands of labels. `looks`: float32
    [N, num_tasks] as of `Examination.of_rows`."""
    exact = np.clip(predicted.astype(np.float64), 1e-9, 1 - 1e-9)
    logit = np.log(exact) - np.log1p(-exact)
    label = cases.label
    found = [fit_calibration(logit[k, t], label[k, t], looks[k, t]) for t, k in enumerate(cases.mask.T)]
    calibration = np.array(found).reshape(len(found), 2)
    scaled = logit * calibration[:, 0] + calibration[:, 1]
    return (1 / (1 + np.exp(-scaled))).astype(np.float32), calibration


def entropy_of_users(cases: ImpressionCases, probability: Float32s, task: str) -> Floats:
    """Values float64 [U] per user with labels of a task, whose mean is the NE of the task (see `log_loss_values`).
    `probability`: float32 [N, num_tasks]."""
    index = cases.tasks.index(task)
    known = cases.mask[:, index]
    label, predicted = cases.label[known, index], probability[known, index]
    _, user = np.unique(cases.user[known], return_inverse=True)
    values = log_loss_values(user, label, predicted)
    of_users: Floats = values * (normalized_entropy(label, predicted) / values.mean())
    return of_users


def measure_labels(log: EventLog, cases: ImpressionCases, probability: Float32s, split: str) -> PerUserMetrics:
    """AUC and log loss of each task with labels of both kinds, with their errors over users.

    The values of a user are those of `auc_values` and `log_loss_values`: their mean is the metric over all impressions.

    Args:
        probability: float32 [N, num_tasks].
        split: the part of the split that the cases are of.
    """
    users, row = np.unique(cases.user, return_inverse=True)
    values: dict[str, Floats] = {}
    for task, known, label, predicted in _known_labels(cases, probability):
        own, place = np.unique(row[known], return_inverse=True)
        for name, measured in (("auc", auc_values), ("log_loss", log_loss_values)):
            values[f"{name}/{task}"] = np.full(len(users), np.nan)
            values[f"{name}/{task}"][own] = measured(place, label, predicted)
    digest = cases_digest(log, cases.user, cases.item, cases.timestamp, cases.mask.ravel().astype(np.int64))
    return PerUserMetrics(log.users.ids(users), values, {"target": "labels", "split": split, "cases": [digest]})


def measure_next_items(
    log: EventLog,
    data: DataConfig,
    columns: Int,
    config: EvaluateConfig,
    score: Callable[[NextItemCases], NDArray[np.floating[Any]]],
    ranks: Ranks = ALONE,
    *,
    observe: Callable[[NDArray[np.float32], Int, tuple[Int, Int] | None], None] | None = None,
) -> tuple[Int, PerUserMetrics]:
    """Rank the next items of a part of a split.

    Args:
        data: the split, and whether to leave out seen items.
        columns: int64 [log.num_items], the column of each of the log's items in the scores; -1 for items without one.
        score: some cases -> [n, V] scores.
        ranks: processes that each answer a part of the cases.
        observe: as in `rank_next_items`.

    Returns:
        0-based ranks of the labels, int64 [N], and each user's metrics.
    """
    cases = next_item_cases(log, *part_counts(log, data, config.split))
    own = cases.part(ranks.part_of(cases.seen + 1))
    batches = case_batches(own, log.num_items, USERS_PER_BATCH)
    exclude_seen = leaves_out_seen(log, data)
    places = rank_next_items(
        log,
        own,
        columns,
        score,
        progress_bar(batches, desc="ranking", unit="batch", leave=False),
        exclude_seen=exclude_seen,
        observe=observe,
    )
    places = ranks.of_all_cases({"place": places})["place"]
    question = {
        "target": config.target.value,
        "split": config.split,
        "exclude_seen": exclude_seen,
        "cases": [cases_digest(log, cases.user, cases.item, cases.seen)],
    }
    return places, PerUserMetrics(log.users.ids(cases.user), ranking_values(places, config.top_k), question)


@dataclass(frozen=True, slots=True)
class WindowReport:
    """Metrics of N users over windows of one or several lengths."""

    windows: dict[str, dict[str, Floats]]
    """{"50 events": {"precision@10:new": float64 [N], …}, …}"""

    def per_user(self) -> dict[str, Floats]:
        """{"precision@10:new/50-events": float64 [N], …}"""
        return {
            window_metric(name, window): values
            for window, metrics in self.windows.items()
            for name, values in metrics.items()
        }

    def metrics(self) -> dict[str, float]:
        """Means over the users who have labels of the kind, by the names of `per_user`."""
        return {name: mean_and_error(values)[0] for name, values in self.per_user().items()}

    def __str__(self) -> str:
        tables = []
        for window, metrics in self.windows.items():
            names = [name for name in metrics if ":" not in name]
            kinds = [kind for kind in KINDS if names[0] + kind in metrics]
            header = [f"next {window}", *(kind[1:] or "all" for kind in kinds)]
            counts = [np.count_nonzero(~np.isnan(metrics[names[0] + kind])) for kind in kinds]
            rows = [["users", *map(str, counts)]]
            rows += [[name, *(mean_cell(metrics[name + kind]) for kind in kinds)] for name in names]
            tables.append(text_table(header, rows))
        return "\n".join(tables)


def window_metric(name: str, window: str) -> str:
    """Name of a metric of one window: "precision@10/50-events"."""
    return f"{name}/{window.replace(' ', '-')}"


Scores = NDArray[np.floating[Any]]


def split_windows(log: EventLog, data: DataConfig, config: EvaluateConfig) -> dict[str, WindowCases]:
    """The cases of a part of the split, by length of the window: the same users and questions in all.

    With split=time, the question is asked when the labels begin. Other splits give no time: each user is asked just
    after the newest visible event. In validation, windows stop before the test labels.

    Raises:
        ConfigError: no user has enough events, or days are asked of a log without times, or of one that ends before.
    """
    if config.horizon_days:
        _check_days(log, data, config)
    seen, first, end = part_counts(log, data, config.split)
    now, _ = part_times(data, config.split)
    least = {"min_seen": config.min_seen, "min_after": config.min_after}
    cases = {
        name: window_cases(log, seen, end, first=first, now=now, **least, **length)
        for name, length in window_lengths(config).items()
    }
    if not len(next(iter(cases.values()))):
        raise ConfigError(
            f"{log.path}: no user has min_seen={config.min_seen} events until {split_until(data, config.split)} and "
            f"min_after={config.min_after} later events that are {config.split} labels; lower these, or train with "
            "data.split=time or data.split=share, which hold out more than one event"
        )
    return cases


def window_lengths(config: EvaluateConfig) -> dict[str, dict[str, Any]]:
    """{"50 events": {"horizon_events": 50}, …} or {"30 days": {"horizon_days": 30}}: arguments of `window_cases`."""
    if config.horizon_days:
        return {f"{config.horizon_days:g} days": {"horizon_days": config.horizon_days}}
    return {f"{n} events": {"horizon_events": n} for n in config.horizon_events}


def _check_days(log: EventLog, data: DataConfig, config: EvaluateConfig) -> None:
    """Refuse windows of days in a log without times, or that the events of a split by time do not span. They may lack a
    tenth: the newest event is older than the end of the period in which events were recorded."""
    if not log.has_time:
        raise ConfigError(f"horizon_days={config.horizon_days:g}: {log.path} has no times; set horizon_events")
    (begin, end), newest = part_times(data, config.split), log.time_range()
    if begin is None or newest is None:
        return
    end = newest[1] if end is None else end
    days = (end - begin) / DAY_MS
    if days < 0.9 * config.horizon_days:
        what = "data.test_from comes" if config.split == "validation" else f"{log.path} ends"
        raise ConfigError(
            f"horizon_days={config.horizon_days:g}: {what} {days:.1f} days after the question; ask for at most as many"
        )


def measure_windows(
    log: EventLog,
    data: DataConfig,
    columns: Int,
    config: EvaluateConfig,
    score: Callable[[WindowCases], Scores],
    ranks: Ranks = ALONE,
) -> tuple[WindowReport, PerUserMetrics]:
    """Ask all cases of `split_windows`, and compute the metrics of each user.

    If a label is an item without events before the part, the metrics include those of cold items.

    Args:
        data: the split.
        columns: int64 [log.num_items], the column of each of the log's items in the scores; -1 where the model does
            not know the item.
        score: some cases -> [n, V] scores of the model's items.
        ranks: processes that each answer a part of the cases.

    Raises:
        ConfigError: as `split_windows`.
    """
    cases = split_windows(log, data, config)
    first = next(iter(cases.values()))
    own = ranks.part_of(first.seen + 1)
    batches = case_batches(first.part(own), log.num_items, USERS_PER_BATCH)
    shown = progress_bar(batches, desc="ranking", unit="batch", leave=False)
    cold = item_counts(log, visible_counts(log, split_until(data, config.split))) == 0
    asked = any(cold[each.item].any() for each in cases.values())
    parts = {name: each.part(own) for name, each in cases.items()}
    measured = rank_windows(log, parts, columns, score, shown, config.top_k, cold if asked else None)
    report = WindowReport({name: ranks.of_all_cases(metrics) for name, metrics in measured.items()})
    question = {
        "target": config.target.value,
        "split": config.split,
        "horizon": list(cases),
        "min_seen": config.min_seen,
        "min_after": config.min_after,
        "cases": [
            cases_digest(log, each.user, each.item, each.seen, each.now, each.offsets) for each in cases.values()
        ],
    }
    return report, PerUserMetrics(log.users.ids(first.user), report.per_user(), question)


class RecommendedLists:
    """Counts of the items in lists of length k. `add` is the `observe` of `protocol.rank_next_items`."""

    def __init__(self, num_items: int, k: int) -> None:
        self.k = k
        self.num_lists = 0
        self.counts = np.zeros(num_items, np.int64)
        """int64 [V]: lists that hold the item."""
        self._targets: list[Int] = []
        self._score_sum = np.zeros(num_items, np.float64)

    def add(self, scores: NDArray[np.float32], target: Int, excluded: tuple[Int, Int] | None) -> None:
        """Count one batch.

        Args:
            scores: [n, V].
            target: int64 [n] columns of the labels, -1 where unknown.
            excluded: cells left out of the lists, as in `metrics.top_items`.
        """
        top = top_items(scores, target, self.k, excluded)
        self.counts += np.bincount(top[top >= 0], minlength=len(self.counts))
        self._score_sum += scores.sum(axis=0, dtype=np.float64)
        self.num_lists += len(scores)
        self._targets.append(target)

    def take_all(self, ranks: Ranks) -> None:
        """Take in the lists of the other ranks, whose cases follow one another."""
        all_lists = ranks.gather((self.num_lists, self.counts, self._score_sum, self.target))
        numbers, counts, score_sums, targets = zip(*all_lists, strict=True)
        self.num_lists, self._targets = sum(numbers), list(targets)
        self.counts, self._score_sum = np.sum(counts, axis=0), np.sum(score_sums, axis=0)

    @property
    def target(self) -> Int:
        """int64 [number of lists] columns of the labels, in the order in which they were added."""
        return np.concatenate([np.zeros(0, np.int64), *self._targets])

    @property
    def mean_scores(self) -> Floats:
        """float64 [V]: each item's score averaged over all users."""
        return self._score_sum / max(self.num_lists, 1)
