"""Incremental refresh: update the published generation in place, in time proportional to the new events.

Once a day of events has passed, or after deletions, it also counts how popular items are, in one pass over the log
(`log_reading.are_due`).

    changed users -> batches -> updated states -> summaries -> records -> one durable transaction per batch

A user's state receives the terms of the events that arrived since the state's `applied_segment`. Terms of events that
came late or were deleted are exchanged. The summary is then read from the state again. Users whose state cannot be
updated are recomputed from the log.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.checks import Decay, Precision
from vista.config.store_config import INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH, RefreshOptions
from vista.counters.counters import CounterTable
from vista.counters.keys import newest_items
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.log.features import merged_features, row_features, values_of, verified_columns
from vista.log.histories import Histories, RowFeatures, token_groups
from vista.log.segment import features_of
from vista.log.segment_files import EVENTS, USERS, sources_of_events
from vista.log.splits import Until
from vista.model import inference
from vista.model.history_states import appended_states, insert_events, reach, remove_events
from vista.model.summarizer import SummaryState
from vista.model.vista_model import VistaModel
from vista.refresh.full import (
    BatchEncoder,
    HistorySums,
    RefreshProgress,
    RefreshReport,
    UserRecords,
    encode_users,
    from_arrays,
    read_summaries,
    state_of,
    state_without_summary,
    sums_of_histories,
    to_arrays,
    user_columns,
    user_summaries,
)
from vista.refresh.log_reading import are_due, check_log, item_values
from vista.store.item_values import ItemValues
from vista.store.keys import user_id, user_keys
from vista.store.layout import Shard, StoreUrl, shard_to_write, users_by_store
from vista.store.manifest import OF_SEVERAL_LOGS, Manifest, start_of_run
from vista.store.reader import published_manifest
from vista.store.state_record import StateArrays, rounded
from vista.store.writer import StoreUpdate


def refresh_incremental(
    model: VistaModel,
    log: EventLog,
    store: str | Path | StoreUrl,
    *,
    options: RefreshOptions | None = None,
    shard: Shard | None = None,
    key: bytes | None = None,
    created_at: int | None = None,
) -> RefreshReport:
    """Update the published generation for users with new or deleted events.

    The result equals that of a full refresh, within float32 rounding where states are float32. Users without changes
    keep the bytes of their records. Call it again to resume an interrupted run: states and records say what they cover.

    A store that was merged from several logs can be refreshed from one log. The first segments of that log must be
    made from the event sources of the merged logs, in the order of the merge. If one of these logs has deletions or
    events from Kafka, the store needs a full refresh or another merge instead.

    Args:
        model: the one whose full refresh made the store; it is left in eval mode.
        log: the same log, with new segments.
        store: the store's folder or URL.
        options: tokens_per_batch, users_per_batch, and verify_log; the full refresh set the others for good.
        shard: refresh only this shard, in the folder `<store>/part-i-of-n`.
        key: 32 bytes, if the store's records are authenticated.
        created_at: start of the run in ms, which records state; by default now.

    Raises:
        ConfigError: the model cannot read this log; the store was refreshed with `until`; the store is sharded and no
            shard is named; or `options` holds what only a full refresh sets.
        LogFormatError: a file of the log with new events, ids or deletions is damaged.
        StoreError: nothing is published there; the store is of another summarizer, holds other features of users, or
            covers a longer log, or others; or it cannot be written.
    """
    options = options or RefreshOptions()
    options.require_only(INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH)
    check_log(model, log)
    model.eval()
    target, shard = shard_to_write(store, shard)
    with StoreUpdate.open(
        target,
        summarizer_id=model.summarizer_id(),
        applied_segment=log.last_segment,
        created_at=start_of_run(created_at),
        key=key,
    ) as update:
        covered = check_updatable(update.manifest, log, target)
        if list(update.manifest.user_layout()) != user_columns(model):
            raise StoreError(
                f"{target}: its records do not hold the features of users that the model reads, or hold others; run a "
                "full refresh with this model"
            )
        if options.verify_log:
            log.verify(newer_than=covered)
        update.begin(log.sources_digest(log.last_segment))
        users, num_removed = _changed_users(update, log, covered, shard)
        run = RefreshProgress(target, "incremental", len(users), 0)
        run.counts["removed"] += num_removed
        refresher = BatchRefresher(model, log, update, covered, options.tokens_per_batch, run)
        for begin in range(0, len(users), options.users_per_batch):
            refresher.refresh(users[begin : begin + options.users_per_batch])
        with run.stage("read"):
            is_read = shard is None or shard.index == 0  # by readers of a sharded store
            values = (
                _newer_item_values(model, refresher.items.all_rows, log, update, users, covered) if is_read else None
            )
        with run.stage("publish"):
            if values is not None:
                update.writer.put_items(values.to_bytes())
            update.finish()
        return run.report(update.manifest.generation)


def check_updatable(manifest: Manifest, log: EventLog, store: Path | StoreUrl) -> int:
    """The newest segment of a log that all records of a store cover. Raises ConfigError if the store covers only a part
    of its log, because it was refreshed with `until`, and StoreError if it covers another log, or a longer one."""
    if manifest.until not in (None, "all"):
        raise ConfigError(
            f"{store}: was refreshed with until={manifest.until} and cannot be updated; run a full refresh instead"
        )
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
    if manifest.applied_segment != OF_SEVERAL_LOGS:
        return manifest.applied_segment
    if not manifest.log_digest:
        raise StoreError(
            f"{store}: was merged from several logs, of which one has deletions or events from Kafka, so that no log "
            "continues them; refresh the parts incrementally and merge them again, or run a full refresh"
        )
    for segment, digest in digests_of_events([log]):
        if digest == manifest.log_digest:
            return segment
    raise StoreError(
        f"{store}: was merged from several logs, and no segment of {log.path} ends exactly after their event sources; "
        "prepare one log from these sources, in the order of the merge, or run a full refresh"
    )


def digests_of_events(logs: Sequence[EventLog]) -> Iterator[tuple[int, str]]:
    """For each segment of the logs in turn, its number, and a SHA-256 over the event sources of all segments so far.

    The digest is empty once the events differ from those of the sources: after a segment with messages or deletions, or
    one that was compacted without deleted events.
    """
    digest, is_exact = hashlib.sha256(), True
    for manifest in (manifest for log in logs for manifest in log.manifests):
        sources = sources_of_events(manifest)
        digest.update("".join(f"{source['sha256']}\n" for source in sources).encode())
        num_rows = sum(source["rows"] for source in sources)
        is_exact &= not manifest["offsets"] and not manifest["deletions"]
        is_exact &= num_rows == manifest["counts"][EVENTS.table]["rows"]
        yield manifest["last_segment"], digest.hexdigest() if is_exact else ""


def _changed_users(update: StoreUpdate, log: EventLog, covered: int, shard: Shard | None) -> tuple[Int, int]:
    """Rows of the users to refresh, and how many users were removed because the log no longer has their ids."""
    changed = log.changed_users(covered)
    has_id = log.users.has_ids(changed)  # A compaction blanks the ids of erased users.
    num_removed = 0 if has_id.all() else _remove_unknown_users(update, log)
    changed = changed[has_id]
    if shard is not None:
        changed = changed[shard.holds(user_keys(log.users.ids(changed)))]
    return changed, num_removed


def _newer_item_values(
    model: VistaModel, rows: NDArray[np.int32], log: EventLog, update: StoreUpdate, users: Int, covered: int
) -> ItemValues | None:
    """The values of items as of now, if those of the generation are due after changes of some users; None otherwise.
    They are due after any deletion, also of users of other shards: they must not count what was erased."""
    if not model.reads_item_values:
        return None
    if log.may_delete(covered):
        return item_values(model, log, rows, log.lengths, Until())
    if not len(users):
        return None
    held, newest = update.item_values(), None
    if log.has_time and log.lengths[users].any():
        newest = int(np.max(log.gather_ranges(users, log.lengths[users] - 1, log.lengths[users]).timestamp))
    known = held is not None and held.vocabulary == model.items.digest()
    return item_values(model, log, rows, log.lengths, Until()) if are_due(held if known else None, newest) else None


def _remove_unknown_users(update: StoreUpdate, log: EventLog) -> int:
    count = 0
    for keys in update.writer.key_batches():
        known = log.users.rows([user_id(key) for key in keys]) >= 0
        count += update.writer.remove([key for key, is_known in zip(keys, known.tolist(), strict=True) if not is_known])
    return count


def forget(
    model: VistaModel, log: EventLog, store: str | Path, events: Any, *, key: bytes | None = None
) -> RefreshReport:
    """Delete events from a log and subtract their terms from their users' states.

    A state that would lose too much weight is recomputed from the events that remain. No later refresh brings the
    events back.

    Args:
        model: the one whose refresh made the store.
        log: the events' log; it grows by a segment and is reopened.
        store: the store's folder.
        events: a frame, or a mapping of columns: user, item, timestamp (ms, or the ordinal), and optionally action.
        key: 32 bytes, if the store's records are authenticated.

    Raises:
        DataError: an event is not in the log; nothing is deleted.
        ConfigError: the store is sharded, or was refreshed with `until`; nothing is deleted.
        StoreError: nothing is deleted if the store covers another log, or is a shard to which a user does not belong.
            Otherwise, the deletion is in the log, and the next incremental refresh applies it.
    """
    from vista.log.deletions import forget_events  # needs Polars, which refreshes do not
    from vista.log.ingest.source_files import to_polars

    root, _ = shard_to_write(store, None)
    check_updatable(published_manifest(root), EventLog.open(log.path), root)  # refused before the log is written
    users_by_store(store, to_polars(events, ["user"])["user"].to_list())
    forget_events(log.path, events)
    return refresh_incremental(model, EventLog.open(log.path), store, key=key)


Updated = tuple[Int, StateArrays, int]
"""Users (rows of the log), their states of the whole histories, and how many events were summarized for them."""


class BatchRefresher:
    """Takes one batch of users at a time from the log into the store."""

    def __init__(
        self,
        model: VistaModel,
        log: EventLog,
        update: StoreUpdate,
        covered: int,
        tokens_per_batch: int,
        run: RefreshProgress,
    ) -> None:
        self._log, self._update, self._run = log, update, run
        self._covered = covered
        """Newest segment of the log that all records covered before the run."""
        self._tokens_per_batch = tokens_per_batch
        self._encoder = BatchEncoder.of(model, log, Precision.float32, tokens_per_batch, _user_features(model, log))
        self._model, self.items = self._encoder.model, self._encoder.items
        self._context = 0 if model.summarizer is None else reach(model)
        """Most events before the new ones that an append reads."""
        self._append_only = model.stage1.decay is Decay.position or model.summarizer is None
        self._older_logs: dict[int, EventLog] = {}
        """The log as it was, by newest segment. Users' states cover few different segments."""

    def refresh(self, users: Int) -> None:
        """Bring users (rows of the log) up to date, durably."""
        num_users, num_events = len(users), 0
        users = self._skip_current(self._remove_gone(users))
        if len(users):
            encoded = self._encoded(users)
            num_events = encoded.num_events
            self._run.encoded(encoded)
            with self._run.stage("write"):
                self._update.put_batch(encoded.keys, encoded.records, encoded.states)
                # Without a state, a user who failed is recomputed from the log at the next event.
                self._update.writer.remove_states(sorted(set(self._keys(users)) - set(encoded.keys)))
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
                gone_keys = [keys[row] for row in np.flatnonzero(gone).tolist()]
                self._run.counts["removed"] += self._update.writer.remove(gone_keys)
        return np.compress(~gone, users)

    def _skip_current(self, users: Int) -> Int:
        """Those of the users whose records do not cover the log yet."""
        with self._run.stage("read"):
            covered = self._update.applied_segments(self._keys(users))
        behind = covered < self._update.applied_segment
        self._run.counts["unchanged"] += int((~behind).sum())
        return np.compress(behind, users)

    def _encoded(self, users: Int) -> UserRecords:
        """New records and states of users, who have at least one event each."""
        found, lengths = self._update.writer.states(self._keys(users)), self._log.lengths
        spec, state_spec = self._update.spec, self._update.state_spec
        if found is None or state_spec is None:  # The generation keeps no states.
            self._run.counts["recomputed"] += len(users)
            return self._encoder.encode(users, lengths[users], spec, None, self._run)
        updated, all_states, num_events = zip(*self._updated(users, *found), strict=True)
        users = np.concatenate(updated)
        tail_len = self._model.config.tail_len
        with self._run.stage("read"):
            newest = self.items.model_rows(self._log.gather_ranges(users, lengths[users] - tail_len, lengths[users]))
        with self._run.stage("encode"):
            # States that an interrupted run wrote name an older segment. All are rounded as they are stored, so that a
            # run that rereads them later reads the same summaries.
            applied = np.full(len(users), self._update.applied_segment)
            states = rounded(replace(StateArrays.concatenated(all_states), applied_segment=applied), state_spec)
            summary = read_summaries(self._model, from_arrays(states, self._model.device))
            features = self._encoder.features(users).columns
            summaries = user_summaries(
                self._model, self._keys(users), newest, lengths[users], summary, states, features
            )
            return replace(encode_users(summaries, spec, state_spec), num_events=sum(num_events))

    def _updated(self, users: Int, rows: Int, states: StateArrays) -> Iterator[Updated]:
        """Up-to-date states of all users, in parts; those of the users at `rows` were stored, and are `states`."""
        stored = users[rows]
        # The state of a user without changes names an older segment, but covers all that the generation covers.
        covered = np.maximum(states.applied_segment, self._covered)
        masks = self._masks(stored, covered, states.num_events)
        self._run.counts["appended"] += int((masks["reread"] | masks["append"]).sum())
        if masks["reread"].any():
            reread = np.flatnonzero(masks["reread"])
            yield stored[reread], states[reread], 0
        updatable = stored[np.logical_or.reduce([*masks.values()])]
        yield from self._recompute(users[~np.isin(users, updatable)])
        for segment in np.unique(covered[masks["append"]]).tolist():
            append = np.flatnonzero(masks["append"] & (covered == segment))
            num_new = self._log.lengths[stored[append]] - self._lengths_at(stored[append], segment)
            for part in token_groups(num_new + self._context, self._tokens_per_batch):
                yield self._append(stored[append[part]], states[append[part]], segment)
        for row in np.flatnonzero(masks["exchange"]).tolist():
            yield from self._exchange(stored[row : row + 1], states[row : row + 1], int(covered[row]))

    def _masks(self, users: Int, covered: Int, num_events: Int) -> dict[str, NDArray[np.bool_]]:
        """How users are brought up to date, [N] for each outcome; a user in none of the masks is recomputed.

        reread: the state covers the log already (an interrupted run wrote it), so only the summary is read from it.
        append: the terms of the new events are added to the state.
        exchange: events came late or were deleted, so terms of the state are replaced.

        Args:
            users: [N] rows of the log.
            covered: [N] newest segment of the log that each state covers.
            num_events: [N] events in each state.
        """
        append, exchange = np.zeros(len(users), bool), np.zeros(len(users), bool)
        reread = covered >= self._update.applied_segment
        for segment in np.unique(covered[~reread]).tolist():
            if not self._log.has_boundary(segment):
                continue
            behind = np.flatnonzero(covered == segment)
            these = users[behind]
            with self._run.stage("read"):
                old = self._lengths_at(these, segment)
                new = self._log.new_events(these, segment)
                newest = self._log_at(segment).gather_ranges(np.where(old > 0, these, 0), old - 1, old)
            in_order = np.ones(len(these), bool)
            both = np.flatnonzero((old > 0) & (new.lengths > 0))
            in_order[both] = new.timestamp[new.offsets[both]] >= newest.timestamp[newest.offsets[both]]
            nothing_deleted = new.lengths == self._log.lengths[these] - old
            # Otherwise the state holds the events of another log, or of one that was edited by hand.
            of_this_log = num_events[behind] == old
            append[behind] = of_this_log & in_order & nothing_deleted
            exchange[behind] = of_this_log & ~(in_order & nothing_deleted) & (not self._append_only)
        return {"reread": reread, "append": append, "exchange": exchange}

    def _append(self, users: Int, states: StateArrays, segment: int) -> Updated:
        """Add the terms of the events that came after a segment to the states."""
        old = self._lengths_at(users, segment)
        context = np.minimum(reach(self._model), old)
        start = old - context
        with self._run.stage("read"):
            history = self._log.gather_ranges(users, start, self._log.lengths[users])
            new = history.select(old - start, history.lengths)
            digest = states.history_digest + self.items.digests(new)
            newest = self._log.gather_ranges(users, np.maximum(old - 1, 0), old, features=False)
            history, new = self.items.model_rows(history), self.items.model_rows(new)
        with self._run.stage("summarize"):
            last_items = newest_items(self.items.rows[newest.item], newest.offsets)
            sums = _with_new_events(self._model, states, new, last_items)
            if self._model.summarizer is None:
                state = state_without_summary(old + new.lengths)
            else:
                before = from_arrays(states, self._model.device)
                state = appended_states(self._model, before, history, context, start)
        return users, self._to_arrays(state, digest, sums), new.num_events

    def _exchange(self, users: Int, states: StateArrays, segment: int) -> Iterator[Updated]:
        """Exchange the terms of one user's late and deleted events, or recompute the state if that is cheaper."""
        user = int(users[0])
        with self._run.stage("read"):
            old, new = self._log_at(segment).slice(user), self._log.slice(user)
            digest, old, new = self.items.digests(new), self.items.model_rows(old), self.items.model_rows(new)
            changed = changed_positions(old, new)
        if changed is None or sum(map(len, changed)) * 2 * (1 + reach(self._model)) >= new.num_events:
            yield from self._recompute(users)
            return
        deleted, late = changed
        with self._run.stage("summarize"):
            sums = sums_of_histories(self._model, new)
            state = from_arrays(states, self._model.device)
            if len(deleted):
                state = remove_events(self._model, state, old, deleted)
            if len(late):
                state = insert_events(self._model, state, new, late)
        self._run.counts["exchanged"] += 1
        yield users, self._to_arrays(state, digest, sums), len(deleted) + len(late)

    def _recompute(self, users: Int) -> Iterator[Updated]:
        """Compute states from the log."""
        self._run.counts["recomputed"] += len(users)
        for part in token_groups(self._log.lengths[users], self._tokens_per_batch):
            with self._run.stage("read"):
                histories = self._log.gather(users[part])
                model_rows, digest = self.items.model_rows(histories), self.items.digests(histories)
            with self._run.stage("summarize"):
                sums, state = sums_of_histories(self._model, model_rows), state_of(self._model, model_rows)
            yield users[part], self._to_arrays(state, digest, sums), histories.num_events

    def _log_at(self, segment: int) -> EventLog:
        """The log as it was when `segment` was its newest one."""
        if segment not in self._older_logs:
            self._older_logs[segment] = self._log.as_of(segment)
        return self._older_logs[segment]

    def _lengths_at(self, users: Int, segment: int) -> Int:
        """How many events users had in the log when `segment` was its newest one, int64 [N]."""
        lengths = self._log_at(segment).lengths
        return np.where(users < len(lengths), lengths[np.minimum(users, len(lengths) - 1)], 0)

    def _to_arrays(self, state: SummaryState, digest: NDArray[np.uint64], sums: HistorySums) -> StateArrays:
        return to_arrays(state, self._update.applied_segment, digest, sums)


def _with_new_events(model: VistaModel, states: StateArrays, new: Histories, before: Int) -> HistorySums:
    """Sums of states with the events `new` of the same users added, which follow all earlier ones. `before`: int64 [N]
    items of the users' newest earlier events; 0 for none."""
    tables: tuple[CounterTable, ...] = ()
    if (keys := model.item_keys) is not None:
        keys_of_new = keys.of_events(new.item, new.action, new.timestamp, new.offsets, before)
        of_fields = zip(states.counters, keys_of_new, strict=True)
        tables = tuple(table.appended(key, new.timestamp, new.offsets) for table, key in of_fields)
    return HistorySums(tables, states.pooled + inference.pooled_sums(model, new.item, new.action, new.offsets))


def _user_features(model: VistaModel, log: EventLog) -> Callable[[Int], RowFeatures]:
    """Features of users (rows of the log) with the model's codes, read on demand: few users may have changed."""
    reader = model.user_features
    if reader is None:
        return lambda users: RowFeatures({})
    declared = verified_columns(features_of(log.segments, USERS))
    recode = reader.recoder(values_of(declared))
    return lambda users: recode(row_features(merged_features(declared, users))[0], len(users))


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
