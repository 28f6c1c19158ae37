"""Counts the events of histories in a refresh: exact tables, whose most frequent keys go into the records as codes.

All results are empty for a model without counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.counters.counter_codes import CounterCodes, ItemKeys
from vista.counters.counter_table import CounterTable
from vista.log.histories import Histories

Tables = tuple[CounterTable, ...]
"""One table per field."""


def count_histories(keys: ItemKeys | None, histories: Histories) -> Tables:
    """Counters of whole histories, whose items are rows of the model."""
    if keys is None:
        return ()
    events = keys.of(histories.item.astype(np.int64))
    return tuple(CounterTable.of(keys.spec, key, histories.timestamp, histories.offsets) for key in events)


def append_events(keys: ItemKeys | None, tables: Sequence[CounterTable], new: Histories) -> Tables:
    """Counters with the events `new` of the same users added, which follow all earlier ones."""
    if keys is None:
        return ()
    events = zip(tables, keys.of(new.item.astype(np.int64)), strict=True)
    return tuple(table.appended(key, new.timestamp, new.offsets) for table, key in events)


def stored_codes(tables: Sequence[CounterTable]) -> tuple[CounterCodes, ...]:
    """What records store of the counters."""
    return tuple(table.top(table.spec.keys[field]).codes() for field, table in enumerate(tables))
