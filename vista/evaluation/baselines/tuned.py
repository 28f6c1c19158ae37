"""A baseline whose hyperparameter is chosen before the cut: some users' last visible events are held out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, TypeVar

import numpy as np

from vista.arrays import Floats, Int
from vista.evaluation.baselines.tunable_baseline import TunableBaseline
from vista.evaluation.per_user_metrics import mean_and_error
from vista.evaluation.protocol import case_batches, rank_windows
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.log.event_log import EventLog

MAX_USERS = 200
"""Most users whose last events are held out."""
MIN_SEEN = 50
"""A user needs so many events before the held-out ones, or one per event of the horizon if that is less."""
SHORT_EVENTS = 50
"""A window of up to so many events mostly tells what users do next, a longer one what they discover."""
_USERS_PER_BATCH = 128
Value = TypeVar("Value")


class Tuned(Generic[Value]):
    """A baseline with the best of several values for the last visible events, fitted to all visible events.

    The best value has the largest NDCG@10, or for horizons above SHORT_EVENTS the largest recall@50 of new items.
    """

    def __init__(self, baseline: TunableBaseline[Value], values: Sequence[Value], *, horizon_events: int) -> None:
        """
        Args:
            values: the first one is used if no user has enough events.
            horizon_events: number of events that are held out per user.
        """
        self.name = baseline.name
        self.chosen = values[0]
        """After `fit`, the best value."""
        self._baseline, self._values, self._horizon = baseline, values, horizon_events
        self._metric, self._k = ("ndcg@10", 10) if horizon_events <= SHORT_EVENTS else ("recall@50:new", 50)

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        min_seen = min(self._horizon, MIN_SEEN)
        asked = np.flatnonzero(counts >= min_seen + self._horizon)
        asked = rng.permutation(asked)[:MAX_USERS]
        held = counts.copy()
        held[asked] -= self._horizon
        cases = window_cases(
            log, held, counts, horizon_events=self._horizon, min_seen=min_seen, min_after=self._horizon
        )
        self.chosen = self._values[0]
        if len(cases):
            self._baseline.fit(log, held, rng)
            self.chosen = self._values[int(np.argmax([self._quality(value, log, cases) for value in self._values]))]
        self._baseline.choose(self.chosen)
        self._baseline.fit(log, counts, rng)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return self._baseline.scores(user, seen, now)

    def _quality(self, value: Value, log: EventLog, cases: WindowCases) -> float:
        self._baseline.choose(value)
        metrics = rank_windows(
            log,
            {"held out": cases},
            np.arange(log.num_items),
            lambda asked: self._baseline.scores(asked.user, asked.seen, asked.now),
            case_batches(cases, log.num_items, _USERS_PER_BATCH),
            [self._k],
        )
        return mean_and_error(metrics["held out"][self._metric])[0]
