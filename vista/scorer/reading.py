"""Reads what a request needs: users' records, and the times and tails that the caller passes. B users."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.choices import OnMissing
from vista.errors import RecordError, UnknownUserError, shown
from vista.log.histories import RowColumn, RowFeatures
from vista.model.inference import pad_tail
from vista.model.vista_model import VistaModel
from vista.scorer.request import (
    MAX_TAIL_EVENTS,
    Request,
    RequestCounters,
    array_of,
    id_array,
    ids_of,
    impossible_times,
    integers,
    item_rows,
    length_of,
    not_a_time,
    request_times,
    require_most,
)
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.store.record import StoredBatch
from vista.store.record_spec import Tail

# Checks the tails that callers pass, and merges them with the stored ones.

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


logger = logging.getLogger(__name__)


def read_request(
    snapshot: ServingSnapshot,
    users: Any,
    tail: Tail | None,
    now: Any,
    on_missing: OnMissing,
    max_age_s: float | None,
    recorder: StatsRecorder,
) -> Request:
    """Read the records of B users, and add what the caller passes; arguments and errors are those of `Scorer`."""
    ids, model = ids_of(users, "users"), snapshot.model
    # Read before the records, so that a reload in between cannot make a record look younger than it is.
    refreshed_at = 0 if max_age_s is None else snapshot.store.manifest.refreshed_at
    stored, damaged = _stored(snapshot, ids, on_missing, recorder)
    bad = damaged
    times = request_times(now, len(bad))
    if times is not None and model.schema.has_time:
        wrong = impossible_times(times, stored.last_event_ts)
        if wrong.any() and on_missing is not OnMissing.nan:
            raise not_a_time("now", times[wrong][0])
        times, bad = np.where(wrong, np.maximum(stored.last_event_ts, 0), times), bad | wrong
    num_found = int(stored.found.sum())
    if max_age_s is not None:
        now_ms, max_age_ms = time.time_ns() // 1_000_000, int(1000 * max_age_s)
        stored = stored.without(stored.expired(now_ms, refreshed_at, max_age_ms))
    unknown = ~stored.found
    num_hits = int(stored.found.sum())
    num_missing = len(unknown) - num_found - int(damaged.sum())
    if on_missing is OnMissing.error and unknown.any():
        recorder.add(hits=num_hits, stale=num_found - num_hits, misses=num_missing)
        absent = np.asarray(ids)[unknown][:5].tolist()
        raise UnknownUserError(
            f"users {absent} have no record in {snapshot.store.path}; refresh the store (which leaves out erased "
            "users), or pass on_missing='empty'"
        )
    merged, is_fresh = stored.tail, np.zeros(len(stored.tail.items), np.bool_)
    if tail is not None:
        refuse = on_missing is not OnMissing.nan
        merged, is_fresh, wrong = with_fresh_events(model, stored, tail, refuse=refuse)
        bad = bad | wrong
    recorder.add(hits=num_hits, stale=num_found - num_hits, misses=num_missing, bad_users=int(bad.sum()))
    padded = pad_tail(model, merged.items, merged.times, merged.actions, merged.offsets, merged.features)
    summary = torch.from_numpy(stored.summary).to(model.device)
    if unknown.any():
        summary[torch.from_numpy(unknown).to(summary.device)] = snapshot.empty
    keys = model.item_keys
    counters = None if keys is None else RequestCounters.of(keys, stored, merged, is_fresh, times)
    reader = model.user_features
    own = None if reader is None else reader.encode(RowFeatures(stored.features), len(unknown))
    return Request(summary, padded, times, unknown | bad, stored.generation, counters, users=own)


def _stored(
    snapshot: ServingSnapshot, ids: Any, on_missing: OnMissing, recorder: StatsRecorder
) -> tuple[StoredBatch, NDArray[np.bool_]]:
    """Records of B users, and which of them are damaged, which are counted.

    Raises:
        RecordError: one is damaged, and on_missing is not "nan".
    """
    try:
        stored = snapshot.store.get_many(ids)
        return stored, np.zeros(len(stored.found), np.bool_)
    except RecordError as error:
        users = list(ids)
        damaged = np.array([_is_damaged(snapshot, user) for user in users])
        recorder.add(damaged=int(damaged.sum()))
        if on_missing is not OnMissing.nan:
            raise
        logger.error("%s", error)
    valid = np.flatnonzero(~damaged)
    return snapshot.store.get_many([users[row] for row in valid.tolist()]).spread(valid, len(users)), damaged


def _is_damaged(snapshot: ServingSnapshot, user: Any) -> bool:
    try:
        snapshot.store.get_many([user])
    except RecordError:
        return True
    return False


def nan_for(missing: NDArray[np.bool_], values: NDArray[np.float32], on_missing: OnMissing) -> NDArray[np.float32]:
    """Values [N] or [N, D], which become NaN where bool [N] is set, if the policy says so."""
    if on_missing is OnMissing.nan:
        values[missing] = np.nan
    return values
