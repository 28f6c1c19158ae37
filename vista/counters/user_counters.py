"""Counters of users as of requests: what models read. Letters: B users, F values per key (`CounterSpec`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes, encode_event_counts


@dataclass(frozen=True, slots=True)
class UserCounters:
    """Counters of B users, each as of a request."""

    codes: CounterCodes
    """Of the items, advanced to the requests."""
    num_events: Int
    """int64 [B] events that they cover: those of the record, and the newer ones that were added."""

    def of_pairs(self, user: Int, key: Int) -> NDArray[np.uint8]:
        """The codes that labeled tasks read for n pairs of user (0 .. B - 1) and item: uint8 [n, F + 1].

        F codes of the item's counters and one of the user's number of events; all are 0 for items that are not counted.
        """
        return self._with_event_counts(self.codes.lookup(user, key), user)

    def _with_event_counts(self, codes: NDArray[np.uint8], user: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, F] of items, with the codes of the numbers of events of users int64 [n]: uint8 [n, F + 1]."""
        num_events = np.where(codes[:, 0] > 0, encode_event_counts(self.num_events)[user], np.uint8(0))
        return np.column_stack([codes, num_events])
