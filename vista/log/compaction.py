"""Compaction: merge all segments into one, without deleted rows. Histories, user rows, and segment numbers stay.

The new folder appears by one rename and from then on replaces the folders in its range (segment.py). These are removed
afterward. If the process is killed, the old segments, both, or the new one remain, and the next compaction cleans up.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import LogFormatError, LogWriteError
from vista.files import checked_path, sync
from vista.log.event_log import EventLog
from vista.log.features import declared_columns, merged_column, rows_with_features
from vista.log.histories import ColumnValues, PackedTable, RowFeatures, rows_that_fit, take_range, token_groups
from vista.log.segment import features_of, segment_name, superseded_segments
from vista.log.segment_files import (
    EVENTS,
    IMPRESSIONS,
    ITEMS,
    LOG_FIELDS,
    QUARANTINE_FILE,
    SET_ASIDE_FILES,
    USERS,
    FeatureOwner,
    offset_entries,
    stream_offsets,
)
from vista.log.segment_writer import FeatureWriter, SegmentWriter, TableWriter, locked_log, staged_folder
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar

RUN_EVENTS = 1 << 20
"""Events without features that are read and written at once. A longer history is a run by itself."""
MERGED_ROW_BYTES = 40
"""Memory of an event or impression without features while it is read and written."""


@dataclass(frozen=True, slots=True)
class CompactionReport:
    """What a compaction did.

    num_merged: number of segments before; num_users, num_events: what the log contains; num_dropped: deleted events and
    impressions that were removed from the disk; num_blanked: erased users whose ids were removed; quarantine_removed:
    whether quarantined rows were removed too, because they may name erased users.
    """

    path: Path
    segment: str
    num_merged: int
    num_users: int
    num_events: int
    num_dropped: int
    num_blanked: int
    quarantine_removed: bool

    def __str__(self) -> str:
        if self.num_merged == 1:
            return f"{self.path}: {self.segment} is the only segment, nothing to do"
        lines = [
            f"{self.path}: merged {self.num_merged} segments into {self.segment}, {self.num_events:,} events of "
            f"{self.num_users:,} users; removed {self.num_dropped:,} deleted rows and the ids of {self.num_blanked:,} "
            "users"
        ]
        if self.quarantine_removed:
            lines.append("also removed the rows and messages that were set aside, which may name erased users")
        return "\n".join(lines)


def compact_log(path: str | os.PathLike[str], *, run_events: int = RUN_EVENTS) -> CompactionReport:
    """Merge all segments into one. A log with a single segment stays unchanged.

    Readers that have the log open keep reading what they opened. The result depends only on the log.

    Args:
        run_events: events without features that are read at once; it never changes the result. Of rows with features,
            as many are read as take the same memory.

    Raises:
        LogFormatError: if there is no log, or a file of it is damaged.
        DataError: if another process is writing the log, or the disk is full; the log stays unchanged.
    """
    place = checked_path(path, LogFormatError)
    with locked_log(place):
        log = EventLog.open(place)
        _clear_up(place)
        blanked = _blankable(log)
        merged = len(log.segments)
        if merged > 1:
            log.verify()  # otherwise the merged segment would make damage look intact
            with staged_folder(place / segment_name(1, log.last_segment)) as folder:
                quarantine_removed = _write(SegmentWriter(folder), log, blanked, run_events)
            _clear_up(place)
        else:
            quarantine_removed = False
    return CompactionReport(
        place,
        segment_name(log.segments[0].first, log.last_segment),
        merged,
        log.num_users - log.users.num_blank - len(blanked),
        log.num_events,
        sum(table.num_deleted for table in _event_tables(log) + _impression_tables(log)),
        len(blanked),
        quarantine_removed,
    )


def _clear_up(path: Path) -> None:
    """Remove segments that a compaction replaced, and leftovers of killed writers. The log must be locked."""
    try:
        for folder in [*superseded_segments(path), *path.glob(".segment-*.tmp")]:
            shutil.rmtree(folder)
        sync(path)
    except OSError as error:
        raise LogWriteError(
            f"{path}: segments that a compaction replaced cannot be removed ({error}); remove the obstacle, and run "
            "the compaction again"
        ) from error


def _blankable(log: EventLog) -> Int:
    """Rows of erased users who have no rows left but still have an id: int64, ascending."""
    erased = np.unique(np.concatenate([segment.erased for segment in log.segments]))
    left = log.lengths.copy()
    for table in _impression_tables(log):
        left += table.counts(log.num_users)
    left[rows_with_features(features_of(log.segments, USERS))] += 1
    return np.array([row for row in erased[log.users.has_ids(erased)] if left[row] == 0], np.int64)


def _event_tables(log: EventLog) -> list[PackedTable]:
    return [segment.events for segment in log.segments]


def _impression_tables(log: EventLog) -> list[PackedTable]:
    return [segment.impressions for segment in log.segments if segment.impressions is not None]


def _write(segment: SegmentWriter, log: EventLog, blanked: Int, run_events: int) -> bool:
    """Write the merged segment; returns whether invalid rows and messages were omitted."""
    segment.save_vocabulary("new_users", log.users.without_ids(blanked))
    segment.save_vocabulary("new_items", log.items)
    written = {
        EVENTS: _write_rows(segment, EVENTS, log, _event_tables(log), log.event_features, run_events),
        IMPRESSIONS: _write_rows(segment, IMPRESSIONS, log, _impression_tables(log), log.request_features, run_events),
    }
    segment.save("changed.npy", _last_changes(log))
    quarantine_removed = _join_quarantines(segment.folder, log)
    newest = log.manifests[-1]
    segment.write_manifest(
        {name: newest[name] for name in LOG_FIELDS}
        | {
            "first_segment": 1,
            "last_segment": log.last_segment,
            "counts": {owner.table: counts for owner, (counts, _) in written.items()},
            ITEMS.field: _write_features(segment, log, ITEMS, run_events),
            USERS.field: _write_features(segment, log, USERS, run_events),
            **{owner.field: columns for owner, (_, columns) in written.items()},
            "deletions": 0,
            "quarantined": sum(manifest["quarantined"] for manifest in log.manifests),
            "sources": [source for manifest in log.manifests for source in manifest["sources"]],
            "offsets": offset_entries(stream_offsets(log.manifests)),
        }
    )
    return quarantine_removed


def _write_rows(
    segment: SegmentWriter,
    owner: FeatureOwner,
    log: EventLog,
    tables: Sequence[PackedTable],
    values: ColumnValues,
    run_rows: int,
) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Write the merged events or impressions; returns what the manifest says about their number and their features."""
    counts = sum((table.counts(log.num_users) for table in tables), np.zeros(log.num_users, np.int64))
    num_rows = int(counts.sum())
    if not tables:
        return {"rows": 0, "users": 0}, []
    assert owner.prefix is not None
    left, codes = _used_values(tables, values, run_rows)
    features = FeatureWriter(segment, owner, num_rows)
    features.begin(left)
    types = {name: (array.dtype, array.shape[1:]) for table in tables for name, array in table.columns.items()}
    writer = TableWriter(segment, owner.prefix, num_rows, types)
    run_rows = rows_that_fit(run_rows, MERGED_ROW_BYTES, len(values))
    with progress_bar(total=num_rows, desc=f"merge {owner.table}", unit="row", unit_scale=True) as bar:
        for run in token_groups(counts, run_rows):
            users = np.arange(run.start, run.stop)
            block, of_rows, _ = take_range(tables, users, np.zeros(len(users), np.int64), counts[run])
            writer.append(np.repeat(users, counts[run]), block)
            columns = dict(of_rows.columns)
            for name, code in codes.items():
                columns[name] = code[columns[name].astype(np.int64)]
            features.append(RowFeatures(columns))
            bar.update(len(block["item"]))
    features.close()
    return {"rows": num_rows, "users": writer.close()}, features.columns


def _used_values(
    tables: Sequence[PackedTable], values: ColumnValues, rows_at_once: int
) -> tuple[ColumnValues, dict[str, NDArray[np.int32]]]:
    """The values that rows still have after deletions: a value that only erased users had may identify them.

    Args:
        values: of the columns of the tables.
        rows_at_once: rows that are read at once; it never changes the result.

    Returns:
        The values by name of a column; and of the categories that lost values, int32 [V + 1], the new code of each of
        the V values before, or -1, and then -1 for a row without a value.
    """
    left, codes = dict(values), {}
    if any(table.num_deleted for table in tables):
        for name, known in values.items():
            if known is None:
                continue
            used = np.zeros(len(known) + 1, np.bool_)
            for table in tables:
                for start in range(0, table.num_rows, rows_at_once):
                    used[table.features[name][table.span(start, min(start + rows_at_once, table.num_rows))]] = True
            rows = np.flatnonzero(used[:-1])
            if len(rows) < len(known):
                texts = known.ids(rows).tolist()
                left[name] = remaining = Vocabulary.empty("str").extended(texts)
                codes[name] = np.full(len(used), -1, np.int32)
                codes[name][rows] = remaining.rows(texts)
    return left, codes


def _write_features(
    segment: SegmentWriter, log: EventLog, owner: FeatureOwner, run_values: int
) -> list[dict[str, str]]:
    """Write the merged features of items or users; returns what the manifest says about their columns."""
    given = features_of(log.segments, owner)
    declared, owners = declared_columns(given), rows_with_features(given)
    if not len(owners):  # also if all users with features were erased
        return []
    writer = FeatureWriter(segment, owner, owners)
    for name, parts in declared.items():
        first = parts[0].columns[name]
        if first.kind == "vector":
            runs = token_groups(np.full(len(owners), first.size), run_values)
            writer.add_vectors(name, first.size, (merged_column(name, parts, owners[run]).data for run in runs))
        else:
            column = merged_column(name, parts, owners)
            if owner is USERS and column.kind == "category":
                column = column.with_used_values()  # A value of erased users alone may identify them.
            writer.add(name, column)
    return writer.columns


def _last_changes(log: EventLog) -> Int:
    """Number of the last segment that changed each user, or 0: int64 [num_users]."""
    last = np.zeros(log.num_users, np.int64)
    for segment in log.segments:
        users = segment.changed_users(0)
        last[users] = segment.last if segment.changed is None else segment.changed[users]
    return last


def _join_quarantines(folder: Path, log: EventLog) -> bool:
    """Join all files of invalid rows and messages, unless users were erased; returns whether any were omitted."""
    files = [segment.path / name for segment in log.segments for name in SET_ASIDE_FILES if name in segment.files]
    if any(len(segment.erased) for segment in log.segments):
        return bool(files)
    for file in files:
        joined = folder / file.name
        with file.open("rb") as source, joined.open("ab") as target:
            if file.name == QUARANTINE_FILE and joined.stat().st_size:
                source.readline()  # the header
            shutil.copyfileobj(source, target)
    return False
