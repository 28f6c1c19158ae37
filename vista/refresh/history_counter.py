"""The counters of a refresh: which keys the events of histories have, and exact tables of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vista.counters.counter_codes import CounterCodes
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable
from vista.log.histories import Histories
from vista.model.ranking_model import RankingModel

Tables = tuple[CounterTable, ...]
"""One table per field; empty for a model without counters."""


@dataclass(frozen=True, slots=True)
class HistoryCounter:
    """Counts the events of histories whose items are rows of the model; without a spec, all results are empty."""

    spec: CounterSpec | None

    @classmethod
    def of(cls, model: RankingModel) -> HistoryCounter:
        """As the model wants its counters."""
        return cls(model.counter_spec)

    def tables(self, histories: Histories) -> Tables:
        """Counters of whole histories."""
        spec = self.spec
        if spec is None:
            return ()
        key = histories.item.astype(np.int64)
        return tuple(CounterTable.of(spec, key, histories.timestamp, histories.offsets) for _ in spec.fields)

    def appended(self, tables: Sequence[CounterTable], new: Histories) -> Tables:
        """Counters to which the events `new` of the same users are added, which follow all earlier ones."""
        key = new.item.astype(np.int64)
        return tuple(table.appended(key, new.timestamp, new.offsets) for table in tables)

    def codes(self, tables: Sequence[CounterTable]) -> tuple[CounterCodes, ...]:
        """What records store of the counters."""
        if self.spec is None:
            return ()
        return tuple(table.top(most).codes() for table, most in zip(tables, self.spec.keys, strict=True))
