"""Earlier events of an item or a category, against plain loops."""

from __future__ import annotations

import numpy as np

from vista.evaluation.earlier_events import EarlierEvents
from vista.log.event_log import EventLog


def questions(log: EventLog, num: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    user = rng.integers(0, log.num_users, num)
    return user, rng.integers(0, log.lengths[user] + 1), rng.integers(0, log.num_items, num)


def test_counts_and_ages_are_those_of_a_loop(impression_log: EventLog) -> None:
    log, last = impression_log, (3, 20)
    group = np.arange(log.num_items) % 7
    group[::11] = -1  # items without a category
    user, seen, item = questions(log)
    found = EarlierEvents.of(log, group, user, seen, item, last)
    num_with, num_without = 0, 0
    for n in range(len(user)):
        history = group[log.slice(int(user[n])).item[: seen[n]]]
        wanted = group[item[n]]
        places = np.flatnonzero(history == wanted) if wanted >= 0 else np.zeros(0, int)
        assert found.count[n] == len(places)
        assert found.newest_age[n] == (seen[n] - 1 - places[-1] if len(places) else -1)
        for k in last:
            assert found.recent[k][n] == (places >= seen[n] - k).sum()
        num_with, num_without = num_with + bool(len(places)), num_without + (not len(places))
    assert num_with > 50 and num_without > 50


def test_later_events_do_not_count(event_log: EventLog) -> None:
    user, seen, item = questions(event_log)
    same = np.arange(event_log.num_items)
    none = EarlierEvents.of(event_log, same, user, seen * 0, item)
    assert (none.count == 0).all() and (none.newest_age == -1).all()
