"""Checks the tails that callers pass, and merges them with the stored ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.errors import shown
from vista.log.histories import RowColumn
from vista.model.vista_model import VistaModel
from vista.scorer.request_arguments import (
    MAX_TAIL_EVENTS,
    array_of,
    id_array,
    impossible_times,
    integers,
    item_rows,
    length_of,
    not_a_time,
    require_most,
)
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail

Integers = NDArray[Any]
Bools = NDArray[np.bool_]


def checked_tail(tail: Tail, num_users: int, actions: Sequence[str]) -> Tail:
    """Convert a caller's tail to NumPy arrays: raw item ids, and int64 for everything else except features.

    Args:
        tail: of the users.
        num_users: B.
        actions: those of the model by code, which replaces a name.

    Raises:
        ValueError, TypeError: a part of the tail is invalid for `num_users` users; the message names it.
    """
    if not isinstance(tail, Tail):
        raise TypeError(f"tail: must be a Tail(items, times, actions, offsets), got a {type(tail).__name__}")
    if not isinstance(tail.features, Mapping):
        raise TypeError(f"tail.features: must be a mapping of names to values, got a {type(tail.features).__name__}")
    require_most(length_of(tail.items), MAX_TAIL_EVENTS, "tail.items", "events")
    arrays = {
        "items": id_array(tail.items, "tail.items"),
        "times": integers(tail.times, "tail.times", "integer milliseconds"),
        "actions": _action_codes(tail.actions, actions),
        "offsets": integers(tail.offsets, "tail.offsets"),
    }
    for name, array in arrays.items():
        if array.ndim != 1:
            raise ValueError(f"tail.{name}: must be one-dimensional, got shape {array.shape}")
    count = len(arrays["items"])
    for name in ("times", "actions"):
        if len(arrays[name]) != count:
            raise ValueError(f"tail.{name}: holds {len(arrays[name])} values for {count} items")
    offsets = arrays["offsets"]
    if len(offsets) != num_users + 1 or offsets[0] != 0 or offsets[-1] != count or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"tail.offsets: must be {num_users + 1} values that rise from 0 to {count}, got {len(offsets)} values that "
            f"start with {offsets.tolist()[:6]}"
        )
    features = {name: _column(name, values) for name, values in tail.features.items()}
    return Tail(arrays["items"], arrays["times"], arrays["actions"], offsets, features)


def _action_codes(given: Any, actions: Sequence[str]) -> Int:
    """A caller's actions as codes. None stands for the action of a model that has only one.

    Raises:
        ValueError: a name is not one of the model's actions: the caller's mistake, whichever user it is for.
    """
    array = array_of(given, "tail.actions")
    if array.dtype.kind not in "UO" or not all(one is None or isinstance(one, str) for one in array.flat):
        return integers(array, "tail.actions")
    codes: dict[str | None, int] = {name: code for code, name in enumerate(actions)}
    if len(actions) <= 1:
        codes[None] = 0
    for name in array.flat:
        if name not in codes:
            given_name = None if name is None else str(name)
            raise ValueError(
                f"tail.actions: {shown(given_name)} is not one of this model's actions, {shown(list(actions))}"
            )
    return np.array([codes[one] for one in array.flat], np.int64).reshape(array.shape)


def _column(name: Any, values: Any) -> Any:
    """A caller's values of a feature, with a length."""
    if isinstance(values, (list, tuple)):
        return values
    array = array_of(values, f"tail.features: {name!r}")
    if array.ndim != 1:
        raise ValueError(f"tail.features: {name!r} must be a list of values, or one-dimensional, got {shown(values)}")
    return array


def with_fresh_events(model: VistaModel, stored: StoredBatch, tail: Tail, *, refuse: bool) -> tuple[Tail, Bools, Bools]:
    """Merge the stored tails of a batch with a caller's tail, whose items are raw ids.

    Args:
        model: the model in service.
        stored: of B users.
        tail: of the same users.
        refuse: raise if the code of an action or a time is impossible; otherwise keep that user's stored tail.

    Returns:
        The merged tails, which of their events are fresh, [N], and which users' events were impossible, [B].

    Raises:
        ValueError, TypeError: a part of the tail is invalid; the message names it.
    """
    num_users, actions = len(stored.found), model.schema.actions
    checked = checked_tail(tail, num_users, actions)
    lengths = np.diff(checked.offsets)
    no_action = (checked.actions < 0) | (checked.actions >= len(actions))
    late = np.zeros(len(checked.times), np.bool_)
    if model.schema.has_time:
        late = impossible_times(checked.times, np.repeat(stored.last_event_ts, lengths))
    if refuse and no_action.any():
        raise ValueError(
            f"tail.actions: codes must lie in [0, {len(actions)}), got {checked.actions[no_action.argmax()]}"
        )
    if refuse and late.any():
        raise not_a_time("tail.times", checked.times[late][0])
    bad = np.zeros(num_users, np.bool_)
    bad[np.repeat(np.arange(num_users), lengths)[no_action | late]] = True
    kept = ~np.repeat(bad, lengths)
    ids = checked.items[kept]
    rows = model.history_rows(item_rows(model, ids, "tail.items"))
    offsets = offsets_of(np.where(bad, 0, lengths))
    features = {name: column[kept] for name, column in _model_features(model, checked).items()}
    fresh = Tail(rows.astype(np.int32), checked.times[kept], checked.actions[kept].astype(np.uint8), offsets, features)
    names = np.unique(ids, return_inverse=True)[1]
    return *merge_tails(stored.tail, stored.event_count, fresh, model.config.tail_len, names), bad


def merge_tails(
    stored: Tail, event_count: Int, fresh: Tail, tail_len: int, names: Integers | None = None
) -> tuple[Tail, Bools]:
    """The union of two packed tails of the same users, oldest first, limited to the newest `tail_len` events, and which
    of these are fresh, bool [N].

    Callers may send events that the record covers, or send events twice: a fresh event counts once, and not at all if
    the record covers it. That is so if the stored tail holds it (same time, item and action). The tail does not show
    covered events before its own. If there are some, all fresh events at the time of the tail's oldest event, or
    earlier, are taken for covered: of a basket with one time and more items than the tail, it holds only a part.
    Events with equal times keep their order, stored ones first. The features of an event are not part of its identity:
    those of the event that is kept count.

    Args:
        stored, fresh: with items as model rows, and features with the model's codes. The result has those of `fresh`.
        event_count: int64 [B] events that the records cover.
        tail_len: events to keep per user.
        names: [N] numbers that tell the fresh events' items apart, including unknown items, which share a row; None if
            the rows do.
    """
    num_users = len(stored.offsets) - 1
    user = np.concatenate([np.repeat(np.arange(num_users), np.diff(t.offsets)) for t in (stored, fresh)])
    item = np.concatenate([stored.items, fresh.items])
    time = np.concatenate([stored.times, fresh.times])
    action = np.concatenate([stored.actions, fresh.actions])
    place = np.arange(len(user))
    is_fresh = place >= len(stored.items)
    name = np.concatenate([np.full(len(stored.items), -1), fresh.items if names is None else names])
    double = is_fresh & _repeats(user, time, action, item, is_fresh)  # of a stored event
    double |= is_fresh & _repeats(user, time, action, np.where(is_fresh, name, -1 - place), place)  # of a fresh one
    double |= is_fresh & _may_precede(stored, event_count, user, time)
    order = np.lexsort((place, time, user))
    order = order[~double[order]]
    counts = np.bincount(user[order], minlength=num_users)
    ends = np.cumsum(counts)
    from_end = np.repeat(ends, counts) - np.arange(len(order))
    order = order[from_end <= tail_len]
    offsets = offsets_of(np.minimum(counts, tail_len))
    features = {name: np.concatenate([stored.features[name], fresh.features[name]])[order] for name in fresh.features}
    return Tail(item[order], time[order], action[order], offsets, features), is_fresh[order]


def _model_features(model: VistaModel, tail: Tail) -> Mapping[str, RowColumn]:
    """Features of a caller's events, with the model's codes, in the columns that stage 2 reads.

    Callers may also name the columns that only stage 1 reads.

    Raises:
        ValueError: a column is unknown to the model, or has other values than its kind.
    """
    if model.event_features is None:
        for name in tail.features:
            raise ValueError(f"tail.features: {shown(name)} is not a feature that this model reads; it reads none")
        return {}
    try:
        parsed = model.event_features.parse(tail.features, len(tail.items)).columns
    except ValueError as error:
        raise ValueError(f"tail.features: {error}") from None
    return {name: parsed[name] for name in model.schema.tail_sizes}


def _may_precede(stored: Tail, event_count: Int, user: Integers, time: Integers) -> Bools:
    """Which events may be covered ones that the stored tails have no room for, bool [N]."""
    lengths = np.diff(stored.offsets)
    is_cut = (lengths > 0) & (event_count > lengths)
    oldest = np.zeros(len(lengths), np.int64)
    oldest[is_cut] = stored.times[stored.offsets[:-1][is_cut]]
    found: Bools = is_cut[user] & (time <= oldest[user])
    return found


def _repeats(user: Integers, time: Integers, action: Integers, item: Integers, order: Integers) -> Bools:
    """Which events repeat an event of the same user, time, action and item with a smaller `order`, bool [N]."""
    index = np.lexsort((order, action, item, time, user))
    same = np.zeros(len(user), np.bool_)
    if len(user) > 1:
        a, b = index[:-1], index[1:]
        same[1:] = (user[a] == user[b]) & (time[a] == time[b]) & (item[a] == item[b]) & (action[a] == action[b])
    start = np.maximum.accumulate(np.where(same, 0, np.arange(len(user))))
    repeats = np.zeros(len(user), np.bool_)
    repeats[index] = order[index] > order[index[start]]
    return repeats
