"""How quality is measured: next items and windows by full ranking, impressions by their labels.

Validation during training asks the model and `vista evaluate` asks the scorer; both are measured here, and so are
counting baselines. Letters: N cases, V items of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.evaluation.cases import ImpressionCases, NextItemCases
from vista.evaluation.metrics import auc, calibration, gauc, normalized_entropy, ranks_of_targets
from vista.evaluation.per_user_metrics import mean_and_error
from vista.evaluation.window_cases import WindowCases
from vista.evaluation.window_metrics import window_metrics
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.log.splits import EVENTS_PER_BLOCK

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
    """(columns of the items in each user's history before the question, repeats included; offsets int64 [N+1])."""
    history = log.gather(cases.user, cases.seen, features=False)
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


def impression_metrics(cases: ImpressionCases, probability: Float32s) -> dict[str, float]:
    """AUC, GAUC, NE and calibration of each task with labels of both kinds; probability: float32 [N, num_tasks]."""
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
