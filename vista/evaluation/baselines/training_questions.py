"""Questions in the training part, for baselines that learn: each has its whole window of answers before the cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Int
from vista.evaluation.baselines.visible_events import visible_events
from vista.log.event_log import EventLog

MIN_SEEN = 50
"""Users with fewer events before a question are not asked."""
SHARES = (0.7, 0.8, 0.9)
"""Shares of the visible events that come before the questions."""


@dataclass(frozen=True, slots=True)
class TrainingQuestion:
    """One question to each of some users: which items occur in the next events?"""

    counts: Int
    """int64 [num_users] events before the question, of all users of the log."""
    user: Int
    """int64 [n] users that are asked."""
    now: Int | None
    """int64 [n] time of the question in ms; None asks right after each user's newest event."""

    @property
    def seen(self) -> Int:
        """int64 [n] events before the question."""
        return self.counts[self.user]


def training_questions(log: EventLog, counts: Int, horizon_events: int, *, at_one_time: bool) -> list[TrainingQuestion]:
    """One question per share of SHARES. Users whose next `horizon_events` events pass the cut are not asked.

    Args:
        counts: int64 [num_users] visible events.
        at_one_time: ask all users at the time when this share of all visible events has occurred; otherwise ask each
            user after this share of their own events.
    """
    time = visible_events(log, np.arange(log.num_users), counts).timestamp if at_one_time else None
    questions = []
    for share in SHARES:
        if time is None:
            before, now = (share * counts).astype(np.int64), None
        else:
            at = int(np.quantile(time, share)) if len(time) else 0
            before = np.minimum(log.counts_before(at), counts)
        user = np.flatnonzero((before >= MIN_SEEN) & (before + horizon_events <= counts))
        now = None if time is None else np.full(len(user), at)
        questions.append(TrainingQuestion(before, user, now))
    return questions
