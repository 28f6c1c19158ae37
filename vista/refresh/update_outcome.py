"""The ways in which an incremental refresh brings users up to date."""

from __future__ import annotations

from enum import IntEnum


class UpdateOutcome(IntEnum):
    """How users are brought up to date; an integer, so that an array can hold the outcomes of many users."""

    reread = 0
    """The state covers the log already (an interrupted run wrote it), so only the summary is read from it again."""
    append = 1
    """The terms of the new events are added to the state."""
    exchange = 2
    """Events came late or were deleted: terms of the state are replaced."""
    recompute = 3
    """There is no state that can be updated, so the summary is computed from the log."""
