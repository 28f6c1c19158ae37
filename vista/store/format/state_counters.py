"""The counters of a state: the exact table of each field (docs/reference/file-formats.md, "States").

N users, E keys of all users together.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.counters.counter_codes import CounterSpec
from vista.counters.counter_table import CounterRows, CounterTable
from vista.store.format.joined_records import JoinedRecords

_HEAD = np.dtype([("clock", "<i8"), ("num_events", "<i8"), ("size", "<u4")])


def tables_bytes(spec: CounterSpec, num_keys: Sequence[int]) -> int:
    """Bytes of the counters of a user with `num_keys[f]` keys of each field f."""
    return len(spec.fields) * _HEAD.itemsize + sum(num_keys) * _entry(spec).itemsize


def encode_tables(tables: Sequence[CounterTable], num_users: int) -> list[bytes]:
    """The counters of each of N users: per field a head, then the entries.

    Raises:
        ValueError: the tables are of another number of users.
    """
    if any(len(table.clock) != num_users for table in tables):
        raise ValueError(f"counters: expected tables of {num_users} users")
    blocks = [b""] * num_users
    for table in tables:
        heads = np.empty(num_users, _HEAD)
        heads["clock"], heads["num_events"], heads["size"] = table.clock, table.num_events, np.diff(table.offsets)
        entries = np.empty(len(table.rows.key), _entry(table.spec))
        for name in entries.dtype.names or ():
            entries[name] = getattr(table.rows, name)
        head, content, entry_bytes = heads.tobytes(), entries.tobytes(), entries.itemsize
        for user, (first, last) in enumerate(pairwise(table.offsets.tolist())):
            own = head[_HEAD.itemsize * user : _HEAD.itemsize * (user + 1)]
            blocks[user] += own + content[entry_bytes * first : entry_bytes * last]
    return blocks


def read_tables(
    records: JoinedRecords, first: int, spec: CounterSpec
) -> tuple[tuple[CounterTable, ...], NDArray[np.bool_]]:
    """The tables of N users, one per field of `spec`, and whether each user's tables fill the block exactly, [N].

    Args:
        records: the N states.
        first: place of the block in each state.
        spec: of the generation.
    """
    entry = _entry(spec)
    stop = records.stops - records.starts
    at, tables, fits = np.full(len(stop), first, np.int64), [], np.ones(len(stop), bool)
    for _ in spec.fields:
        fits &= at + _HEAD.itemsize <= stop
        at = np.where(fits, at, stop - _HEAD.itemsize)  # Any bytes of the record: its tables are not used.
        heads = np.ascontiguousarray(records.cut(at, at + _HEAD.itemsize)).reshape(-1).view(_HEAD)
        at = at + _HEAD.itemsize
        size = heads["size"].astype(np.int64)
        fits &= at + size * entry.itemsize <= stop
        size = np.where(fits, size, 0)
        entries = np.ascontiguousarray(records.cut(at, at + size * entry.itemsize)).reshape(-1).view(entry)
        at = at + size * entry.itemsize
        key, count, last, position = (
            entries[name].astype(np.int64) for name in ("key", "count", "last", "last_position")
        )
        rows = CounterRows(key, count, np.ascontiguousarray(entries["decayed"]), last, position)
        offsets = offsets_of(size)
        clock, num_events = (heads[name].astype(np.int64) for name in ("clock", "num_events"))
        tables.append(CounterTable(spec, rows, offsets, clock, num_events))
    return tuple(tables), fits & (at == stop)


def _entry(spec: CounterSpec) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("key", "<u4"),
            ("count", "<u4"),
            ("decayed", "<f8", (spec.num_horizons,)),
            ("last", "<i8"),
            ("last_position", "<i8"),
        ]
    )
