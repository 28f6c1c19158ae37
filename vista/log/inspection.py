"""What an EventLog contains, for `vista log stats`, and the names of its items, for people."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vista.errors import ConfigError, LogFormatError
from vista.files import checked_path
from vista.log.event_log import EventLog
from vista.log.features import Column, described
from vista.log.histories import ColumnValues
from vista.log.segment import find_segments
from vista.log.segment_files import (
    MANIFEST_FILE,
    REMEDY,
    SegmentFile,
    StreamOffset,
    StreamPartition,
    read_segment_manifest,
    stream_offsets,
)
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar


@dataclass(frozen=True, slots=True)
class LogStats:
    """What a log contains.

    segments: names, oldest first; num_users: users with an id, with or without events; num_forgotten, num_erased:
    deletion rows, of events and of users; num_deleted: deleted events and impressions that are still on disk; features:
    a line per column, of items, users, events, and impressions; topics: a line per Kafka topic; size_bytes: of the
    current segments; first_ms, last_ms: oldest and newest time, None in an empty log or a log without times.
    """

    path: Path
    segments: list[str]
    num_users: int
    num_items: int
    num_events: int
    num_impressions: int
    num_forgotten: int
    num_erased: int
    num_deleted: int
    features: list[str]
    topics: list[str]
    size_bytes: int
    first_ms: int | None
    last_ms: int | None

    @classmethod
    def of(cls, log: EventLog) -> LogStats:
        """Count the contents of a log."""
        first, last = (log.time_range() if log.has_time else None) or (None, None)
        return cls(
            log.path,
            [segment.path.name for segment in log.segments],
            log.num_users - log.users.num_blank,
            log.num_items,
            log.num_events,
            sum(segment.impressions.num_rows for segment in log.segments if segment.impressions is not None),
            sum(0 if segment.forgotten is None else segment.forgotten.num_rows for segment in log.segments),
            sum(len(segment.erased) for segment in log.segments),
            sum(
                table.num_deleted
                for segment in log.segments
                for table in (segment.events, segment.impressions)
                if table is not None
            ),
            [
                *described(log.item_features, "items"),
                *described(log.user_features, "users"),
                *_lines(log.event_features, "event"),
                *_lines(log.request_features, "impression"),
            ],
            _topics(stream_offsets(segment.manifest for segment in log.segments)),
            sum(file.stat().st_size for segment in log.segments for file in segment.path.rglob("*") if file.is_file()),
            first,
            last,
        )

    def __str__(self) -> str:
        times = "order only"
        if self.first_ms is not None and self.last_ms is not None:
            seconds = (np.datetime64(ms // 1000, "s") for ms in (self.first_ms, self.last_ms))  # years of any length
            times = " to ".join(str(second).replace("T", " ") for second in seconds)
        return "\n".join(
            [
                f"{self.path}: {len(self.segments)} segment(s), {self.size_bytes:,} bytes: {', '.join(self.segments)}",
                f"{self.num_users:,} users, {self.num_items:,} items, {self.num_events:,} events ({times}), "
                f"{self.num_impressions:,} impressions",
                f"deletions: {self.num_forgotten:,} events and {self.num_erased:,} users; {self.num_deleted:,} rows "
                "still on disk until a compaction",
                *(f"feature {line}" for line in self.features),
                *(f"topic {line}" for line in self.topics),
            ]
        )


def _lines(columns: ColumnValues, row: str) -> list[str]:
    return [
        f"{name}: number per {row}" if known is None else f"{name}: category of {len(known):,} values per {row}"
        for name, known in columns.items()
    ]


def _topics(offsets: Mapping[StreamPartition, StreamOffset]) -> list[str]:
    """Where the next read of each topic begins."""
    next_offsets: dict[tuple[str, str], list[str]] = {}
    for partition, offset in sorted(offsets.items()):
        next_offsets.setdefault((partition.topic, offset.cluster), []).append(f"{offset.next:,}")
    return [
        f"{topic} of cluster {cluster}: next offsets {' '.join(numbers)}"
        for (topic, cluster), numbers in next_offsets.items()
    ]


@dataclass(frozen=True, slots=True)
class LogVerification:
    """What a check of a log found. num_files, num_bytes: of the intact files that manifests list; damaged: the other
    listed files, and damaged manifests, relative to the log's folder."""

    path: Path
    num_files: int
    num_bytes: int
    damaged: list[str]

    def __str__(self) -> str:
        if not self.damaged:
            return f"{self.path}: {self.num_files:,} files with {self.num_bytes:,} bytes are intact"
        return (
            f"{self.path}: {len(self.damaged)} damaged or missing file(s): {', '.join(self.damaged)}; "
            f"restore them from a copy, or {REMEDY}"
        )


def verify_log(path: str | os.PathLike[str]) -> LogVerification:
    """Compare every file of a log with its manifest, even if they are too damaged to open the log. Raises
    LogFormatError if there is no log, a segment is missing, or manifests contradict each other."""
    place = checked_path(path, LogFormatError)
    while True:
        folders, damaged, num_bytes = find_segments(place), list[str](), list[int]()
        files: list[tuple[Path, dict[str, Any]]] = []
        for folder in folders:
            try:
                entries = read_segment_manifest(folder)["files"]
            except LogFormatError:
                damaged.append(f"{folder.name}/{MANIFEST_FILE}")
                continue
            files += [(folder / name, entry) for name, entry in entries.items()]
        total = sum(entry["bytes"] for _, entry in files)
        with progress_bar(total=total, desc="verify log", unit="B", unit_scale=True) as bar:
            for file, entry in files:
                try:
                    num_bytes.append(SegmentFile.open(file, entry).verify())
                except LogFormatError:
                    damaged.append(str(file.relative_to(place)))
                bar.update(entry["bytes"])
        if damaged and find_segments(place) != folders:
            continue  # A compaction has replaced these segments in the meantime; check the new one.
        if not damaged:
            EventLog.open(place)
        return LogVerification(place, len(num_bytes), sum(num_bytes), damaged)


TITLE_WORDS = ("title", "name", "description")
"""Parts of the names of columns that hold a text of each item."""
MAX_GROUPS = 200
"""Most values of a category that sorts items into groups."""
MAX_TITLE = 60
"""Characters of a title that are shown."""


@dataclass(frozen=True, slots=True)
class ItemNames:
    """Titles and groups of a log's items, from its features; without such columns, items are shown by their ids."""

    items: Vocabulary
    titles: Column | None = None
    groups: Column | None = None
    group_name: str = ""
    """Name of the column of groups, such as genres."""

    @classmethod
    def of(cls, log: EventLog | None, column: str | None = None) -> ItemNames:
        """The names that a log has; None for a page without a log.

        Args:
            column: a category of the items that has their names; None takes the first with one of TITLE_WORDS in its
                name.

        Raises:
            LogFormatError: the log's features are damaged.
            ConfigError: the log has no such column.
        """
        features = {} if log is None else log.item_features
        columns = {n: c for n, c in features.items() if c.kind == "category"}
        if column is not None and column not in columns:
            raise ConfigError(f"item_name: {column!r} is not a category of the log's items; it has {sorted(columns)}")
        if not columns:
            return cls.by_id(log)
        assert log is not None
        word = next((n for n in columns if any(word in n.lower() for word in TITLE_WORDS)), "")
        titles = columns.get(word if column is None else column)
        few = (n for n, c in columns.items() if c is not titles and 1 < c.size <= MAX_GROUPS)
        group_name = next(few, "")
        return cls(log.items, titles, columns.get(group_name), group_name)

    @classmethod
    def by_id(cls, log: EventLog | None) -> ItemNames:
        """The ids of a log's items; None for a page without a log."""
        return cls(Vocabulary.empty("int") if log is None else log.items)

    def of_ids(self, ids: Iterable[Any]) -> list[str]:
        """A name per item id; "unknown item" for None."""
        known = list(ids)
        titles = self._values(self.titles, known)
        return [
            "unknown item" if item is None else f"{_shortened(title)} ({item})" if title else str(item)
            for item, title in zip(known, titles, strict=True)
        ]

    def groups_of_ids(self, ids: Iterable[Any]) -> list[str]:
        """The first group of each item id; "" without one."""
        return self._values(self.groups, list(ids))

    def _values(self, column: Column | None, ids: list[Any]) -> list[str]:
        """The first value of each item in a column; "" without one."""
        if column is None or column.values is None:
            return [""] * len(ids)
        given = [place for place, item in enumerate(ids) if item is not None]
        rows = np.full(len(ids), -1, np.int64)
        rows[given] = self.items.rows([ids[place] for place in given]) if given else []
        chosen = column.select(rows)
        assert chosen.offsets is not None
        has = chosen.is_known
        texts = iter(column.values.ids(chosen.data[chosen.offsets[:-1][has]]).tolist())
        return [str(next(texts)) if one else "" for one in has.tolist()]


def _shortened(title: str) -> str:
    return title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 1]}…"
