"""Boosted trees on counters of the items that a user had: which of them return?"""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.boosted_trees import boosted_trees, in_windows
from vista.evaluation.baselines.counter_features import counter_features
from vista.evaluation.baselines.popularity import tie_breaker
from vista.evaluation.baselines.training_questions import training_questions
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog

_USERS_PER_BLOCK = 256


class CounterTrees:
    """Probability that an item of the history occurs in the next events, by scikit-learn's HistGradientBoosting.

    Other items rank below, by popularity.

    Raises:
        MissingDependencyError: when it is made, if scikit-learn is not installed.
    """

    name = "counter trees"

    def __init__(self, *, horizon_events: int, at_one_time: bool) -> None:
        """
        Args:
            horizon_events: number of next events in which an item may return.
            at_one_time: whether all users are asked at one time (as in a split by time), or each after an event.
        """
        self._make = boosted_trees(self.name)
        self._horizon, self._at_one_time = horizon_events, at_one_time

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._popularity = item_counts(log, counts)
        self._tie = tie_breaker(self._popularity)
        inputs, labels = [], []
        for before, cases in training_questions(log, counts, self._horizon, at_one_time=self._at_one_time):
            popularity = item_counts(log, before)
            for begin in range(0, len(cases), _USERS_PER_BLOCK):
                part = cases.part(slice(begin, begin + _USERS_PER_BLOCK))
                features = counter_features(log, part.user, part.seen, part.now, popularity)
                inputs.append(features.value)
                labels.append(in_windows(part, features.row, features.item, log.num_items))
        label = np.concatenate(labels) if labels else np.zeros(0, np.bool_)
        self._trees: Any = None
        if label.any() and not label.all():
            seed = int(rng.integers(1 << 31))
            self._trees = self._make(max_iter=120, learning_rate=0.08, random_state=seed)
            self._trees.fit(np.concatenate(inputs), label)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = np.tile(self._tie, (len(user), 1))
        features = counter_features(self._log, user, seen, now, self._popularity)
        if self._trees is not None and len(features.row):
            out[features.row, features.item] += self._trees.predict_proba(features.value)[:, 1]
        return out
