"""The users of a batch who have stored states, as a table."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.refresh.update_outcome import UpdateOutcome
from vista.store.format.state_record import StateArrays


@dataclass(frozen=True, slots=True)
class StoredUsers:
    """N users who have stored states, and how each of them is brought up to date."""

    users: Int
    """[N] rows of the log."""
    states: StateArrays
    """The states of the N users."""
    covered: Int
    """[N] newest segment of the log that each state covers."""
    outcome: NDArray[np.int8]
    """[N] values of UpdateOutcome."""

    def __len__(self) -> int:
        return len(self.users)

    def __getitem__(self, rows: slice | Int) -> StoredUsers:
        return StoredUsers(self.users[rows], self.states[rows], self.covered[rows], self.outcome[rows])

    def where(self, outcome: UpdateOutcome) -> StoredUsers:
        """The users with this outcome."""
        return self[np.flatnonzero(self.outcome == outcome)]

    def by_segment(self) -> Iterator[tuple[int, StoredUsers]]:
        """Each segment that states cover, in ascending order, with the users whose states cover it."""
        for segment in np.unique(self.covered).tolist():
            yield segment, self[np.flatnonzero(self.covered == segment)]
