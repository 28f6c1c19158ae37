"""Boosted trees over candidates that are new to a user: which of them come next?"""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.boosted_trees import boosted_trees, in_windows
from vista.evaluation.baselines.new_item_features import NewItemFeatures, had_items
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.popularity import tie_breaker
from vista.evaluation.baselines.training_questions import training_questions
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog

_NEGATIVES = 500
"""Expected number of candidates per user in training that are drawn among those that do not come next."""
_DECAY = 200
_USERS_PER_BLOCK = 64
_MOST_BLOCKS = 32
"""Random blocks of users that are asked each training question, if there are more."""
_TREES = {"max_iter": 100, "learning_rate": 0.05, "max_leaf_nodes": 8, "min_samples_leaf": 100, "early_stopping": False}
"""Small trees: logs have few users with new items in a whole window before the cut."""


class NewItemTrees:
    """Score that grows with the probability that a new item occurs in the next events, by HistGradientBoosting.

    It is the probability in training (scikit-learn), where few of the candidates that do not occur are drawn. Only the
    candidates of `NewItemFeatures` have one. Other new items rank below them, by popularity. Items of the
    history rank above all new ones, by own frequency that decays over 200 events.

    Raises:
        MissingDependencyError: when it is made, if scikit-learn is not installed.
    """

    name = "new-item trees"

    def __init__(self, *, horizon_events: int, at_one_time: bool) -> None:
        """
        Args:
            horizon_events: number of next events in which an item may occur.
            at_one_time: whether all users are asked at one time (as in a split by time), or each after an event.
        """
        self._make = boosted_trees(self.name)
        self._horizon, self._at_one_time = horizon_events, at_one_time
        self._own = OwnFrequency(events=_DECAY)

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log = log
        self._tie = tie_breaker(item_counts(log, counts))
        self._own.fit(log, counts, rng)
        inputs, labels = [], [np.zeros(0, np.bool_)]
        for before, cases in training_questions(log, counts, self._horizon, at_one_time=self._at_one_time):
            if not len(cases):
                continue
            features = NewItemFeatures(log, before, rng)
            blocks = rng.permutation(np.arange(0, len(cases), _USERS_PER_BLOCK))[:_MOST_BLOCKS]
            for begin in blocks.tolist():
                part = cases.part(slice(begin, begin + _USERS_PER_BLOCK))
                found = features.candidates(part.user, part.seen, part.now)
                label = in_windows(part, np.arange(len(part))[:, None], found.item, log.num_items)
                drawn = rng.random(label.shape) < _NEGATIVES / label.shape[1]
                kept = found.is_new & (label | drawn)
                inputs.append(found.value[kept])
                labels.append(label[kept])
        label = np.concatenate(labels)
        self._trees: Any = None
        if label.any() and not label.all():
            self._trees = self._make(**_TREES, random_state=int(rng.integers(1 << 31)))
            self._trees.fit(np.concatenate(inputs), label)
            self._features = NewItemFeatures(log, counts, rng)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        out = np.tile(self._tie, (len(user), 1))
        if self._trees is not None:
            found = self._features.candidates(user, seen, now)
            row, place = found.is_new.nonzero()
            if len(row):
                out[row, found.item[row, place]] += self._trees.predict_proba(found.value[row, place])[:, 1]
        had = had_items(self._log, user, seen)
        return np.where(had, 1 + self._own.scores(user, seen, now), out)
