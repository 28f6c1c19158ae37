"""Logs whose users stay within one of two groups of items, for factorizations."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vista.arrays import Int
from vista.log.event_log import EventLog

HIDDEN = 2
"""Newest events of each user that are not visible."""
_EVERY_ITEM = 99
"""A user who had all items, so that all logs have the same vocabulary."""


def grouped_log(
    folder: Path, lengths: Sequence[int], *, num_items: int, group_size: int, offset: int, future: int
) -> EventLog:
    """A log of users with histories of some lengths.

    Args:
        group_size: items of a group; the second one, of odd users, begins at the item `offset`.
        future: changes the newest HIDDEN events of each user.
    """
    rng = np.random.default_rng(3)
    users, items = [], []
    for user, length in enumerate(lengths):
        history = (user % 2) * offset + rng.integers(0, group_size, length)
        history[-HIDDEN:] = (history[-HIDDEN:] + future) % num_items
        users += [user] * length
        items += history.tolist()
    users, items = [*users, *[_EVERY_ITEM] * num_items], [*items, *range(num_items)]
    return EventLog.from_frame(
        {"user": users, "item": items, "timestamp": np.arange(len(users))}, folder, time_unit="s"
    )


def visible(log: EventLog) -> Int:
    """Visible events of each user, int64 [num_users]; none of the user who had all items."""
    counts = np.maximum(log.lengths - HIDDEN, 0)
    counts[log.users.rows([_EVERY_ITEM])] = 0
    return counts
