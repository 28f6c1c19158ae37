"""Groups of users that an incremental refresh updates at once: one class for each `UpdateOutcome`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.arrays import Int
from vista.store.format.state_record import StateArrays


@dataclass(frozen=True, slots=True)
class RereadGroup:
    """Users whose states cover the log already, so only their summaries are read again."""

    users: Int
    """[N] rows of the log."""
    states: StateArrays
    """The states of the N users."""


@dataclass(frozen=True, slots=True)
class AppendGroup:
    """Users whose states receive the terms of the new events."""

    users: Int
    """[N] rows of the log."""
    states: StateArrays
    """The states of the N users."""
    segment: int
    """Newest segment of the log that the states cover."""


@dataclass(frozen=True, slots=True)
class ExchangeGroup:
    """One user with late or deleted events, whose terms are exchanged in the state."""

    users: Int
    """[1] row of the log."""
    states: StateArrays
    """The state of this user (N = 1)."""
    segment: int
    """Newest segment of the log that the state covers."""


@dataclass(frozen=True, slots=True)
class RecomputeGroup:
    """Users without a state that can be updated, whose summaries are computed from the log."""

    users: Int
    """[N] rows of the log."""


UpdateGroup = RereadGroup | AppendGroup | ExchangeGroup | RecomputeGroup
