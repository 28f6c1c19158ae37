"""Recall and NDCG as Yambda's benchmark (github.com/homutov/yambda-benchmark) computes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from vista.arrays import Floats
from vista.config import DataConfig, EvaluateConfig
from vista.evaluation.protocol import split_windows, window_metric
from vista.log.event_log import EventLog
from vista.log.splits import part_counts


def yambda_metrics(
    per_user: Mapping[str, Floats], log: EventLog, data: DataConfig, asked: EvaluateConfig
) -> dict[str, float]:
    """The benchmark's metrics, of the metrics per user of one window that reaches to the end of the log.

    With n events of a user in the test, repeats included, recall@k is the number of different hits over n, averaged
    over users. NDCG@k is the discounted gain of these hits over that of min(k, n) hits in front, each summed over all
    users. vista's own recall and NDCG count an item once, divide by at most k, and average per user.

    Args:
        per_user: {"precision@10/50-events": float64 [N], …} of `measure_windows`.
        data: the split.
        asked: how they were measured.

    Returns:
        {"recall@10": …, "ndcg@10": …} for each k of `asked`.
    """
    ((window, cases),) = split_windows(log, data, asked).items()
    _, first, _ = part_counts(log, data, asked.split)
    num_events, num_items = (log.lengths - first)[cases.user], np.diff(cases.offsets)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(max(asked.top_k)) + 2))])
    metrics = {}
    for k in asked.top_k:
        precision, ndcg = (per_user[window_metric(f"{name}@{k}", window)] for name in ("precision", "ndcg"))
        gain = ndcg * best[np.minimum(num_items, k)]
        metrics[f"recall@{k}"] = float((precision * k / num_events).mean())
        metrics[f"ndcg@{k}"] = float(gain.sum() / best[np.minimum(num_events, k)].sum())
    return metrics
