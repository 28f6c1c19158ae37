"""Logistic regressions of true probabilities, on features as they are or on bins of them."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

_RIDGE = 1e-4
CALIBRATION_PRIOR = 10.0
_NUM_BINS = 12
_NUM_JOINT_BINS = 6
_NUM_JOINT = 4
"""Number of features, from the first on, whose interactions in pairs count."""


def fit_probability(features: NDArray[np.float64], probability: NDArray[np.floating]) -> NDArray[np.float64]:
    """Weights [F] of a logistic regression of probabilities [N] on features [N, F] (Newton's method, small ridge)."""
    num_features = features.shape[1]
    ridge = _RIDGE * len(features) / num_features
    return _newton(features, probability, ridge, np.zeros(num_features), most_steps=12, tolerance=1e-6)


def fit_calibration(
    logit: NDArray[np.floating], label: NDArray[np.floating], looks: NDArray[np.floating] | float = 1.0
) -> tuple[float, float]:
    """Slope and shift of logits [N] that fit labels [N]: Platt scaling (1999), drawn to 1 and 0 as by CALIBRATION_PRIOR
    cases. A slope that is not positive, which would reverse the order, leaves logits as they are.

    Args:
        looks: [N] probabilities that users looked; a label is 1 with `looks` times the calibrated probability.
    """
    features, identity = np.stack([logit, np.ones(len(logit))], 1).astype(np.float64), np.array([1.0, 0.0])
    weights = _newton(features, label, CALIBRATION_PRIOR, identity, most_steps=30, tolerance=1e-9, looks=looks)
    slope, shift = weights.tolist()
    return (slope, shift) if slope > 0 and np.isfinite(weights).all() else (1.0, 0.0)


def _newton(
    features: NDArray[np.float64],
    probability: NDArray[np.floating],
    ridge: float,
    center: NDArray[np.float64],
    *,
    most_steps: int,
    tolerance: float,
    looks: NDArray[np.floating] | float = 1.0,
) -> NDArray[np.float64]:
    """Weights [F] of a logistic regression of probabilities [N] on features [N, F], with a ridge around `center` [F].
    They start at 0, because Newton's method may diverge from large weights."""
    target, weights, penalty = probability.astype(np.float64), np.zeros(len(center)), ridge * np.eye(len(center))
    for _ in range(most_steps):
        estimate = predict_probability(features, weights)
        rest = np.maximum(1 - estimate, 1e-300)
        share = rest / (rest + estimate * (1 - looks))  # of 0s that were looked at; 1 where all are
        gradient = features.T @ ((target - estimate * looks) * share) - penalty @ (weights - center)
        curvature = (features * (estimate * (1 - estimate) * looks * share)[:, None]).T @ features + penalty
        step = np.linalg.solve(curvature, gradient)
        weights += step
        if np.abs(step).max() < tolerance:
            break
    return weights


def predict_probability(features: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """Probabilities [N] of a logistic regression with weights [F] for features [N, F]."""
    return np.asarray(1 / (1 + np.exp(-np.clip(features @ weights, -500, 500))))


def binned_features(raw: NDArray[np.float64]) -> NDArray[np.float64]:
    """Regressors [N, F] that let a logistic regression follow any smooth function of `raw`.

    They are a constant, the features and their squares, bins of each feature, and joint bins of each two of the first
    four features.

    Args:
        raw: [N, R] features, those whose interactions matter most first.
    """
    columns = [np.ones((len(raw), 1)), raw, raw**2]
    columns += [_cells(_bins(raw[:, index], _NUM_BINS)) for index in range(raw.shape[1])]
    for left, right in itertools.combinations(range(min(_NUM_JOINT, raw.shape[1])), 2):
        cell = _bins(raw[:, left], _NUM_JOINT_BINS) * _NUM_JOINT_BINS + _bins(raw[:, right], _NUM_JOINT_BINS)
        columns.append(_cells(cell))
    return np.concatenate(columns, axis=1)


def _bins(values: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Bin of each value, 0..count-1; the edges are quantiles of the distinct values."""
    edges = np.unique(np.quantile(np.unique(values), np.arange(1, count) / count))
    return np.searchsorted(edges, values, side="right")


def _cells(code: NDArray[np.int64]) -> NDArray[np.float64]:
    """One-hot columns for the codes that occur."""
    return np.asarray(code[:, None] == np.unique(code), dtype=np.float64)
