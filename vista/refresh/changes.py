"""Differences between two versions of a history: which events were deleted, and which were added."""

from __future__ import annotations

import numpy as np

from vista.arrays import Int
from vista.log.histories import Histories


def changed_positions(old: Histories, new: Histories) -> tuple[Int, Int] | None:
    """Positions of deleted events in `old` and of added events in `new`, without which both are the same sequence.

    If some of several equal events were deleted, all of them count as deleted and the remaining ones as added.

    Args:
        old: B = 1.
        new: B = 1, with the same columns of features.

    Returns:
        (deleted, added), ascending; None if the other events changed their order, as events of one time can.
    """
    events = np.concatenate([_rows(old), _rows(new)])
    _, kind = np.unique(events, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    num_kinds, in_old, in_new = int(kind.max(initial=-1)) + 1, kind[: old.num_events], kind[old.num_events :]
    before = np.bincount(in_old, minlength=num_kinds)
    after = np.bincount(in_new, minlength=num_kinds)
    kept = np.where(after >= before, before, 0)
    deleted = np.flatnonzero(_place(in_old) >= kept[in_old])
    added = np.flatnonzero(_place(in_new) >= kept[in_new])
    rest = np.delete(in_old, deleted), np.delete(in_new, added)
    return (deleted, added) if np.array_equal(*rest) else None


def _rows(history: Histories) -> Int:
    """The events of a history as rows of integers, int64 [T, columns]."""
    columns = [history.item, history.timestamp, history.action]
    if history.rating is not None:
        columns.append(np.asarray(history.rating, np.float32).view(np.int32))
    columns += [column.view(np.int32) for column in map(np.ascontiguousarray, history.features.columns.values())]
    return np.stack([np.asarray(column).astype(np.int64) for column in columns], axis=1)


def _place(kind: Int) -> Int:
    """How many equal events come before each event."""
    order = np.argsort(kind, kind="stable")
    ordered = kind[order]
    first = np.searchsorted(ordered, ordered)
    place = np.empty(len(kind), np.int64)
    place[order] = np.arange(len(kind)) - first
    return place
