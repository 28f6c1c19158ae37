"""Incremental refresh: users with new events, into the served generation, in time that follows the new events.

A user's state takes the terms of what came since its own `applied_segment`: appended in time order, or exchanged where
events came late or were deleted. The summary is reread from the state. Whatever cannot go on from a state is
recomputed from the log, and counted as such.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config.choices import Decay, Precision
from vista.errors import ConfigError, StoreError
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.model import inference
from vista.model.history_states import default_slice_len, history_states, long_range_state, range_states, reach
from vista.model.state_updates import forget_events, insert_events
from vista.model.summary_state import SummaryState, merge
from vista.model.vista_model import VistaModel
from vista.refresh.changes import changed_positions
from vista.refresh.encode import LogItems, check_log, encode_users, from_arrays, read_summaries, to_arrays
from vista.refresh.refresh_report import RefreshProgress, RefreshReport
from vista.store.format.keys import user_id, user_keys
from vista.store.format.state_record import StateArrays, rounded
from vista.store.layout import Manifest
from vista.store.shards import Shard, shard_to_write
from vista.store.updates import StoreUpdate

Int = NDArray[np.int64]
APPEND, EXCHANGE, RECOMPUTE, REREAD = range(4)
OUTCOMES = {APPEND: "appended", EXCHANGE: "exchanged", RECOMPUTE: "recomputed", REREAD: "appended"}


def refresh_incremental(
    model: VistaModel,
    log: EventLog,
    store: str | Path,
    *,
    tokens_per_batch: int = 65_536,
    users_per_batch: int = 512,
    shard: Shard | None = None,
    progress: bool = False,
    created_at: int | None = None,
    key: bytes | None = None,
) -> RefreshReport:
    """Bring the served generation up to the log: users with events or deletions that it has not seen.

    Equals a full refresh within float32 rounding where states are float32. A run that was killed goes on: what a
    user's state and record have seen is in them. Users without changes keep the bytes of their records.

    Args:
        model: whose full refresh made the store; it is left in eval mode.
        log: the same log, grown.
        store: its folder.
        tokens_per_batch: events summarized at once (a longer history makes a batch of its own).
        users_per_batch: users of one durable transaction.
        shard: the part of the store to refresh, `<store>/part-i-of-n`.
        progress: show a progress bar.
        created_at: ms, the start of the run that records state; by default now.
        key: 32 bytes, where the store's records are authenticated.

    Raises:
        ConfigError: the model cannot read this log, the store was refreshed with `until`, or it is divided and no shard
            named.
        StoreError: nothing is published there, it is of another summarizer or a longer log, or cannot be written.
    """
    check_log(model, log)
    model.eval()
    store, shard = shard_to_write(store, shard)
    now = time.time_ns() // 1_000_000 if created_at is None else created_at
    with StoreUpdate.open(
        store, summarizer_id=model.summarizer_id(), applied_segment=log.last_segment, created_at=now, key=key
    ) as update:
        manifest = update.manifest
        check_goes_on(manifest, store)
        _check_same_log(manifest, log, store)
        update.begin(log.sources_digest(log.last_segment))
        changed = log.changed_users(manifest.applied_segment)
        named = log.users.has_ids(changed)
        gone = 0 if named.all() else _remove_strangers(update, log)
        changed = changed[named]
        if shard is not None:
            changed = changed[shard.holds(user_keys(log.users.ids(changed)))]
        run = RefreshProgress(store, "incremental", len(changed), 0, progress=progress)
        run.counts["removed"] += gone
        frozen = model.with_frozen("summarizer", Precision.float32)
        work = _Work(frozen, log, LogItems.of(model, log), update, tokens_per_batch, run)
        for begin in range(0, len(changed), users_per_batch):
            batch = changed[begin : begin + users_per_batch]
            work.batch(batch)
        with run.stage("publish"):
            update.finish()
        return run.report(store, manifest.generation)


def check_goes_on(manifest: Manifest, store: str | Path) -> None:
    """Raise ConfigError for a store that has seen a part of its log, by `until`, and is to stay there."""
    if manifest.until not in (None, "all"):
        raise ConfigError(f"{store}: was refreshed until={manifest.until}, so it never goes on; refresh it in full")


def _check_same_log(manifest: Manifest, log: EventLog, store: str | Path) -> None:
    for seen, digest in (
        (manifest.applied_segment, manifest.log_digest),
        (manifest.going_to, manifest.going_to_digest),  # of a run that did not end
    ):
        if seen > log.last_segment:
            raise StoreError(
                f"{store}: has seen segment {seen}, but {log.path} ends at {log.last_segment}; restore the log, or "
                "refresh in full from what there is"
            )
        if digest and log.has_boundary(seen) and log.sources_digest(seen) != digest:
            raise StoreError(
                f"{store}: segment {seen} that it has seen was made of other sources than that of {log.path}; "
                "restore the log, or refresh in full from this one"
            )


def _remove_strangers(update: StoreUpdate, log: EventLog) -> int:
    """Remove users whom the log no longer knows: a compaction has blanked their ids. Returns how many there were."""
    count = 0
    for keys in update.key_batches():
        known = log.users.rows([user_id(key) for key in keys]) >= 0
        count += update.remove([key for key, own in zip(keys, known.tolist(), strict=True) if not own])
    return count


@dataclass(frozen=True, slots=True)
class _Done:
    """States of some users of a batch, if the generation keeps them, else their summaries."""

    rows: Int
    """Places in the batch."""
    state: SummaryState | None
    summary: NDArray[np.float32] | None
    digest: NDArray[np.uint64]


class _Work:
    def __init__(
        self, model: VistaModel, log: EventLog, items: LogItems, update: StoreUpdate, budget: int, run: RefreshProgress
    ) -> None:
        self.model, self.log, self.items, self.update, self.run = model, log, items, update, run
        self.budget = budget
        self.reach = reach(model)
        self.view = lru_cache(maxsize=4)(lambda segment: EventLog.open(log.path, last_segment=segment))
        self.num_events = 0

    def batch(self, users: Int) -> None:
        """Refresh some of the log's users, durably."""
        keys = user_keys(self.log.users.ids(users))
        lengths = self.log.lengths[users]
        self.num_events = 0
        erased = self.update.erased(keys)
        self.run.counts["erased"] += int(erased.sum())
        # Erased users too: their erasure may have been killed half-way.
        gone = np.flatnonzero((lengths == 0) | erased)
        if len(gone):
            with self.run.stage("write"):
                self.run.counts["removed"] += self.update.remove([keys[row] for row in gone.tolist()])
        with self.run.stage("read"):
            applied = self.update.applied_segments(keys)
        current = (applied >= self.update.applied) & (lengths > 0)
        self.run.counts["unchanged"] += int(current.sum())
        rows = np.flatnonzero((lengths > 0) & ~erased & ~current)
        if len(rows):
            self._refresh(users[rows], [keys[row] for row in rows.tolist()], lengths[rows])
        self.run.batch(self.update.manifest.generation, len(users), self.num_events)

    def _refresh(self, users: Int, keys: list[bytes], lengths: Int) -> None:
        spec = self.update.state_spec
        done = list(self._summarized(users, keys, lengths))
        rows = np.concatenate([part.rows for part in done])
        digest = np.concatenate([part.digest for part in done])
        keys, users, lengths = [keys[row] for row in rows.tolist()], users[rows], lengths[rows]
        with self.run.stage("read"):
            tail_len = self.model.config.tail_len
            newest = self.items.model_rows(self.log.gather_ranges(users, lengths - tail_len, lengths))
        with self.run.stage("encode"):
            if spec is None:
                arrays, summary = None, np.concatenate([part.summary for part in done if part.summary is not None])
            else:
                parts = [to_arrays(part.state, self.update.applied, part.digest) for part in done if part.state]
                # As stored, so that a run that is resumed after its states were written reads the same summaries.
                arrays = rounded(_joined(parts), spec)
                summary = read_summaries(self.model, from_arrays(arrays, self.model.device))
            encoded = encode_users(
                keys,
                summary,
                newest,
                lengths,
                digest,
                arrays,
                tail_len=tail_len,
                spec=self.update.spec,
                state_spec=spec,
                run=self.run,
            )
        self.run.check_failures()
        with self.run.stage("write"):
            self.update.put_batch(encoded.keys, encoded.records, encoded.states)
            # Without a state, a user who failed is recomputed from the log at the next event.
            self.update.remove_states(sorted(set(keys) - set(encoded.keys)))

    def _summarized(self, users: Int, keys: list[bytes], lengths: Int) -> Iterator[_Done]:
        """All users of a batch, by how they are brought up to date."""
        stored = self.update.states(keys)
        if stored is None:
            for part in token_groups(lengths, self.budget):
                yield self._recomputed(np.arange(len(users))[part], users)
            return
        places, arrays = stored
        base = np.full(len(users), -1, np.int64)
        # A user without changes has an older segment, but has seen all that the generation has.
        base[places] = np.maximum(arrays.applied_segment, self.update.manifest.applied_segment)
        slot = np.full(len(users), -1, np.int64)
        slot[places] = np.arange(len(places))
        state = from_arrays(arrays, self.model.device)
        kind = np.full(len(users), RECOMPUTE)
        kind[base >= self.update.applied] = REREAD
        for segment in np.unique(base[(base >= 0) & (base < self.update.applied)]).tolist():
            rows = np.flatnonzero(base == segment)
            if self.log.has_boundary(segment):
                kind[rows] = self._kinds(users[rows], segment, arrays.num_events[slot[rows]])
        for what, name in OUTCOMES.items():
            self.run.counts[name] += int((kind == what).sum())

        rows = np.flatnonzero(kind == REREAD)
        if len(rows):
            yield _Done(rows, state[torch.from_numpy(slot[rows])], None, arrays.history_digest[slot[rows]])
        rows = np.flatnonzero(kind == RECOMPUTE)
        for part in token_groups(lengths[rows], self.budget):
            yield self._recomputed(rows[part], users)
        for segment in np.unique(base[kind == APPEND]).tolist():
            rows = np.flatnonzero((kind == APPEND) & (base == segment))
            old = self._old_lengths(users[rows], segment)
            for part in token_groups(lengths[rows] - old + self.reach, self.budget):
                own, at = rows[part], slot[rows[part]]
                yield self._appended(
                    own, users[own], old[part], lengths[own], state[torch.from_numpy(at)], arrays.history_digest[at]
                )
        for row in np.flatnonzero(kind == EXCHANGE).tolist():
            one = state[torch.tensor([slot[row]])]
            yield self._exchanged(row, int(users[row]), int(base[row]), one)

    def _kinds(self, users: Int, segment: int, num_events: Int) -> Int:
        """How users go on from states that have seen the log up to `segment`."""
        with self.run.stage("read"):
            old = self._old_lengths(users, segment)
            new = self.log.new_events(users, segment)
            newest = self.view(segment).gather_ranges(np.where(old > 0, users, 0), old - 1, old)
        in_order = np.ones(len(users), bool)
        both = np.flatnonzero((old > 0) & (new.lengths > 0))
        first = new.timestamp[new.offsets[both]]
        in_order[both] = first >= newest.timestamp[newest.offsets[both]]
        whole = new.lengths == self.log.lengths[users] - old  # else something was deleted
        by_position = self.model.config.decay is Decay.position
        kind = np.where(in_order & whole, APPEND, RECOMPUTE if by_position else EXCHANGE)
        # A state of other events than the log had then: of another log, or of one that was changed by hand.
        kind[num_events != old] = RECOMPUTE
        return kind

    def _old_lengths(self, users: Int, segment: int) -> Int:
        lengths = self.view(segment).lengths
        return np.where(users < len(lengths), lengths[np.minimum(users, len(lengths) - 1)], 0)

    def _recomputed(self, rows: Int, users: Int) -> _Done:
        with self.run.stage("read"):
            histories = self.log.gather(users[rows])
            model_rows, digest = self.items.model_rows(histories), self.items.digests(histories)
        self.num_events += histories.num_events
        with self.run.stage("summarize"):
            if self.update.state_spec is None:
                self.run.counts["recomputed"] += len(rows)
                return _Done(rows, None, inference.summarize(self.model, model_rows).cpu().numpy(), digest)
            return _Done(rows, history_states(self.model, model_rows), None, digest)

    def _appended(
        self, rows: Int, users: Int, old: Int, lengths: Int, state: SummaryState, digest: NDArray[np.uint64]
    ) -> _Done:
        context = np.minimum(self.reach, old)
        with self.run.stage("read"):
            read = self.log.gather_ranges(users, old - context, lengths)
            new = read.select(context, read.lengths)
            digest = digest + self.items.digests(new)
        self.num_events += new.num_events
        with self.run.stage("summarize"):
            model_rows, start = self.items.model_rows(read), old - context
            if read.num_events > default_slice_len(self.model) and len(rows) == 1:
                terms = long_range_state(self.model, model_rows, int(context[0]), int(start[0]))
            else:
                terms = range_states(self.model, model_rows, context, start)
            assert self.model.summarizer is not None
            return _Done(rows, merge(state, terms, self.model.summarizer.decay_rate), None, digest)

    def _exchanged(self, row: int, user: int, segment: int, state: SummaryState) -> _Done:
        with self.run.stage("read"):
            old, new = self.view(segment).slice(user), self.log.slice(user)
            digest = self.items.digests(new)
            changed = changed_positions(old, new)
        rows = np.array([row])
        if changed is None or (sum(map(len, changed)) * 2 * (1 + self.reach) >= new.num_events):
            self.run.counts[OUTCOMES[EXCHANGE]] -= 1
            self.run.counts[OUTCOMES[RECOMPUTE]] += 1
            return replace(self._recomputed(np.array([0]), np.array([user])), rows=rows)
        gone, late = changed
        old, new = self.items.model_rows(old), self.items.model_rows(new)
        self.num_events += len(gone) + len(late)
        with self.run.stage("summarize"):
            if len(gone):
                state = forget_events(self.model, state, old, gone)
            if len(late):
                state = insert_events(self.model, state, new, late)
            return _Done(rows, state, None, digest)


def _joined(parts: list[StateArrays]) -> StateArrays:
    names = StateArrays.__slots__
    return StateArrays(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
