"""Counters of users as of requests: what models read. Letters: B users, G fields, F values per key (`CounterSpec`)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_codes import CounterCodes, encode_event_counts
from vista.counters.item_keys import ItemKeys


@dataclass(frozen=True, slots=True)
class UserCounters:
    """Counters of B users, each as of a request."""

    codes: CounterCodes
    """Of the items, advanced to the requests."""
    num_events: Int
    """int64 [B] events that they cover: those of the record, and the newer ones that were added."""
    categories: tuple[CounterCodes, ...]
    """The same of the G - 1 fields after `item`."""
    keys: ItemKeys

    def of_pairs(self, user: Int, row: Int) -> NDArray[np.uint8]:
        """The codes that labeled tasks read for n pairs of user (0 .. B - 1) and model row: uint8 [n, G * F + 1].

        F codes of the item's counters, F of those of its value of each category, and one of the user's number of
        events. Codes of a field are 0 where its key is not counted, and all are if no key is.
        """
        fields = zip((self.codes, *self.categories), self.keys.of(row), strict=True)
        return self._with_event_counts(np.concatenate([one.lookup(user, key) for one, key in fields], 1), user)

    def of_counted_items(self) -> NDArray[np.uint8]:
        """Codes uint8 [E, G * F] of the E items that `codes` holds, and of their categories."""
        if not self.categories:
            return self.codes.codes
        owner, keys = self.codes.owner, self.keys.of(self.codes.key.astype(np.int64))[1:]
        of_categories = [one.lookup(owner, key) for one, key in zip(self.categories, keys, strict=True)]
        return np.concatenate([self.codes.codes, *of_categories], 1)

    def _with_event_counts(self, codes: NDArray[np.uint8], user: Int) -> NDArray[np.uint8]:
        """Codes uint8 [n, G * F] of pairs, with the codes of the numbers of events of users int64 [n]: uint8
        [n, G * F + 1]."""
        is_counted = codes[:, :: self.codes.spec.num_columns].any(1)
        num_events = np.where(is_counted, encode_event_counts(self.num_events)[user], np.uint8(0))
        return np.column_stack([codes, num_events])
