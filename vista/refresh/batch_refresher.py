"""The work of an incremental refresh: bring one batch of users at a time from the log into the store.

users -> groups by outcome -> updated states -> summaries -> records -> one durable transaction
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Precision
from vista.counters.counter_table import CounterTable
from vista.log.event_log import EventLog
from vista.log.histories import RowFeatures
from vista.log.merged_features import UserFeatureParts
from vista.model import inference
from vista.model.history_states import (
    covered_events,
    covered_lengths,
    default_slice_len,
    insert_events,
    long_range_state,
    range_states,
    reach,
    remove_events,
    separable_summarizer,
)
from vista.model.summarizer import SummaryState, merge_states
from vista.model.vista_model import VistaModel
from vista.refresh.changes import changed_positions
from vista.refresh.counting import Tables, append_events, count_histories, stored_codes
from vista.refresh.log_items import LogItems
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.states import from_arrays, read_summaries, state_of, state_without_summary, to_arrays
from vista.refresh.update_groups import AppendGroup, ExchangeGroup, RecomputeGroup, RereadGroup, UpdateGroup
from vista.refresh.update_plan import UpdatePlan
from vista.refresh.user_records import encode_users, last_times, stored_tail
from vista.store.format.keys import user_keys
from vista.store.format.state_record import StateArrays, rounded
from vista.store.update import StoreUpdate
from vista.store.user_summaries import UserSummaries


@dataclass(frozen=True, slots=True)
class _UpdatedGroup:
    """Users of a group after their handler: new states, or new summaries if the generation keeps no states."""

    counted_as: str
    """The name under which `RefreshReport.counts` counts the users."""
    users: Int
    """[N] rows of the log."""
    history_digest: NDArray[np.uint64]
    """[N] digests of the whole histories."""
    num_events: int
    """Events that were summarized."""
    counters: Tables
    """Of the N users."""
    state: SummaryState | None = None
    summary: NDArray[np.float32] | None = None


class BatchRefresher:
    """Takes one batch of users at a time from the log into the store."""

    def __init__(
        self, model: VistaModel, log: EventLog, update: StoreUpdate, tokens_per_batch: int, run: RefreshProgress
    ) -> None:
        self._log, self._update, self._run = log, update, run
        self._model = model.with_frozen("summarizer", Precision.float32)
        self._items, self._features = LogItems.of(model, log), _user_features(model, log)
        self._plan = UpdatePlan(model, log, update, tokens_per_batch, run)

    def refresh(self, users: Int) -> None:
        """Bring users (rows of the log) up to date, durably."""
        num_users, num_events = len(users), 0
        users = self._remove_gone(users)
        users = self._skip_current(users)
        if len(users):
            updated = [self._update_group(group) for group in self._plan.groups(users)]
            for group in updated:
                self._run.counts[group.counted_as] += len(group.users)
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
        """Those of the users whose records do not cover the log yet."""
        with self._run.stage("read"):
            covered = self._update.applied_segments(self._keys(users))
        behind = covered < self._update.applied_segment
        self._run.counts["unchanged"] += int((~behind).sum())
        return np.compress(behind, users)

    def _update_group(self, group: UpdateGroup) -> _UpdatedGroup:
        match group:
            case RereadGroup():
                return self._reread(group)
            case AppendGroup():
                return self._append(group)
            case ExchangeGroup():
                return self._exchange(group)
            case RecomputeGroup():
                return self._recompute(group)

    def _reread(self, group: RereadGroup) -> _UpdatedGroup:
        state = from_arrays(group.states, self._model.device)
        return _UpdatedGroup("appended", group.users, group.states.history_digest, 0, group.states.counters, state)

    def _append(self, group: AppendGroup) -> _UpdatedGroup:
        old = self._plan.lengths_at(group.users, group.segment)
        covered = covered_lengths(self._model, old)
        context = np.minimum(reach(self._model), covered)
        start = covered - context
        with self._run.stage("read"):
            history = self._log.gather_ranges(group.users, start, self._log.lengths[group.users])
            new = history.select(old - start, history.lengths)
            digest = group.states.history_digest + self._items.digests(new)
            # The state receives the events that leave the tail, if summaries do not cover the tail.
            history, new = self._items.model_rows(covered_events(self._model, history)), self._items.model_rows(new)
        with self._run.stage("summarize"):
            counters = append_events(self._model.item_keys, group.states.counters, new)
            if self._model.summarizer is None:
                state = state_without_summary(old + new.lengths)
                return _UpdatedGroup("appended", group.users, digest, new.num_events, counters, state)
            if history.num_events > default_slice_len(self._model) and len(group.users) == 1:
                terms = long_range_state(self._model, history, int(context[0]), int(start[0]))
            else:
                terms = range_states(self._model, history, context, start)
            decay_rate = separable_summarizer(self._model).decay_rate
            state = merge_states(from_arrays(group.states, self._model.device), terms, decay_rate)
        return _UpdatedGroup("appended", group.users, digest, new.num_events, counters, state)

    def _exchange(self, group: ExchangeGroup) -> _UpdatedGroup:
        """The state is recomputed instead if so many events changed that this is cheaper."""
        user = int(group.users[0])
        with self._run.stage("read"):
            old, new = self._plan.log_at(group.segment).slice(user), self._log.slice(user)
            digest, whole = self._items.digests(new), self._items.model_rows(new)
            old, new = covered_events(self._model, self._items.model_rows(old)), covered_events(self._model, whole)
            changed = changed_positions(old, new)
        if changed is None or sum(map(len, changed)) * 2 * (1 + reach(self._model)) >= new.num_events:
            return self._recompute(RecomputeGroup(group.users))
        deleted, late = changed
        with self._run.stage("summarize"):
            counters = count_histories(self._model.item_keys, whole)
            state = from_arrays(group.states, self._model.device)
            if len(deleted):
                state = remove_events(self._model, state, old, deleted)
            if len(late):
                state = insert_events(self._model, state, new, late)
        return _UpdatedGroup("exchanged", group.users, digest, len(deleted) + len(late), counters, state)

    def _recompute(self, group: RecomputeGroup) -> _UpdatedGroup:
        with self._run.stage("read"):
            histories = self._log.gather(group.users)
            model_rows, digest = self._items.model_rows(histories), self._items.digests(histories)
        state, summary = None, None
        with self._run.stage("summarize"):
            counters = count_histories(self._model.item_keys, model_rows)
            if self._update.state_spec is None:
                summary = inference.summarize(self._model, model_rows).cpu().numpy()
            else:
                state = state_of(self._model, model_rows)
        return _UpdatedGroup("recomputed", group.users, digest, histories.num_events, counters, state, summary)

    def _summarize(self, updated: Sequence[_UpdatedGroup]) -> UserSummaries:
        users = np.concatenate([group.users for group in updated])
        digest = np.concatenate([group.history_digest for group in updated])
        lengths, tail_len, spec = self._log.lengths[users], self._model.config.tail_len, self._update.state_spec
        with self._run.stage("read"):
            newest = self._items.model_rows(self._log.gather_ranges(users, lengths - tail_len, lengths))
        with self._run.stage("encode"):
            tables = tuple(map(CounterTable.concatenated, zip(*(group.counters for group in updated), strict=True)))
            if spec is None:
                states = None
                summary = np.concatenate([group.summary for group in updated if group.summary is not None])
            else:
                target = self._update.applied_segment
                arrays = [
                    to_arrays(group.state, target, group.history_digest, group.counters)
                    for group in updated
                    if group.state is not None
                ]
                # Rounded as stored: a resumed run, which rereads these states, then reads the same summaries.
                states = rounded(StateArrays.concatenated(arrays), spec)
                summary = read_summaries(self._model, from_arrays(states, self._model.device))
            return UserSummaries(
                keys=self._keys(users),
                summary=summary,
                tail=stored_tail(self._model, newest),
                event_count=lengths,
                last_event_ts=last_times(newest),
                history_digest=digest,
                counters=stored_codes(tables),
                features=self._features(users).columns,
                states=states,
            )

    def _write(self, users: UserSummaries) -> None:
        with self._run.stage("encode"):
            encoded = encode_users(users, self._update.spec, self._update.state_spec)
        self._run.encoded(encoded)
        with self._run.stage("write"):
            self._update.put_batch(encoded.keys, encoded.records, encoded.states)
            # Without a state, a user who failed is recomputed from the log at the next event.
            self._update.remove_states(sorted(set(users.keys) - set(encoded.keys)))


def _user_features(model: VistaModel, log: EventLog) -> Callable[[Int], RowFeatures]:
    """Features of users (rows of the log) with the model's codes, read on demand: few users may have changed."""
    reader = model.user_features
    if reader is None:
        return lambda users: RowFeatures({})
    parts = UserFeatureParts.of(log.segments)
    recode = reader.recoder(parts.values)
    return lambda users: recode(parts.rows(users), len(users))
