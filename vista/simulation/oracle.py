"""The best possible metrics on a simulated log: those of the oracle, and of predictors that see only the last events.

There are three kinds of predictor, all measured on the same impressions and labels:

- `oracle`: the probability that the labels were drawn from. Nothing does better except by chance.
- `last N`: an estimate of the best that is possible from the last N events before an impression. It knows more than a
  model could: the true topics of the events, and the true topic and quality of the candidate. It estimates the
  conditional expectation of the true probability from counts of the topic's events in nested windows up to N.
- `whole history`: the same with unlimited N. It shows that the log contains what the oracle knows.

The estimate is a logistic regression on bins of the counts, their products, and the quality. It is fitted to true
probabilities rather than to drawn labels, so it has almost no sampling error. It is fitted on one half of the users and
measured on the other half, and vice versa.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.simulation.period import split_times
from vista.simulation.simulated_log import SimulatedLog
from vista.simulation.topic_index import TopicIndex
from vista.simulation.world import RECENT_EVENTS, TASKS, affinity

WINDOWS = (200, 32)
_NESTED = (8, 16, RECENT_EVENTS, 64, 128)
"""Shorter windows whose counts a predictor uses along with its own."""
MAX_IMPRESSIONS = 200_000
"""Maximum number of impressions that are measured, to bound memory."""
_RIDGE = 1e-4


@dataclass(frozen=True, slots=True)
class OracleMetrics:
    """Metrics of one predictor for one task on one set of impressions."""

    predictor: str
    """oracle | whole history | last N"""
    task: str
    impressions: str
    """test (the last 15% of the period) | all"""
    num_impressions: int
    """Impressions with a known label."""
    auc: float
    auc_error: float
    """Standard error of the AUC (Hanley and McNeil, 1982)."""
    ne: float
    """Normalized entropy: log loss divided by the entropy of the base rate."""


def area_under_curve(labels: NDArray[np.bool_], scores: NDArray[np.floating]) -> float:
    """AUC of scores [N] for labels [N]. Ties count half; NaN unless both classes occur."""
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    num_true = int(labels.sum())
    num_false = len(labels) - num_true
    if num_true == 0 or num_false == 0:
        return float("nan")
    return float((ranks[labels].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


def area_error(auc: float, num_true: int, num_false: int) -> float:
    """Standard error of an AUC (Hanley and McNeil, 1982)."""
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (num_true - 1) * (q1 - auc**2) + (num_false - 1) * (q2 - auc**2)
    return float(np.sqrt(spread / max(num_true * num_false, 1)))


def normalized_entropy(labels: NDArray[np.bool_], probabilities: NDArray[np.floating]) -> float:
    """Log loss of probabilities [N], divided by the entropy of the labels' base rate."""
    p = np.clip(probabilities.astype(np.float64), 1e-7, 1 - 1e-7)
    rate = labels.mean()
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(-np.where(labels, np.log(p), np.log1p(-p)).mean() / entropy)


def window_features(log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Regressors [chosen.sum(), F] of the chosen impressions, from the last `window` events (None: all events)."""
    index = TopicIndex(log.catalog.topic[log.item])
    items, position = log.impression_item[chosen], log.impression_position[chosen]
    topic = log.catalog.topic[items]
    first = log.offsets[log.impression_user[chosen]]
    stop = first + position
    longest = int(position.max(initial=1)) if window is None else window
    sizes = [size for size in _NESTED if size < longest] + [longest]
    counts = [index.count(topic, np.maximum(first, stop - size), stop) for size in sizes]

    seen = np.minimum(position, longest)
    share = affinity(counts[-1], seen)
    recent = np.log1p(counts[min(2, len(sizes) - 1)])
    smooth = [share, share**2, recent, recent**2, share * recent, np.log1p(seen), np.log1p(seen) * share]
    bins = [np.minimum((2 * np.log2(count + 1)).astype(np.int64), 15) for count in counts]
    cells = [np.eye(16)[code] for code in bins] + [_joint(bins[-1] // 2, bins[min(2, len(bins) - 1)] // 2)]
    quality = log.catalog.quality[items].astype(np.float64)
    mixed = [quality, quality * share, quality * recent]
    constant = np.ones(len(topic))
    return np.concatenate([np.stack([constant, *smooth, *mixed], axis=1), *cells], axis=1)


def _joint(left: NDArray[np.int64], right: NDArray[np.int64]) -> NDArray[np.float64]:
    """One-hot cells [N, 64] of pairs of codes in 0..7."""
    return np.asarray(np.eye(64)[left * 8 + right])


def fit_probability(features: NDArray[np.float64], probability: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights [F] of a logistic regression of probabilities [N] on features [N, F] (Newton's method, small ridge)."""
    target = probability.astype(np.float64)
    weights = np.zeros(features.shape[1])
    penalty = _RIDGE * len(features) / features.shape[1] * np.eye(len(weights))
    for _ in range(12):
        estimate = 1 / (1 + np.exp(-(features @ weights)))
        gradient = features.T @ (target - estimate) - penalty @ weights
        curvature = (features * (estimate * (1 - estimate))[:, None]).T @ features + penalty
        step = np.linalg.solve(curvature, gradient)
        weights += step
        if np.abs(step).max() < 1e-6:
            break
    return weights


def predict_from_window(
    log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_], task: int = 0
) -> NDArray[np.float64]:
    """Best estimate [chosen.sum()] of a task's probability from the last `window` events, fitted on other users.

    Args:
        window: number of newest events that are known; None for all.
        chosen: [N] impressions to fit on and to predict.
        task: index into TASKS.

    Raises:
        ValueError: if fewer than two users have impressions among the chosen.
    """
    features = window_features(log, window, chosen)
    target = log.probability[chosen, task]
    half = log.impression_user[chosen] % 2 == 0
    if half.all() or not half.any():
        raise ValueError("reference predictors need impressions of at least two users; simulate more users")
    estimate = np.empty(len(features))
    for fold in (half, ~half):
        estimate[fold] = 1 / (1 + np.exp(-(features[fold] @ fit_probability(features[~fold], target[~fold]))))
    return estimate


def oracle_metrics(
    log: SimulatedLog,
    *,
    windows: Sequence[int] = WINDOWS,
    tasks: Sequence[str] = ("click",),
    impressions: str = "test",
) -> list[OracleMetrics]:
    """AUC and NE of the oracle, of the whole history, and of the last events, for each task.

    Args:
        windows: numbers of newest events.
        tasks: some of TASKS; like and long_view are measured where their label is known.
        impressions: "test" for those from `split_times(config)[1]` on, or "all". Beyond MAX_IMPRESSIONS, only the first
            users' impressions are used.

    Raises:
        ValueError: if `impressions` or a task is unknown, or if both labels do not occur.
    """
    if impressions not in ("test", "all"):
        raise ValueError(f"impressions must be 'test' or 'all', got {impressions!r}")
    times = log.impression_timestamp
    chosen = times >= (split_times(log.config)[1] if impressions == "test" else 0)
    rows = []
    for name in tasks:
        task = TASKS.index(name)
        known = chosen & (log.label[:, task] >= 0)
        known &= np.cumsum(known) <= MAX_IMPRESSIONS
        labels = log.label[known, task] == 1
        num_true = int(labels.sum())
        if num_true == 0 or num_true == len(labels):
            raise ValueError(
                f"{name}: not both labels occur in the {len(labels)} {impressions} impressions; simulate more users"
            )
        estimates: list[tuple[str, NDArray[np.floating]]] = [("oracle", log.probability[known, task])]
        for window in (None, *windows):
            label = "whole history" if window is None else f"last {window}"
            estimates.append((label, predict_from_window(log, window, known, task)))
        for predictor, estimate in estimates:
            auc = area_under_curve(labels, estimate)
            error = area_error(auc, num_true, len(labels) - num_true)
            ne = normalized_entropy(labels, estimate)
            rows.append(OracleMetrics(predictor, name, impressions, len(labels), auc, error, ne))
    return rows


def format_oracle_metrics(rows: Sequence[OracleMetrics]) -> str:
    """The metrics as a plain-text table."""
    lines = [f"{'task':10} {'predictor':14} {'AUC':>7} {'+-':>6} {'NE':>7}   impressions"]
    for row in rows:
        figures = f"{row.auc:7.4f} {row.auc_error:6.4f} {row.ne:7.4f}"
        lines.append(f"{row.task:10} {row.predictor:14} {figures}   {row.num_impressions} ({row.impressions})")
    return "\n".join(lines)
