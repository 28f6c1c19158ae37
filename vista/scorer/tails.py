"""Tails that callers bring: checked, and merged with the stored ones."""

from __future__ import annotations

import numpy as np

from vista.model.ranking_model import RankingModel
from vista.scorer.requests import array_of, check_times, integers, item_rows
from vista.store.batches import StoredBatch, Tail


def checked_tail(tail: Tail, num_users: int, num_actions: int) -> Tail:
    """A caller's tail as NumPy arrays of the record's types (items stay raw ids).

    Raises:
        ValueError, TypeError: naming the part, if it does not fit `num_users` users.
    """
    if not isinstance(tail, Tail):
        raise TypeError(f"tail: needs a Tail(items, times, actions, offsets), got a {type(tail).__name__}")
    arrays = {
        "items": array_of(tail.items, "tail.items"),
        "times": integers(tail.times, "tail.times", "integer milliseconds"),
        "actions": integers(tail.actions, "tail.actions"),
        "offsets": integers(tail.offsets, "tail.offsets"),
    }
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"tail.{name}: needs one dimension, got shape {array.shape}")
    count = len(arrays["items"])
    for name in ("times", "actions"):
        if len(arrays[name]) != count:
            raise ValueError(f"tail.{name}: {len(arrays[name])} values for {count} items")
    offsets, actions = arrays["offsets"], arrays["actions"]
    if len(offsets) != num_users + 1 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"tail.offsets: must rise from 0 to {count} in {num_users + 1} values, got {offsets.tolist()[:6]} …"
        )
    if count and (actions.min() < 0 or actions.max() >= num_actions):
        raise ValueError(f"tail.actions: codes must lie in [0, {num_actions}), got {actions.min()} to {actions.max()}")
    return Tail(arrays["items"], arrays["times"], actions.astype(np.uint8), offsets)


def with_fresh_events(model: RankingModel, stored: StoredBatch, tail: Tail) -> Tail:
    """The stored tails of a batch and a caller's, whose items are raw ids; errors as `checked_tail`."""
    checked = checked_tail(tail, len(stored.found), len(model.schema.actions))
    rows = item_rows(model, checked.items, "tail.items")
    check_times(model, "tail.times", checked.times, stored)
    fresh = Tail(rows.astype(np.int32), checked.times, checked.actions, checked.offsets)
    return merge_tails(stored.tail, fresh, model.config.tail_len)


def merge_tails(stored: Tail, fresh: Tail, tail_len: int) -> Tail:
    """Union of two packed tails of the same users, oldest first, the newest `tail_len` events kept.

    A fresh event counts once, and not at all where the stored tail holds it (same time, item and action): callers may
    send what the refresh has seen, or send it twice. Equal times keep their order, stored first.

    Args:
        stored, fresh: items are model rows.
    """
    num_users = len(stored.offsets) - 1
    user = np.concatenate([np.repeat(np.arange(num_users), np.diff(t.offsets)) for t in (stored, fresh)])
    item = np.concatenate([stored.items, fresh.items])
    time = np.concatenate([stored.times, fresh.times])
    action = np.concatenate([stored.actions, fresh.actions])
    place = np.arange(len(user))
    # Doubles: sorted by what makes an event the same, then by place; all but the first of a run go.
    by_event = np.lexsort((place, action, item, time, user))
    same = np.zeros(len(user), bool)
    if len(user) > 1:
        a, b = by_event[:-1], by_event[1:]
        same[1:] = (user[a] == user[b]) & (time[a] == time[b]) & (item[a] == item[b]) & (action[a] == action[b])
    double = np.zeros(len(user), bool)
    double[by_event[same]] = place[by_event[same]] >= len(stored.items)
    order = np.lexsort((place, time, user))
    order = order[~double[order]]
    counts = np.bincount(user[order], minlength=num_users)
    ends = np.cumsum(counts)
    from_end = np.repeat(ends, counts) - np.arange(len(order))
    order = order[from_end <= tail_len]
    offsets = np.concatenate([[0], np.cumsum(np.minimum(counts, tail_len))]).astype(np.int64)
    return Tail(item[order], time[order], action[order], offsets)
