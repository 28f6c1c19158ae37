"""Reads what a request needs: users' records, and the times and tails that the caller passes. B users."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config.choices import OnMissing
from vista.errors import RecordError, UnknownUserError
from vista.log.histories import RowFeatures
from vista.model.inference import pad_tail
from vista.scorer.request import Request
from vista.scorer.request_arguments import ids_of, impossible_times, not_a_time, request_times
from vista.scorer.request_counters import RequestCounters
from vista.scorer.scorer_stats import StatsRecorder
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.tail_merging import with_fresh_events
from vista.store.stored_batch import StoredBatch
from vista.store.tail import Tail

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
