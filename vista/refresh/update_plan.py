"""The plan of an incremental refresh: which users' states can be updated, and how."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Decay
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.model.history_states import reach
from vista.model.vista_model import VistaModel
from vista.refresh.refresh_progress import RefreshProgress
from vista.store.format.keys import user_keys
from vista.store.format.state_record import StateArrays
from vista.store.update import StoreUpdate


class UpdateOutcome(Enum):
    """How users are brought up to date."""

    reread = "reread"
    """The state covers the log already (an interrupted run wrote it), so only the summary is read from it again."""
    append = "append"
    """The terms of the new events are added to the state."""
    exchange = "exchange"
    """Events came late or were deleted: terms of the state are replaced."""
    recompute = "recompute"
    """There is no state that can be updated, so the summary is computed from the log."""


@dataclass(frozen=True, slots=True)
class UpdateGroup:
    """Users of a batch that are updated in the same way and at once."""

    outcome: UpdateOutcome
    users: Int
    """[N] rows of the log."""
    segment: int = 0
    """Newest segment of the log that their states cover; only for `append` and `exchange`."""
    states: StateArrays | None = None
    """The N users' stored states; None for `recompute`."""


class UpdatePlan:
    """Sorts users into groups by what happened to their histories since their states were written."""

    def __init__(
        self, model: VistaModel, log: EventLog, update: StoreUpdate, tokens_per_batch: int, run: RefreshProgress
    ) -> None:
        self._log, self._update, self._run = log, update, run
        self._tokens_per_batch = tokens_per_batch
        self._reach = reach(model)
        self._append_only = model.config.decay is Decay.position
        self.log_at = lru_cache(maxsize=4)(lambda segment: EventLog.open(log.path, last_segment=segment))
        """The log as it was when `segment` was its newest one."""

    def lengths_at(self, users: Int, segment: int) -> Int:
        """How many events users had in the log when `segment` was its newest one, int64 [N]."""
        lengths = self.log_at(segment).lengths
        return np.where(users < len(lengths), lengths[np.minimum(users, len(lengths) - 1)], 0)

    def groups(self, users: Int) -> Iterator[UpdateGroup]:
        """Groups that together hold each of the users once.

        Args:
            users: [N] rows of the log, with at least one event each.
        """
        lengths, target = self._log.lengths[users], self._update.applied_segment
        stored = self._update.states(user_keys(self._log.users.ids(users)))
        if stored is None:  # The generation keeps no states.
            for part in token_groups(lengths, self._tokens_per_batch):
                yield UpdateGroup(UpdateOutcome.recompute, users[part])
            return
        with_state, states = stored
        state_of = np.full(len(users), -1, np.int64)
        state_of[with_state] = np.arange(len(with_state))
        covered = np.full(len(users), -1, np.int64)
        # The state of a user without changes names an older segment, but covers all that the generation covers.
        covered[with_state] = np.maximum(states.applied_segment, self._update.manifest.applied_segment)
        outcome = np.full(len(users), UpdateOutcome.recompute, object)
        outcome[covered >= target] = UpdateOutcome.reread
        for segment in np.unique(covered[(covered >= 0) & (covered < target)]).tolist():
            rows = np.flatnonzero(covered == segment)
            if self._log.has_boundary(segment):
                outcome[rows] = self._outcomes(users[rows], segment, states.num_events[state_of[rows]])

        rows = np.flatnonzero(outcome == UpdateOutcome.reread)
        if len(rows):
            yield UpdateGroup(UpdateOutcome.reread, users[rows], target, states[state_of[rows]])
        rows = np.flatnonzero(outcome == UpdateOutcome.recompute)
        for part in token_groups(lengths[rows], self._tokens_per_batch):
            yield UpdateGroup(UpdateOutcome.recompute, users[rows[part]])
        for segment in np.unique(covered[outcome == UpdateOutcome.append]).tolist():
            rows = np.flatnonzero((outcome == UpdateOutcome.append) & (covered == segment))
            num_read = lengths[rows] - self.lengths_at(users[rows], segment) + self._reach
            for part in token_groups(num_read, self._tokens_per_batch):
                own = rows[part]
                yield UpdateGroup(UpdateOutcome.append, users[own], segment, states[state_of[own]])
        for row in np.flatnonzero(outcome == UpdateOutcome.exchange).tolist():
            one = slice(state_of[row], state_of[row] + 1)
            yield UpdateGroup(UpdateOutcome.exchange, users[row : row + 1], int(covered[row]), states[one])

    def _outcomes(self, users: Int, segment: int, num_events: Int) -> NDArray[np.object_]:
        """Outcomes of users whose states cover the log up to `segment` and hold `num_events` [N] events."""
        with self._run.stage("read"):
            old = self.lengths_at(users, segment)
            new = self._log.new_events(users, segment)
            newest = self.log_at(segment).gather_ranges(np.where(old > 0, users, 0), old - 1, old)
        in_order = np.ones(len(users), bool)
        both = np.flatnonzero((old > 0) & (new.lengths > 0))
        first = new.timestamp[new.offsets[both]]
        in_order[both] = first >= newest.timestamp[newest.offsets[both]]
        nothing_deleted = new.lengths == self._log.lengths[users] - old
        outcome = np.full(len(users), UpdateOutcome.recompute if self._append_only else UpdateOutcome.exchange, object)
        outcome[in_order & nothing_deleted] = UpdateOutcome.append
        # The state holds other events than the log had then: of another log, or of one that was edited by hand.
        outcome[num_events != old] = UpdateOutcome.recompute
        return outcome
