"""Impressions: the log's second table, with one label per task, packed by user and sorted by time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.log.histories import ranges
from vista.log.packed_table import PackedTable
from vista.log.row_features import RowFeatures
from vista.log.segment import Segment


@dataclass(frozen=True, slots=True)
class Impressions:
    """All impressions of a log, in the order of user rows. Arrays may be read-only views of the log.

    offsets: int64 [num_users + 1]; item: int32 [N] item rows; timestamp: int64 [N] ms; label: uint8 [N, num_tasks], 0
    where unknown; mask: uint8 [N, num_tasks], 1 where the label is known; tasks: names of the tasks; probability:
    float32 [N, num_tasks] true probabilities of a simulation (NaN where unknown), or None; features: of N rows, with
    the names of `EventLog.request_features`.
    """

    offsets: NDArray[np.int64]
    item: NDArray[np.int32]
    timestamp: NDArray[np.int64]
    label: NDArray[np.uint8]
    mask: NDArray[np.uint8]
    tasks: list[str]
    probability: NDArray[np.float32] | None
    features: RowFeatures = field(default_factory=lambda: RowFeatures({}))

    @property
    def num_impressions(self) -> int:
        return int(self.offsets[-1])


def read_impressions(segments: Sequence[Segment], num_users: int) -> Impressions:
    """Impressions of a log: views of the files of one segment, or those of several segments merged in memory by time.

    If only some segments have probabilities, those of the others are NaN.
    """
    tables = [segment.impressions for segment in segments if segment.impressions is not None]
    tasks: list[str] = next(s.manifest["tasks"] for s in reversed(segments) if s.impressions is not None)
    counts = sum((table.counts(num_users) for table in tables), np.zeros(num_users, np.int64))
    offsets = offsets_of(counts)
    columns, features = merged_columns([table.of_users(0, num_users) for table in tables], offsets)
    return Impressions(
        offsets,
        columns["item"],
        columns["timestamp"],
        columns["label"],
        columns["mask"],
        list(tasks),
        columns.get("probability"),
        features,
    )


def merged_columns(
    tables: Sequence[PackedTable], offsets: NDArray[np.int64]
) -> tuple[dict[str, NDArray[Any]], RowFeatures]:
    """Merge the columns and features of users 0 .. U - 1 from several tables, by time, then in the order of tables.

    Args:
        tables: tables without deleted rows, with the same features.
        offsets: int64 [U + 1] of the merged rows.
    """
    if len(tables) == 1:
        return tables[0].columns, tables[0].features_at(slice(None))
    num_users = len(offsets) - 1
    next_free = offsets[:-1].copy()
    places = []
    for table in tables:
        counts = table.counts(num_users)
        places.append(ranges(next_free, counts))
        next_free += counts
    out: dict[str, NDArray[Any]] = {}
    for name in sorted({name for table in tables for name in table.columns}):
        present = next(table.columns[name] for table in tables if name in table.columns)
        fill = np.nan if present.dtype.kind == "f" else 0
        out[name] = np.full((int(offsets[-1]), *present.shape[1:]), fill, present.dtype)
        for table, place in zip(tables, places, strict=True):
            if name in table.columns:
                out[name][place] = table.columns[name]
    features = tables[0].features_at(slice(0, 0)).empty(int(offsets[-1]))
    for table, place in zip(tables, places, strict=True):
        for name, column in features.columns.items():
            column[place] = table.features[name]
    owner = np.repeat(np.arange(num_users), np.diff(offsets))
    order = np.lexsort((out["timestamp"], owner))
    return {name: column[order] for name, column in out.items()}, features.select(order)
