"""What is asked when quality is measured: next items under full ranking, and impressions with labels.

Validation during training asks the model, `vista evaluate` asks the scorer; both answer the same questions.
Letters: N cases.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.evaluation.metrics import auc, calibration, gauc, hit_rate, ndcg, normalized_entropy, ranks_of_targets
from vista.examples.batch_source import events_before
from vista.log.event_log import EventLog
from vista.log.histories import token_groups

EVENTS_READ = 1 << 22
"""Events of the histories that are read at once (a longer history is read alone)."""

SCORES_PER_BATCH = 1 << 25
"""Scores, users times items, that are held at once."""

LAST_RANK = 1 << 62
"""Of a label that the model does not know: in no list, however few items there are."""

Int = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class NextItemCases:
    """One label a user: user int64 [N] rows; seen int64 [N] events before the label; item int64 [N] rows of the log."""

    user: Int
    seen: Int
    item: Int


@dataclass(frozen=True, slots=True)
class ImpressionCases:
    """Impressions: user, seen (events strictly before), item (rows of the log), timestamp int64 [N]; label, mask
    [N, num_tasks]; probability float32 [N, num_tasks] of a simulation's ground truth, or None; tasks."""

    user: Int
    seen: Int
    item: Int
    timestamp: Int
    label: Floats
    mask: NDArray[np.bool_]
    probability: Floats | None
    tasks: list[str]


def next_item_cases(log: EventLog, seen: Int, end: Int | None = None, *, max_users: int = 0) -> NextItemCases:
    """The event after the `seen` [num_users] first ones, of every user that has one; the same users at every call.

    Args:
        end: int64 [num_users], events that may be labels (for validation: those before the test labels); None: all.
    """
    users = np.flatnonzero(seen < (log.lengths if end is None else end))
    if max_users and len(users) > max_users:
        users = np.sort(np.random.default_rng(0).choice(users, max_users, replace=False))
    labels = log.gather_ranges(users, seen[users], seen[users] + 1)
    return NextItemCases(users, seen[users], np.asarray(labels.item).astype(np.int64))


def impression_cases(log: EventLog, begin: int, end: int | None, *, max_cases: int = 0) -> ImpressionCases:
    """Impressions of a log in [begin, end) ms, each with the number of events strictly before it."""
    table = log.impressions
    if table is None:
        raise ValueError(f"{log.path} has no impressions")
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
    )


def request_starts(cases: ImpressionCases) -> Int:
    """int64 [R]: the first impression of each request, which is what a user was shown at one moment."""
    return np.flatnonzero(np.diff(cases.user, prepend=-1) | np.diff(cases.timestamp, prepend=-1))


def with_tasks(cases: ImpressionCases, tasks: list[str]) -> ImpressionCases:
    """The same impressions with the labels of those of `tasks` that they have."""
    columns = [index for index, task in enumerate(cases.tasks) if task in tasks]
    probability = None if cases.probability is None else cases.probability[:, columns]
    return replace(
        cases,
        label=cases.label[:, columns],
        mask=cases.mask[:, columns],
        probability=probability,
        tasks=[cases.tasks[index] for index in columns],
    )


def rank_next_items(
    log: EventLog,
    cases: NextItemCases,
    item_columns: Int,
    score: Callable[[NextItemCases], NDArray[np.floating[Any]]],
    *,
    exclude_seen: bool,
    users_per_batch: int,
    progress: bool,
    observe: Callable[[Floats, Int, tuple[Int, Int] | None], None] | None = None,
) -> Int:
    """0-based rank of each case's label among all items of the model.

    Args:
        item_columns: int64 [log.num_items], the column of each of the log's items in `score`'s output, or -1 where the
            model does not know the item: such a label has LAST_RANK.
        score: some cases -> [n, V] of any float dtype.
        exclude_seen: leave the user's earlier items out of the list (never the label).
        observe: is shown each batch's scores [n, V], the labels' columns [n] (-1 unknown) and excluded cells, so that
            lists can be gathered in the same pass (`popularity.Recommendations.add`).
    """
    ranks = np.zeros(len(cases.user), np.int64)
    users_per_batch = min(users_per_batch, max(1, SCORES_PER_BATCH // max(len(item_columns), 1)))
    # A case weighs its history, and at least a batch's fair share: so neither users nor events of a batch get too many.
    weight = np.maximum(cases.seen, EVENTS_READ // users_per_batch)
    groups = list(token_groups(weight, EVENTS_READ))
    for part in tqdm(groups, desc="ranking", unit="batch", disable=not progress, leave=False):
        batch = NextItemCases(cases.user[part], cases.seen[part], cases.item[part])
        scores = score(batch)
        target = item_columns[batch.item]
        known = target >= 0
        excluded = seen_columns(log, batch, item_columns) if exclude_seen else None
        found = ranks_of_targets(scores, np.where(known, target, 0), excluded)
        ranks[part] = np.where(known, found, LAST_RANK)
        if observe is not None:
            observe(scores, target, excluded)
    return ranks


def seen_columns(log: EventLog, cases: NextItemCases, item_columns: Int) -> tuple[Int, Int]:
    """(columns of the items that each user met before the label, repeats included; offsets int64 [N+1])."""
    history = log.gather(cases.user, cases.seen)
    columns = item_columns[history.item]
    known = columns >= 0
    # Known ones among the first t packed events: at the offsets they are the offsets of what is kept.
    known_before = np.concatenate([[0], np.cumsum(known)]).astype(np.int64)
    return columns[known], known_before[history.offsets]


def ranking_metrics(ranks: Int, top_k: list[int]) -> dict[str, float]:
    """{"hr@10": …, "ndcg@10": …} of 0-based ranks."""
    return {f"{name}@{k}": metric(ranks, k) for k in top_k for name, metric in (("hr", hit_rate), ("ndcg", ndcg))}


def impression_metrics(cases: ImpressionCases, probability: Floats) -> dict[str, float]:
    """AUC, GAUC, NE and calibration of each task; `probability` float32 [N, num_tasks] is what is judged."""
    metrics: dict[str, float] = {}
    for index, task in enumerate(cases.tasks):
        known = cases.mask[:, index]
        label, predicted = cases.label[known, index], probability[known, index]
        if len(np.unique(label)) < 2:
            continue
        metrics[f"auc/{task}"] = auc(label, predicted)
        metrics[f"gauc/{task}"] = gauc(cases.user[known], label, predicted).value
        metrics[f"ne/{task}"] = normalized_entropy(label, predicted)
        metrics[f"calibration/{task}"] = calibration(label, predicted).ratio
    return metrics
