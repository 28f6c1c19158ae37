"""Pooled factors: means of fixed item vectors over the history, and a logistic regression of what comes next on them.

Letters: n users, M columns of the vectors, K means, V items.
"""

from __future__ import annotations

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.pooled_means import factor_vectors, pooled_means
from vista.evaluation.baselines.training_questions import training_questions
from vista.evaluation.window_cases import WindowCases
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.logistic_regression import fit_probability

_NEGATIVES = 300
"""Random items per user in the regression, drawn in proportion to 1 + popularity."""
_USERS_PER_BLOCK = 256


class PooledFactors:
    """Score: Σ_k w_k cos(item, mean_k) + w log(1 + popularity).

    The vectors are a factorization of co-occurrences (`item_factors`); the means are those of `pooled_means`. The
    weights are those of a logistic regression of the items of a window before the cut, with vectors from the events
    before that window.
    """

    name = "pooled factors"

    def __init__(self, *, horizon_events: int, dim: int = 64) -> None:
        """
        Args:
            horizon_events: number of next events whose items are predicted.
            dim: number of columns of the vectors.
        """
        self._horizon, self._dim = horizon_events, dim
        self._weights: Floats = np.array([0.0, 0.0, 1.0, 0.0, 0.0])  # the mean of all, if no window can be asked

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        seed = int(rng.integers(1 << 31))
        questions = training_questions(log, counts, self._horizon, at_one_time=False)
        before, cases = max(questions, key=lambda question: len(question[1]))
        if len(cases):
            self._read(before, seed)
            self._weights = self._fitted(cases, rng)
        self._read(counts, seed)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        means = pooled_means(self._log, self._vectors, user, seen)  # [K, n, M]
        wanted = np.tensordot(self._weights[:-1], means, axes=1)
        out: Floats = wanted @ self._vectors.T + self._weights[-1] * self._popularity
        return out

    def _read(self, counts: Int, seed: int) -> None:
        """Set the vectors and the log popularity of all items from some visible events."""
        self._vectors = factor_vectors(self._log, counts, self._dim, seed)
        self._events = item_counts(self._log, counts)
        self._popularity = np.log1p(self._events)

    def _fitted(self, cases: WindowCases, rng: np.random.Generator) -> Floats:
        share = (1 + self._events) / (1 + self._events).sum()
        features, labels = [], []
        for begin in range(0, len(cases), _USERS_PER_BLOCK):
            part = cases.part(slice(begin, begin + _USERS_PER_BLOCK))
            means = pooled_means(self._log, self._vectors, part.user, part.seen)
            positive = np.repeat(np.arange(len(part)), np.diff(part.offsets))
            drawn = np.repeat(np.arange(len(part)), _NEGATIVES)
            row = np.concatenate([positive, drawn])
            item = np.concatenate([part.item, rng.choice(self._log.num_items, len(drawn), p=share)])
            cosines = np.einsum("knm,nm->nk", means[:, row], self._vectors[item])
            features.append(np.column_stack([cosines, self._popularity[item], np.ones(len(row))]))
            labels.append(np.arange(len(row)) < len(positive))
        weights = fit_probability(np.concatenate(features), np.concatenate(labels).astype(np.float64))
        # Negatives are drawn in proportion to 1 + popularity, so the fitted weight of log popularity is 1 too low.
        weights[-2] += 1
        return weights[:-1]
