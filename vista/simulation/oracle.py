"""The best possible metrics on a simulated log: those of the oracle, and of predictors that know less.

There are four kinds of predictor, all measured on the same impressions and labels:

- `oracle`: the probability that the labels were drawn from. Nothing does better except by chance.
- `last N`: an estimate of the best that is possible from the last N events before an impression. It knows more than a
  model could: the true topics of the events, and the true topic and quality of the candidate. It estimates the
  conditional expectation of the true probability from what the world says about these events (`window_features`).
- `whole history`: the same with unlimited N. It shows that the log contains what the oracle knows.
- `pooled`: the best linear function of pooled vectors (`pooled_features`).

The estimates are logistic regressions. They are fitted to true probabilities rather than to drawn labels, which spares
the sampling error of labels. Those of `last N` and `whole history` are fitted on the validation and test impressions of
one half of the users and measured on the other half, and vice versa. That of `pooled` is fitted on all users'
impressions before the test part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.logistic_regression import fit_probability, predict_probability
from vista.simulation.period import split_times
from vista.simulation.pooled_vectors import pooled_features
from vista.simulation.simulated_log import SimulatedLog
from vista.simulation.world_table import WORLDS

WINDOWS = (2000, 200, 32)
MAX_IMPRESSIONS = 200_000
"""Maximum number of impressions that are measured, to bound memory."""
MAX_FITTED = 40_000
"""Maximum number of impressions on which a predictor is fitted, approximately."""


@dataclass(frozen=True, slots=True)
class OracleMetrics:
    """Metrics of one predictor for one task on one set of impressions."""

    predictor: str
    """oracle | whole history | last N | pooled"""
    task: str
    num_impressions: int
    """Test impressions (the last 15% of the period) with a known label."""
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


def predict_from_window(
    log: SimulatedLog, window: int | None, chosen: NDArray[np.bool_], task: int = 0
) -> NDArray[np.float64]:
    """Best estimate [chosen.sum()] of a task's probability from the last `window` events, fitted on other users.

    Args:
        window: number of newest events that are known; None for all.
        chosen: [N] impressions to predict.
        task: index into the world's tasks.

    Raises:
        ValueError: if fewer than two users have late impressions with a known label.
    """
    late = log.impression_timestamp >= split_times(log.config)[0]
    fitted_on = _some(late & (log.label[:, task] >= 0))
    used = chosen | fitted_on
    features = WORLDS[log.config.world].window_features(log, window, used)
    target, half, fitted_on = log.probability[used, task], log.impression_user[used] % 2 == 0, fitted_on[used]
    if not (half & fitted_on).any() or not (~half & fitted_on).any():
        raise ValueError("reference predictors need impressions of at least two users; simulate more users")
    estimate = np.empty(len(features))
    for fold in (half, ~half):
        weights = fit_probability(features[~fold & fitted_on], target[~fold & fitted_on])
        estimate[fold] = predict_probability(features[fold], weights)
    return estimate[chosen[used]]


def _some(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Every k-th of the impressions of a mask, so that about MAX_FITTED remain at most."""
    kept = np.zeros_like(mask)
    places = np.flatnonzero(mask)
    kept[places[:: -(-len(places) // MAX_FITTED) or 1]] = True
    return kept


def predict_from_pooled_vectors(
    log: SimulatedLog, fitted_on: NDArray[np.bool_], chosen: NDArray[np.bool_], task: int = 0
) -> NDArray[np.float64]:
    """Estimate [chosen.sum()] of a task's probability by the best linear function of pooled vectors.

    Args:
        fitted_on: [N] impressions to fit on.
        chosen: [N] impressions to predict.
        task: index into the world's tasks.
    """
    views = WORLDS[log.config.world].pooled_views(log.catalog)
    weights = fit_probability(pooled_features(log, views, fitted_on), log.probability[fitted_on, task])
    return predict_probability(pooled_features(log, views, chosen), weights)


def oracle_metrics(log: SimulatedLog, *, tasks: Sequence[str] = ("click",)) -> list[OracleMetrics]:
    """AUC and NE of all predictors for each task, on the impressions of the test part.

    Args:
        tasks: some of the world's tasks; like and long_view are measured where their label is known. Beyond
            MAX_IMPRESSIONS, only the first users' impressions are used.

    Raises:
        ValueError: if a task is unknown, if both labels do not occur, or if no impression precedes the test part.
    """
    test = log.impression_timestamp >= split_times(log.config)[1]
    rows = []
    for name in tasks:
        task = WORLDS[log.config.world].tasks.index(name)
        known = log.label[:, task] >= 0
        chosen, earlier = test & known, _some(~test & known)
        chosen &= np.cumsum(chosen) <= MAX_IMPRESSIONS
        labels = log.label[chosen, task] == 1
        num_true = int(labels.sum())
        if num_true == 0 or num_true == len(labels):
            raise ValueError(
                f"{name}: not both labels occur in the {len(labels)} test impressions; simulate more users"
            )
        if not earlier.any():
            raise ValueError(f"{name}: no impression precedes the test part; simulate more users")
        estimates: list[tuple[str, NDArray[np.floating]]] = [
            ("oracle", log.probability[chosen, task]),
            ("whole history", predict_from_window(log, None, chosen, task)),
            *((f"last {window}", predict_from_window(log, window, chosen, task)) for window in WINDOWS),
            ("pooled", predict_from_pooled_vectors(log, earlier, chosen, task)),
        ]
        for predictor, estimate in estimates:
            auc = area_under_curve(labels, estimate)
            error = area_error(auc, num_true, len(labels) - num_true)
            ne = normalized_entropy(labels, estimate)
            rows.append(OracleMetrics(predictor, name, len(labels), auc, error, ne))
    return rows


def format_oracle_metrics(rows: Sequence[OracleMetrics]) -> str:
    """The metrics as a plain-text table."""
    lines = [f"{'task':10} {'predictor':14} {'AUC':>7} {'+-':>6} {'NE':>7}   impressions"]
    for row in rows:
        figures = f"{row.auc:7.4f} {row.auc_error:6.4f} {row.ne:7.4f}"
        lines.append(f"{row.task:10} {row.predictor:14} {figures}   {row.num_impressions} (test)")
    return "\n".join(lines)
