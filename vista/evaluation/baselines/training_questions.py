"""Questions in the training part, for baselines that learn: each has its whole window of answers before the cut."""

from __future__ import annotations

import numpy as np

from vista.arrays import Int
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.log.event_log import EventLog

MIN_SEEN = 50
"""Users with fewer events before a question are not asked."""
SHARES = (0.7, 0.8, 0.9)
"""Shares of the visible events that come before the questions."""


def training_questions(
    log: EventLog, counts: Int, horizon_events: int, *, at_one_time: bool
) -> list[tuple[Int, WindowCases]]:
    """The events before a question, int64 [num_users] of all users, and its cases: one question per share of SHARES.

    Users whose next `horizon_events` events pass the cut are not asked.

    Args:
        counts: int64 [num_users] visible events.
        at_one_time: ask all users at the time when this share of all visible events has occurred; otherwise ask each
            user after this share of their own events.
    """
    time = log.gather(np.arange(log.num_users), counts, features=False).timestamp if at_one_time else None
    questions = []
    for share in SHARES:
        if time is None:
            before, now = (share * counts).astype(np.int64), None
        else:
            now = int(np.quantile(time, share)) if len(time) else 0
            before = np.minimum(log.counts_before(now), counts)
        cases = window_cases(
            log,
            before,
            counts,
            horizon_events=horizon_events,
            now=now,
            min_seen=MIN_SEEN,
            min_after=horizon_events,
        )
        questions.append((before, cases))
    return questions
