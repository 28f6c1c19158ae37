"""Deletion rows of a log: forgotten events and erased users, appended atomically as one small segment.

Readers that open the log after that no longer see the deleted rows. The next compaction removes them from the disk
(compaction.py).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import ConfigError, DataError, LogFormatError, UnknownUserError, shown
from vista.files import checked_path
from vista.installation import require_module
from vista.log.event_keys import EventKeys, equal_events
from vista.log.event_log import EventLog
from vista.log.ingest.rows import ORDER, TIME_UNITS, read_part
from vista.log.ingest.source_files import to_polars
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import Source, frame_source, open_sources
from vista.log.segment import segment_name
from vista.log.segment_files import FORGOTTEN_COLUMNS
from vista.log.segment_writer import SegmentWriter, TableWriter, locked_log, staged_folder, write_without_events
from vista.progress_bar import elapsed_time

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_NAMED_ROWS = 3


@dataclass(frozen=True, slots=True)
class DeletionReport:
    """What a segment of deletion rows deletes. num_users: users who lost an event or were erased."""

    path: Path
    segment: int
    num_users: int
    num_events: int
    num_impressions: int

    def __str__(self) -> str:
        impressions = f" and {self.num_impressions:,} impressions" if self.num_impressions else ""
        return (
            f"{self.path}: segment {self.segment} deletes {self.num_events:,} events{impressions} of "
            f"{self.num_users:,} users; the data stay on disk until `vista log compact data={self.path}`"
        )


def forget_events(path: str | os.PathLike[str], events: Any) -> DeletionReport:
    """Delete single events: all events that currently equal a row of `events`, including repeated ones.

    Args:
        events: a pandas or Polars frame, or a mapping of columns, with raw ids: `user`, `item`, `timestamp` (ms or
            datetimes; the ordinal in a log without times), and optionally `action`. Without `action`, events with any
            action match.

    Raises:
        DataError: naming the rows that match no event or are invalid; nothing is deleted then.
        LogFormatError: if there is no such log, or its ids are damaged.
    """
    names = list(events) if isinstance(events, Mapping) else list(getattr(events, "columns", ()))
    columns = ["user", "item", "timestamp", *(["action"] if "action" in names else [])]
    frame = to_polars(events, columns)
    config = _config([], "action" in names, None if frame["timestamp"].dtype.is_temporal() else "ms")
    return _forget(checked_path(path, LogFormatError), frame_source(frame, config, "events"))


def forget_file(
    path: str | os.PathLike[str], file: str, time_unit: str | None, time_format: str | None = None
) -> DeletionReport:
    """Delete single events like `forget_events`, from a CSV or Parquet file with the same columns.

    Args:
        time_unit: unit of numeric or text timestamps, s | ms | us | ns | iso; None in a log without times.
        time_format: strptime format of text timestamps.

    Raises:
        ConfigError: if the timestamps have no unit.
        DataError: like `forget_events`, or if the file cannot be read or lacks a column.
    """
    log = EventLog.open(path)
    if not log.has_time and (form := time_format or time_unit) is not None:
        key = "time_format" if time_format else "time_unit"
        raise ConfigError(f"{key}={form}: {path} has no times, so `timestamp` is an event number; leave {key} out")
    if checked_path(file, DataError).is_dir():
        raise DataError(f"{file}: is a folder; name a single CSV or Parquet file")
    if not Path(file).is_file():
        raise DataError(f"{file}: no such file or folder; check the path")
    with SourceParser() as parser:
        types, _ = parser.call("column_types", file)
        for name in ("user", "item", "timestamp"):
            if name not in types:
                raise DataError(
                    f"{file}: column {name!r} is missing, the file has: {', '.join(types)}; rename the columns to "
                    "user, item, timestamp, and optionally action"
                )
        if log.has_time and not (time_unit or time_format or types["timestamp"].startswith("Date")):
            raise ConfigError(
                f"time_unit: set the unit of column 'timestamp' of {file} ({', '.join(TIME_UNITS)}), or time_format"
            )
        config = _config([file], "action" in types, time_unit if log.has_time else "ms", time_format)
        (source,) = open_sources(config, "events", parser)
        return _forget(Path(path), source)


def rows_to_erase(log: EventLog, user_ids: Sequence[int] | Sequence[str]) -> Int:
    """Rows of the users to erase. Raises UnknownUserError naming ids that are not in the log."""
    rows = log.users.rows(user_ids)
    if (rows < 0).any():
        unknown = [user_ids[i] for i in np.flatnonzero(rows < 0).tolist()]
        raise UnknownUserError(
            f"{log.path}: {len(unknown)} of the users are not in the log, such as {', '.join(map(repr, unknown[:3]))}; "
            "no user was erased; leave these users out"
        )
    return rows


def erase_users(path: str | os.PathLike[str], user_ids: Sequence[int] | Sequence[str]) -> DeletionReport:
    """Delete users: all their events and impressions that are in the log now.

    Args:
        user_ids: raw ids.

    Raises:
        ConfigError: if no user is named.
        UnknownUserError: naming ids that are not in the log; no user is erased then.
        LogFormatError: if there is no such log, or its ids are damaged.
    """
    if not len(user_ids):
        raise ConfigError("users: name at least one user to erase")
    with locked_log(checked_path(path, LogFormatError)):
        log = EventLog.open(path)
        log.verify(newer_than=log.last_segment)
        erased = np.unique(rows_to_erase(log, user_ids))
        impressions = [segment.impressions for segment in log.segments if segment.impressions is not None]
        number = log.last_segment + 1
        with staged_folder(log.path / segment_name(number)) as folder:
            write_deletions(SegmentWriter(folder), log, None, erased)
    return DeletionReport(
        log.path,
        number,
        len(erased),
        int(log.lengths[erased].sum()),
        sum(int(table.locate(erased)[1].sum()) for table in impressions),
    )


def _config(paths: list[str], has_action: bool, time_unit: str | None, time_format: str | None = None) -> SourceConfig:
    action = "action" if has_action else None
    return SourceConfig(paths=paths, timestamp="timestamp", action=action, time_unit=time_unit, time_format=time_format)


def _forget(path: Path, source: Source) -> DeletionReport:
    with locked_log(path):
        log = EventLog.open(path)
        log.verify(newer_than=log.last_segment)
        number = log.last_segment + 1
        with staged_folder(path / segment_name(number)) as folder:
            rows = _read(log, source, folder)
            forgotten = _matches(log, _event_keys(log, rows), rows, source)
            write_deletions(SegmentWriter(folder), log, forgotten, np.empty(0, np.int64))
    num_events = sum(len(equal_events(segment.events, forgotten)[1]) for segment in log.segments)
    return DeletionReport(path, number, len(np.unique(forgotten.user)), num_events, 0)


def _read(log: EventLog, source: Source, folder: Path) -> pl.DataFrame:
    """Parsed and checked rows of a source, in its order, in memory."""
    kinds = {"user": log.users.kind, "item": log.items.kind}
    with elapsed_time("read events"):
        part = read_part(source, kinds, "events", folder, 0, OnBadRows.error)
        frame = part.good().sort(ORDER).collect()
    part.file.unlink()
    return frame


def _event_keys(log: EventLog, frame: pl.DataFrame) -> EventKeys:
    """The rows in the log's codes; -1 for ids and actions that the log does not contain."""

    def rows(name: str) -> Int:
        vocabulary = log.users if name == "user" else log.items
        return vocabulary.rows(frame[name].to_numpy() if vocabulary.kind == "int" else frame[name].to_list())

    action = None
    if "action" in frame.columns:
        code = {name: number for number, name in enumerate(log.actions)}
        action = np.array([code.get(name, -1) for name in frame["action"].to_list()], np.int64)
    return EventKeys(rows("user"), rows("item"), frame["timestamp"].to_numpy().astype(np.int64), action)


def _matches(log: EventLog, keys: EventKeys, frame: pl.DataFrame, source: Source) -> EventKeys:
    """The distinct events of the log that match the keys, sorted by user, time, item, and action."""
    pairs = []
    met = np.zeros(len(keys), np.bool_)
    known = np.flatnonzero((keys.user >= 0) & (keys.item >= 0))
    asked = keys.select(known)
    for segment in log.segments:
        key, row = equal_events(segment.events, asked)
        met[known[key]] = True
        action = segment.events.columns["action"][segment.events.places(row)].astype(np.int64)
        pairs.append(np.stack([asked.user[key], asked.timestamp[key], asked.item[key], action], axis=1))
    if not met.all():
        missing = frame.filter(~met)
        named = (_named(row) for row in missing.head(_NAMED_ROWS).iter_rows(named=True))
        more = f" and {len(missing) - _NAMED_ROWS} more" if len(missing) > _NAMED_ROWS else ""
        raise DataError(
            f"{source.path}: {', '.join(named)}{more} match no event of {log.path}; no event was deleted; correct "
            "these rows, or leave them out"
        )
    user, timestamp, item, action = np.unique(np.concatenate(pairs), axis=0).T
    return EventKeys(user, item, timestamp, action)


def _named(row: Mapping[str, Any]) -> str:
    values = ", ".join(f"{name} {shown(row[name])}" for name in ("user", "item", "timestamp", "action") if name in row)
    return f"row {row[ORDER] % 2**32} ({values})"


def write_deletions(segment: SegmentWriter, log: EventLog, forgotten: EventKeys | None, erased: Int) -> None:
    """Write the log's next segment, which contains only deletion rows.

    Args:
        segment: the writer of the new segment.
        forgotten: distinct keys, sorted by user, time, item, and action.
        erased: user rows, ascending.
    """
    fields = write_without_events(segment, log.manifests[-1], log.users, log.items)
    num_forgotten = 0
    if forgotten is not None:
        num_forgotten = len(forgotten)
        columns: dict[str, NDArray[Any]] = {name: getattr(forgotten, name) for name in FORGOTTEN_COLUMNS}
        types = {name: (dtype, ()) for name, dtype in FORGOTTEN_COLUMNS.items()}
        writer = TableWriter(segment, "deletions/", num_forgotten, types)
        writer.append(forgotten.user, columns)
        writer.close()
    if len(erased):
        segment.save("erased.npy", erased)
    segment.write_manifest(fields | {"deletions": num_forgotten + len(erased)})
