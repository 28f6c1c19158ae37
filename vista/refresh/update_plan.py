"""The plan of an incremental refresh: which users' states can be updated, and how."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Decay
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.model.history_states import covered_lengths, reach
from vista.model.vista_model import VistaModel
from vista.refresh.refresh_progress import RefreshProgress
from vista.refresh.stored_users import StoredUsers
from vista.refresh.update_groups import AppendGroup, ExchangeGroup, RecomputeGroup, RereadGroup, UpdateGroup
from vista.refresh.update_outcome import UpdateOutcome
from vista.store.format.keys import user_keys
from vista.store.update import StoreUpdate


class UpdatePlan:
    """Sorts users into groups by what happened to their histories since their states were written."""

    def __init__(
        self, model: VistaModel, log: EventLog, update: StoreUpdate, tokens_per_batch: int, run: RefreshProgress
    ) -> None:
        self._model, self._log, self._update, self._run = model, log, update, run
        self._tokens_per_batch = tokens_per_batch
        self._context = 0 if model.summarizer is None else reach(model) + model.config.summary_lag
        """Most events before the new ones that an append reads."""
        self._append_only = model.config.decay is Decay.position or model.summarizer is None
        self._older_logs: dict[int, EventLog] = {}
        """The log as it was, by newest segment. Users' states cover few different segments."""

    def log_at(self, segment: int) -> EventLog:
        """The log as it was when `segment` was its newest one."""
        if segment not in self._older_logs:
            self._older_logs[segment] = EventLog.open(self._log.path, last_segment=segment)
        return self._older_logs[segment]

    def lengths_at(self, users: Int, segment: int) -> Int:
        """How many events users had in the log when `segment` was its newest one, int64 [N]."""
        lengths = self.log_at(segment).lengths
        return np.where(users < len(lengths), lengths[np.minimum(users, len(lengths) - 1)], 0)

    def groups(self, users: Int) -> Iterator[UpdateGroup]:
        """Groups that together hold each of the users once.

        Args:
            users: [N] rows of the log, with at least one event each.
        """
        stored = self._stored_users(users)
        if stored is None:
            yield from self._recompute_groups(users)
            return
        reread = stored.where(UpdateOutcome.reread)
        if len(reread):
            yield RereadGroup(reread.users, reread.states)
        updatable = stored.users[stored.outcome != UpdateOutcome.recompute]
        yield from self._recompute_groups(users[~np.isin(users, updatable)])
        for segment, append in stored.where(UpdateOutcome.append).by_segment():
            num_new = self._log.lengths[append.users] - self.lengths_at(append.users, segment)
            for part in token_groups(num_new + self._context, self._tokens_per_batch):
                yield AppendGroup(append.users[part], append.states[part], segment)
        exchange = stored.where(UpdateOutcome.exchange)
        for row, segment in enumerate(exchange.covered.tolist()):
            one = slice(row, row + 1)
            yield ExchangeGroup(exchange.users[one], exchange.states[one], segment)

    def _recompute_groups(self, users: Int) -> Iterator[RecomputeGroup]:
        for part in token_groups(self._log.lengths[users], self._tokens_per_batch):
            yield RecomputeGroup(users[part])

    def _stored_users(self, users: Int) -> StoredUsers | None:
        """Those of the users who have states, with their outcomes; None if the generation keeps no states."""
        found = self._update.states(user_keys(self._log.users.ids(users)))
        if found is None:
            return None
        rows, states = found
        # The state of a user without changes names an older segment, but covers all that the generation covers.
        covered = np.maximum(states.applied_segment, self._update.manifest.applied_segment)
        outcome = np.full(len(rows), UpdateOutcome.recompute, np.int8)
        outcome[covered >= self._update.applied_segment] = UpdateOutcome.reread
        for segment in np.unique(covered[covered < self._update.applied_segment]).tolist():
            behind = np.flatnonzero(covered == segment)
            if self._log.has_boundary(segment):
                outcome[behind] = self._outcomes(users[rows[behind]], segment, states.num_events[behind])
        return StoredUsers(users[rows], states, covered, outcome)

    def _outcomes(self, users: Int, segment: int, num_events: Int) -> NDArray[np.int8]:
        """Outcomes [N] of users whose states cover the log up to `segment` and hold `num_events` [N] events."""
        with self._run.stage("read"):
            old = self.lengths_at(users, segment)
            new = self._log.new_events(users, segment)
            newest = self.log_at(segment).gather_ranges(np.where(old > 0, users, 0), old - 1, old)
        in_order = np.ones(len(users), bool)
        both = np.flatnonzero((old > 0) & (new.lengths > 0))
        first = new.timestamp[new.offsets[both]]
        in_order[both] = first >= newest.timestamp[newest.offsets[both]]
        nothing_deleted = new.lengths == self._log.lengths[users] - old
        outcome = np.full(len(users), UpdateOutcome.recompute if self._append_only else UpdateOutcome.exchange, np.int8)
        outcome[in_order & nothing_deleted] = UpdateOutcome.append
        # The state holds other events than the log had then: of another log, or of one that was edited by hand.
        outcome[num_events != covered_lengths(self._model, old)] = UpdateOutcome.recompute
        return outcome
