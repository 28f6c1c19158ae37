"""A baseline whose hyperparameters are chosen before the cut: each user's last visible events are held out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.arrays import Int
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.metrics import Floats
from vista.evaluation.protocol import case_batches, rank_windows
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.log.event_log import EventLog

MAX_USERS = 200
"""Most users whose last events are held out."""
MIN_SEEN = 50
"""A user needs so many events before the held-out ones, or one per event of the horizon if that is less."""
_USERS_PER_BATCH = 128


class Tuned:
    """The best of several baselines by NDCG@10 of the items in the last visible events, fitted to all of them."""

    def __init__(self, name: str, candidates: Sequence[CountingBaseline], *, horizon_events: int) -> None:
        """
        Args:
            candidates: the first one is used if no user has enough events.
            horizon_events: number of events that are held out per user.
        """
        self.name = name
        self.chosen = candidates[0]
        """After `fit`, the best one."""
        self._candidates, self._horizon = candidates, horizon_events

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        min_seen = min(self._horizon, MIN_SEEN)
        asked = np.flatnonzero(counts >= min_seen + self._horizon)
        asked = rng.permutation(asked)[:MAX_USERS]
        held = counts.copy()
        held[asked] -= self._horizon
        cases = window_cases(
            log, held, counts, horizon_events=self._horizon, min_seen=min_seen, min_after=self._horizon
        )
        seeds = rng.integers(1 << 31, size=len(self._candidates) + 1)
        if len(cases):
            qualities = []
            for candidate, seed in zip(self._candidates, seeds[1:], strict=True):
                candidate.fit(log, held, np.random.default_rng(seed))
                qualities.append(self._quality(candidate, log, cases))
            self.chosen = self._candidates[int(np.argmax(qualities))]
        self.chosen.fit(log, counts, np.random.default_rng(seeds[0]))

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return self.chosen.scores(user, seen, now)

    def _quality(self, candidate: CountingBaseline, log: EventLog, cases: WindowCases) -> float:
        metrics = rank_windows(
            log,
            {"held out": cases},
            np.arange(log.num_items),
            lambda asked: candidate.scores(asked.user, asked.seen, asked.now),
            case_batches(cases, log.num_items, _USERS_PER_BATCH),
            [10],
        )
        return float(np.mean(metrics["held out"]["ndcg@10"]))
