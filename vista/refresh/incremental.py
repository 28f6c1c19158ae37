"""Incremental refresh: update the published generation in place, in time proportional to the new events.

    changed users -> groups by outcome -> updated states -> summaries -> records -> one durable transaction per batch

A user's state receives the terms of the events that arrived since the state's `applied_segment`. Terms of events that
came late or were deleted are exchanged. The summary is then read from the state again. Users whose state cannot be
updated are recomputed from the log.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Precision
from vista.config.refresh_options import INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH, RefreshOptions
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.model import inference
from vista.model.history_states import default_slice_len, history_states, long_range_state, range_states, reach
from vista.model.state_updates import forget_events, insert_events
from vista.model.summary_state import SummaryState, merge
from vista.model.vista_model import VistaModel
from vista.refresh.changes import changed_positions
from vista.refresh.log_items import LogItems, check_log
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.refresh_report import RefreshReport
from vista.refresh.states import from_arrays, read_summaries, to_arrays
from vista.refresh.update_plan import UpdateGroup, UpdateOutcome, UpdatePlan
from vista.refresh.user_records import UserSummaries, encode_users, last_times, stored_tail
from vista.store.format.keys import user_id, user_keys
from vista.store.format.state_record import StateArrays, rounded
from vista.store.manifest import Manifest
from vista.store.shards import Shard, shard_to_write
from vista.store.update import StoreUpdate

COUNTED_AS = {
    UpdateOutcome.append: "appended",
    UpdateOutcome.exchange: "exchanged",
    UpdateOutcome.recompute: "recomputed",
    UpdateOutcome.reread: "appended",
}
"""Under which name of `RefreshReport.counts` an outcome is counted."""


def refresh_incremental(
    model: VistaModel,
    log: EventLog,
    store: str | Path,
    *,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
) -> RefreshReport:
    """Update the published generation for users with new or deleted events.

    The result equals that of a full refresh, within float32 rounding where states are float32. Users without changes
    keep the bytes of their records. Call it again to resume an interrupted run: states and records say what they cover.

    Args:
        model: the one whose full refresh made the store; it is left in eval mode.
        log: the same log, with new segments.
        store: the store's folder.
        options: tokens_per_batch, users_per_batch, verify_log, and progress; the full refresh set the others for good.
        shard: refresh only this shard, in the folder `<store>/part-i-of-n`.
        key: 32 bytes, if the store's records are authenticated.
        created_at: start of the run in ms, which records state; by default now.

    Raises:
        ConfigError: the model cannot read this log; the store was refreshed with `until`; the store is sharded and no
            shard is named; or `options` holds what only a full refresh sets.
        LogFormatError: a file of the log with new events, ids or deletions is damaged.
        StoreError: nothing is published there; the store is of another summarizer, or covers a longer log; or it cannot
            be written.
    """
    options = options or RefreshOptions()
    options.require_only(INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH)
    check_log(model, log)
    model.eval()
    store, shard = shard_to_write(store, shard)
    now = time.time_ns() // 1_000_000 if created_at is None else created_at
    with StoreUpdate.open(
        store, summarizer_id=model.summarizer_id(), applied_segment=log.last_segment, created_at=now, key=key
    ) as update:
        check_updatable(update.manifest, store)
        _check_same_log(update.manifest, log, store)
        if options.verify_log:
            log.verify(newer_than=update.manifest.applied_segment)
        update.begin(log.sources_digest(log.last_segment))
        users, num_removed = _changed_users(update, log, shard)
        run = RefreshProgress(store, "incremental", len(users), 0, progress=options.progress)
        run.counts["removed"] += num_removed
        refresher = _BatchRefresher(model, log, update, options.tokens_per_batch, run)
        for begin in range(0, len(users), options.users_per_batch):
            refresher.refresh(users[begin : begin + options.users_per_batch])
        with run.stage("publish"):
            update.finish()
        return run.report(update.manifest.generation)


def check_updatable(manifest: Manifest, store: str | Path) -> None:
    """Raise ConfigError for a store that covers only a part of its log, because it was refreshed with `until`."""
    if manifest.until not in (None, "all"):
        raise ConfigError(
            f"{store}: was refreshed with until={manifest.until} and cannot be updated; run a full refresh instead"
        )


def _check_same_log(manifest: Manifest, log: EventLog, store: str | Path) -> None:
    for segment, digest in (
        (manifest.applied_segment, manifest.log_digest),
        (manifest.going_to, manifest.going_to_digest),  # of a run that was interrupted
    ):
        if segment > log.last_segment:
            raise StoreError(
                f"{store}: covers segment {segment}, but {log.path} ends at segment {log.last_segment}; restore the "
                "log, or run a full refresh"
            )
        if digest and log.has_boundary(segment) and log.sources_digest(segment) != digest:
            raise StoreError(
                f"{store}: covers segment {segment}, but that segment of {log.path} was made from other sources; "
                "restore the log, or run a full refresh"
            )


def _changed_users(update: StoreUpdate, log: EventLog, shard: Shard | None) -> tuple[Int, int]:
    """Rows of the users to refresh, and how many users were removed because the log no longer has their ids."""
    changed = log.changed_users(update.manifest.applied_segment)
    has_id = log.users.has_ids(changed)  # A compaction blanks the ids of erased users.
    num_removed = 0 if has_id.all() else _remove_unknown_users(update, log)
    changed = changed[has_id]
    if shard is not None:
        changed = changed[shard.holds(user_keys(log.users.ids(changed)))]
    return changed, num_removed


def _remove_unknown_users(update: StoreUpdate, log: EventLog) -> int:
    count = 0
    for keys in update.key_batches():
        known = log.users.rows([user_id(key) for key in keys]) >= 0
        count += update.remove([key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known])
    return count


@dataclass(frozen=True, slots=True)
class _UpdatedGroup:
    """Users of a group after their handler: new states, or new summaries if the generation keeps no states."""

    outcome: UpdateOutcome
    users: Int
    """[N] rows of the log."""
    history_digest: NDArray[np.uint64]
    """[N]."""
    num_events: int
    """Events that were summarized."""
    state: SummaryState | None = None
    summary: NDArray[np.float32] | None = None


class _BatchRefresher:
    """Takes one batch of users at a time from the log into the store."""

    def __init__(
        self, model: VistaModel, log: EventLog, update: StoreUpdate, tokens_per_batch: int, run: RefreshProgress
    ) -> None:
        self._log, self._update, self._run = log, update, run
        self._model = model.with_frozen("summarizer", Precision.float32)
        self._items = LogItems.of(model, log)
        self._plan = UpdatePlan(model, log, update, tokens_per_batch, run)
        self._handlers = {
            UpdateOutcome.reread: self._reread,
            UpdateOutcome.append: self._append,
            UpdateOutcome.exchange: self._exchange,
            UpdateOutcome.recompute: self._recompute,
        }

    def refresh(self, users: Int) -> None:
        """Bring users (rows of the log) up to date, durably."""
        num_users, num_events = len(users), 0
        users = self._remove_gone(users)
        users = self._skip_current(users)
        if len(users):
            updated = [self._handlers[group.outcome](group) for group in self._plan.groups(users)]
            for group in updated:
                self._run.counts[COUNTED_AS[group.outcome]] += len(group.users)
                num_events += group.num_events
            self._write(self._summarize(updated))
        self._run.batch(self._update.manifest.generation, num_users, num_events)

    def _keys(self, users: Int) -> list[bytes]:
        return user_keys(self._log.users.ids(users))

    def _remove_gone(self, users: Int) -> Int:
        """Remove erased users, and those without events, from the store; the users that remain."""
        keys = self._keys(users)
        erased = self._update.erased(keys)
        self._run.counts["erased"] += int(erased.sum())
        # An erased user may still have a record, if the erasure was interrupted.
        gone = (self._log.lengths[users] == 0) | erased
        if gone.any():
            with self._run.stage("write"):
                self._run.counts["removed"] += self._update.remove([keys[row] for row in np.flatnonzero(gone).tolist()])
        return np.compress(~gone, users)

    def _skip_current(self, users: Int) -> Int:
        """Users whose records do not cover the log yet."""
        with self._run.stage("read"):
            covered = self._update.applied_segments(self._keys(users))
        behind = covered < self._update.applied_segment
        self._run.counts["unchanged"] += int((~behind).sum())
        return np.compress(behind, users)

    def _reread(self, group: UpdateGroup) -> _UpdatedGroup:
        assert group.states is not None
        state = from_arrays(group.states, self._model.device)
        return _UpdatedGroup(group.outcome, group.users, group.states.history_digest, 0, state)

    def _append(self, group: UpdateGroup) -> _UpdatedGroup:
        assert group.states is not None and self._model.summarizer is not None
        old = self._plan.lengths_at(group.users, group.segment)
        context = np.minimum(reach(self._model), old)
        with self._run.stage("read"):
            history = self._log.gather_ranges(group.users, old - context, self._log.lengths[group.users])
            new = history.select(context, history.lengths)
            digest = group.states.history_digest + self._items.digests(new)
        with self._run.stage("summarize"):
            history, start = self._items.model_rows(history), old - context
            if history.num_events > default_slice_len(self._model) and len(group.users) == 1:
                terms = long_range_state(self._model, history, int(context[0]), int(start[0]))
            else:
                terms = range_states(self._model, history, context, start)
            state = merge(from_arrays(group.states, self._model.device), terms, self._model.summarizer.decay_rate)
        return _UpdatedGroup(group.outcome, group.users, digest, new.num_events, state)

    def _exchange(self, group: UpdateGroup) -> _UpdatedGroup:
        """Of one user; recomputed where so many events changed that this is cheaper."""
        assert group.states is not None
        user = int(group.users[0])
        with self._run.stage("read"):
            old, new = self._plan.log_at(group.segment).slice(user), self._log.slice(user)
            digest = self._items.digests(new)
            changed = changed_positions(old, new)
        if changed is None or sum(map(len, changed)) * 2 * (1 + reach(self._model)) >= new.num_events:
            return self._recompute(UpdateGroup(UpdateOutcome.recompute, group.users))
        deleted, late = changed
        old, new = self._items.model_rows(old), self._items.model_rows(new)
        with self._run.stage("summarize"):
            state = from_arrays(group.states, self._model.device)
            if len(deleted):
                state = forget_events(self._model, state, old, deleted)
            if len(late):
                state = insert_events(self._model, state, new, late)
        return _UpdatedGroup(group.outcome, group.users, digest, len(deleted) + len(late), state)

    def _recompute(self, group: UpdateGroup) -> _UpdatedGroup:
        with self._run.stage("read"):
            histories = self._log.gather(group.users)
            model_rows, digest = self._items.model_rows(histories), self._items.digests(histories)
        state, summary = None, None
        with self._run.stage("summarize"):
            if self._update.state_spec is None:
                summary = inference.summarize(self._model, model_rows).cpu().numpy()
            else:
                state = history_states(self._model, model_rows)
        return _UpdatedGroup(group.outcome, group.users, digest, histories.num_events, state, summary)

    def _summarize(self, updated: Sequence[_UpdatedGroup]) -> UserSummaries:
        users = np.concatenate([group.users for group in updated])
        digest = np.concatenate([group.history_digest for group in updated])
        lengths, tail_len, spec = self._log.lengths[users], self._model.config.tail_len, self._update.state_spec
        with self._run.stage("read"):
            newest = self._items.model_rows(self._log.gather_ranges(users, lengths - tail_len, lengths))
        with self._run.stage("encode"):
            if spec is None:
                states = None
                summary = np.concatenate([group.summary for group in updated if group.summary is not None])
            else:
                target = self._update.applied_segment
                arrays = [to_arrays(group.state, target, group.history_digest) for group in updated if group.state]
                # Rounded as stored: a resumed run, which rereads these states, then reads the same summaries.
                states = rounded(_concatenate(arrays), spec)
                summary = read_summaries(self._model, from_arrays(states, self._model.device))
            tail = stored_tail(newest, tail_len)
            return UserSummaries(self._keys(users), summary, tail, last_times(newest), lengths, digest, states)

    def _write(self, users: UserSummaries) -> None:
        with self._run.stage("encode"):
            encoded = encode_users(users, self._update, self._run)
        self._run.check_failures()
        with self._run.stage("write"):
            self._update.put_batch(encoded.keys, encoded.records, encoded.states)
            # Without a state, a user who failed is recomputed from the log at the next event.
            self._update.remove_states(sorted(set(users.keys) - set(encoded.keys)))


def _concatenate(parts: Sequence[StateArrays]) -> StateArrays:
    names = StateArrays.__slots__
    return StateArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
