"""What the events of an item are counted as: the item itself, and its value of each counted category."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.counters.counter_spec import CounterSpec


@dataclass(frozen=True, slots=True)
class ItemKeys:
    """The keys of a model's items in each field of a spec, whose first field is `item`.

    R model rows, G fields.
    """

    spec: CounterSpec
    category: NDArray[np.int32]
    """[G - 1, R] the key of each model row in the fields after `item`; 0 for an item without a value."""

    def of(self, rows: Int) -> list[Int]:
        """Keys of model rows int64 [...] in each of the G fields, int64 [...]; first the rows themselves."""
        return [rows, *(category[rows].astype(np.int64) for category in self.category)]
