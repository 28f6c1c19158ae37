"""Which events of a history went and which came: what turns a state of the old one into a state of the new."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.log.histories import Histories

Int = NDArray[np.int64]


def changed_positions(old: Histories, new: Histories) -> tuple[Int, Int] | None:
    """(gone, late): rising positions in `old` and in `new` (B = 1) without which both are the same sequence.

    Equal events are exchanged together where some of them went. None where the rest is not in one order: events of
    one moment changed places.
    """
    events = np.concatenate([_rows(old), _rows(new)])
    _, kind = np.unique(events, axis=0, return_inverse=True)
    kind = kind.reshape(-1)
    num_kinds, in_old, in_new = int(kind.max(initial=-1)) + 1, kind[: old.num_events], kind[old.num_events :]
    before = np.bincount(in_old, minlength=num_kinds)
    after = np.bincount(in_new, minlength=num_kinds)
    kept = np.where(after >= before, before, 0)
    gone = np.flatnonzero(_place(in_old) >= kept[in_old])
    late = np.flatnonzero(_place(in_new) >= kept[in_new])
    rest = np.delete(in_old, gone), np.delete(in_new, late)
    return (gone, late) if np.array_equal(*rest) else None


def _rows(history: Histories) -> Int:
    """int64 [T, 3 or 4] events of a history as rows."""
    columns = [history.item, history.timestamp, history.action]
    if history.rating is not None:
        columns.append(np.asarray(history.rating, np.float32).view(np.int32))
    return np.stack([np.asarray(column).astype(np.int64) for column in columns], axis=1)


def _place(kind: Int) -> Int:
    """How many equal events come before each."""
    order = np.argsort(kind, kind="stable")
    ordered = kind[order]
    first = np.searchsorted(ordered, ordered)
    place = np.empty(len(kind), np.int64)
    place[order] = np.arange(len(kind)) - first
    return place
