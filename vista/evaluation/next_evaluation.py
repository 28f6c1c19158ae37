"""Quality over the next items of a split: the very next event of each user, ranked among all items."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import DataConfig, EvaluateConfig
from vista.evaluation.cases import NextItemCases, next_item_cases
from vista.evaluation.cases_digest import cases_digest
from vista.evaluation.per_user_metrics import PerUserMetrics
from vista.evaluation.protocol import case_batches, rank_next_items, ranking_values
from vista.log.event_log import EventLog
from vista.log.repeats import leaves_out_seen
from vista.log.splits import part_counts
from vista.progress_bar import progress_bar
from vista.ranks import Ranks


def measure_next_items(
    log: EventLog,
    data: DataConfig,
    columns: Int,
    config: EvaluateConfig,
    score: Callable[[NextItemCases], NDArray[np.floating[Any]]],
    ranks: Ranks | None = None,
    *,
    observe: Callable[[NDArray[np.float32], Int, tuple[Int, Int] | None], None] | None = None,
) -> tuple[Int, PerUserMetrics]:
    """Rank the next items of a part of a split.

    Args:
        data: the split, and whether to leave out seen items.
        columns: int64 [log.num_items], the column of each of the log's items in the scores; -1 for items without one.
        score: some cases -> [n, V] scores.
        ranks: processes that each answer a part of the cases; None for a single process.
        observe: as in `rank_next_items`.

    Returns:
        0-based ranks of the labels, int64 [N], and each user's metrics.
    """
    cases = next_item_cases(log, *part_counts(log, data, config.split))
    own = cases if ranks is None else cases.part(ranks.part_of(cases.seen + 1))
    batches = case_batches(own, log.num_items, config.users_per_batch)
    exclude_seen = excludes_seen(log, data, config)
    places = rank_next_items(
        log,
        own,
        columns,
        score,
        progress_bar(batches, desc="ranking", unit="batch", shown=config.progress, leave=False),
        exclude_seen=exclude_seen,
        observe=observe,
    )
    if ranks is not None:
        places = ranks.of_all_cases({"place": places})["place"]
    question = {
        "target": config.target.value,
        "split": config.split,
        "exclude_seen": exclude_seen,
        "cases": [cases_digest(log, cases.user, cases.item, cases.seen)],
    }
    return places, PerUserMetrics(log.users.ids(cases.user), ranking_values(places, config.top_k), question)


def excludes_seen(log: EventLog, data: DataConfig, config: EvaluateConfig) -> bool:
    """Whether items of the history are left out of the lists."""
    return leaves_out_seen(log, data) if config.exclude_seen is None else config.exclude_seen
