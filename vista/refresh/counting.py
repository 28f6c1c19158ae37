"""Counts the events of histories in a refresh: exact tables, whose most frequent keys go into the records as codes.

All results are empty for a model without counters.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from vista.counters.counter_codes import CounterCodes
from vista.counters.counter_spec import ITEM, CounterSpec
from vista.counters.counter_table import CounterTable
from vista.log.histories import Histories

Tables = tuple[CounterTable, ...]
"""One table per field."""


def count_histories(spec: CounterSpec | None, histories: Histories) -> Tables:
    """Counters of whole histories, whose items are rows of the model.

    Raises:
        ValueError: the spec has another field than `item`.
    """
    if spec is None:
        return ()
    if spec.fields != (ITEM,):
        raise ValueError(f"fields: a refresh counts only {ITEM!r}, got {', '.join(spec.fields)}")
    return (CounterTable.of(spec, histories.item.astype(np.int64), histories.timestamp, histories.offsets),)


def append_events(tables: Sequence[CounterTable], new: Histories) -> Tables:
    """Counters with the events `new` of the same users added, which follow all earlier ones."""
    key = new.item.astype(np.int64)
    return tuple(table.appended(key, new.timestamp, new.offsets) for table in tables)


def stored_codes(tables: Sequence[CounterTable]) -> tuple[CounterCodes, ...]:
    """What records store of the counters."""
    return tuple(table.top(table.spec.keys[field]).codes() for field, table in enumerate(tables))
