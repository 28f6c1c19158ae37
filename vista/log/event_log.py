"""EventLog: all users' histories, packed and memory-mapped, read with NumPy only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config import (
    FeatureTableConfig,
    FromEventsConfig,
    ItemTableConfig,
    SourceColumns,
    SourceConfig,
    UserTableConfig,
)
from vista.config.checks import OnBadRows, to_dict
from vista.config.log_config import PASSIVE
from vista.errors import ConfigError, LogFormatError, UnknownUserError, shown
from vista.files import checked_path
from vista.log.event_keys import Impressions, obey_deletions, read_impressions
from vista.log.features import Column, declared_columns, merged_features, values_of, verified_columns
from vista.log.histories import ColumnValues, Histories, PackedTable, take_histories, token_groups
from vista.log.segment import Segment, features_of, read_segments, read_vocabularies, with_row_features
from vista.log.segment_files import EVENTS, IMPRESSIONS, ITEMS, USERS, sources_of_events, stream_offsets


class EventLog:
    """A log on disk. Open one with `EventLog.open`; make one with `EventLog.from_frame` or `vista prepare`.

    It can be shared between threads and with forked or spawned workers: it pickles as its path and last segment.
    """

    def __init__(self, path: Path, segments: Sequence[Segment]) -> None:
        newest = segments[-1].manifest
        self.path = path
        self._opened = segments
        """As they are on disk, with the rows that later ones delete."""
        self.users, self.items = read_vocabularies(segments)
        self.actions: list[str] = list(newest["actions"])
        self.passive = [
            code for code, name in enumerate(self.actions) if name in {PASSIVE + task for task in newest["tasks"]}
        ]
        """Codes of the actions of passive events (`active`)."""
        self.has_time: bool = newest["has_time"]
        self.has_rating: bool = newest["has_rating"]
        self.last_segment = segments[-1].last
        self.num_users = len(self.users)
        self.num_items = len(self.items)
        self.segments = obey_deletions(with_row_features(segments))
        """Oldest first, without the rows that later segments delete."""
        self.num_events = sum(segment.events.num_rows for segment in self.segments)
        self._tables = _filled(self.segments)

    @classmethod
    def open(cls, path: str | os.PathLike[str], *, last_segment: int | None = None) -> EventLog:
        """Open a log, memory-mapped.

        Args:
            path: folder of the log.
            last_segment: read only the segments up to this number; None reads all.

        Raises:
            LogFormatError: if the log is missing, truncated, or of another format, or no segment ends at `last_segment`
                (`has_boundary`).
        """
        folder = checked_path(path, LogFormatError)
        return cls(folder, read_segments(folder, last_segment))

    @classmethod
    def from_frame(
        cls,
        frame: Any,
        path: str | os.PathLike[str],
        *,
        time_unit: str | None = None,
        time_format: str | None = None,
        columns: SourceColumns | None = None,
        impressions: Any = None,
        from_events: FromEventsConfig | None = None,
        as_events: str | None = None,
        items: Any = None,
        users: Any = None,
        categories: Sequence[str] = (),
        numbers: Sequence[str] = (),
        request_categories: Sequence[str] = (),
        request_numbers: Sequence[str] = (),
        on_bad_rows: OnBadRows | str = "raise",
        append: bool = False,
    ) -> EventLog:
        """Write a log from a pandas or Polars frame (or a mapping of columns) and open it.

        Args:
            frame: one row per event. With `append`, None adds only features of `items` or `users`.
            path: folder to make, or with `append` the log to extend by a segment.
            time_unit: s | ms | us | ns | iso; required if the timestamp column is numeric.
            time_format: strptime format of times that are text; None infers a common one from all of them.
            columns: names of the columns; by default user, item, and timestamp. A log whose columns have no `timestamp`
                (None) is ordered as the frame.
            impressions: a second frame with the same user, item, and timestamp columns, and the labels in `columns`.
            from_events: makes impressions from the events, in place of `impressions`, with these labels.
            as_events: a label of the impressions, which also become events (`ImpressionsConfig`).
            items: a frame of item features with the item column of `columns` and one row per item. Text, booleans, and
                lists of text are categories, floats are numbers, and lists of floats are vectors; integers are refused.
            users: a frame of user features with the user column of `columns`, likewise, but without lists.
            categories: columns of `frame` that are features of events with one value each: text, integers, or booleans.
            numbers: columns of `frame` that are features of events, such as a dwell time. NaN is missing.
            request_categories: the same for `impressions`, such as the device of a request.
            request_numbers: likewise.
            on_bad_rows: raise | quarantine.
            append: add a segment to an existing log.

        Raises:
            ConfigError: if arguments contradict each other, `on_bad_rows` is unknown, or times have no unit.
            DataError: naming row, column, value, and remedy.
            TypeError: if a frame is of another type.
        """
        # Imported here because ingest loads Polars, which no reader of a log needs.
        from vista.log.ingest.prepare import prepare_frames

        if impressions is None and (request_categories or request_numbers):
            raise ConfigError(
                "request_categories, request_numbers: name columns of impressions; give these, or no columns"
            )
        if from_events is not None and (impressions is not None or (append and from_events.again_days is not None)):
            raise ConfigError(
                "from_events: makes impressions from events that are given together; leave out impressions, and with "
                "again_days also append"
            )
        own = to_dict(columns or SourceColumns()) | {"time_unit": time_unit, "time_format": time_format}
        tables: dict[str, tuple[Any, SourceConfig | FeatureTableConfig]] = {}
        if items is not None:
            tables["items"] = items, ItemTableConfig(item=own["item"])
        if users is not None:
            tables["users"] = users, UserTableConfig(user=own["user"])
        if not (append and tables and frame is None and impressions is None):
            of_events = own | {"labels": [], "probabilities": []}
            of_events |= {"categories": list(categories), "numbers": list(numbers)}
            tables["events"] = frame, SourceConfig(**of_events)
        if impressions is not None:
            of_requests = own | {"action": None, "rating": None, "sequence": None}
            of_requests |= {"categories": list(request_categories), "numbers": list(request_numbers)}
            tables["impressions"] = impressions, SourceConfig(**of_requests)
        prepare_frames(
            tables, path, on_bad_rows=on_bad_rows, append=append, from_events=from_events, as_events=as_events
        )
        return cls.open(path)

    def verify(self, *, newer_than: int = 0) -> int:
        """Check that no byte of the log's files has changed since it was written. `open` itself reads few bytes.

        Args:
            newer_than: number of a segment. Of the segments up to it, only the ids, the offsets, and the deletions are
                checked. 0 checks everything.

        Returns:
            The number of bytes that were read.

        Raises:
            LogFormatError: naming the damaged file and the remedy.
        """
        return sum(segment.files.verify(large=segment.last > newer_than) for segment in self.segments)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (str(self.path), self.last_segment)

    def __len__(self) -> int:
        return self.num_users

    def __repr__(self) -> str:
        return (
            f"EventLog({str(self.path)!r}: {self.num_users} users, {self.num_items} items, {self.num_events} events, "
            f"{len(self.segments)} segment(s), {'times' if self.has_time else 'order only'})"
        )

    def __getitem__(self, user_id: int | str) -> Histories:
        """The history of one user, by raw id.

        Raises:
            UnknownUserError: if the user is not in the log.
            TypeError: if the log's ids are of the other type, or the id is beyond int64.
        """
        row = int(self.users.rows([user_id])[0])
        if row < 0:
            raise UnknownUserError(f"user {shown(user_id)} is not in {self.path}; check with `user_id in log` first")
        return self.slice(row)

    def __contains__(self, user_id: int | str) -> bool:
        """Whether the log has a user, by raw id.

        Raises:
            TypeError: as in `__getitem__`.
        """
        return int(self.users.rows([user_id])[0]) >= 0

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """The segments' manifests, oldest first."""
        return [segment.manifest for segment in self.segments]

    @cached_property
    def lengths(self) -> Int:
        """Number of events per user: int64 [num_users]."""
        total = np.zeros(self.num_users, np.int64)
        for segment in self.segments:
            total += segment.events.counts(self.num_users)
        total.flags.writeable = False
        return total

    def time_range(self) -> tuple[int, int] | None:
        """Oldest and newest time (ms, or ordinal) of all events; None without events."""
        ranges = []
        for events in (segment.events for segment in self.segments):
            has = np.flatnonzero(np.diff(events.offsets))
            if len(has):
                times = events.columns["timestamp"]
                first = times[events.places(events.offsets[has])]
                last = times[events.places(events.offsets[has + 1] - 1)]
                ranges.append((int(first.min()), int(last.max())))
        return (min(first for first, _ in ranges), max(last for _, last in ranges)) if ranges else None

    @cached_property
    def impressions(self) -> Impressions | None:
        """The impressions, or None without any. They are merged over the segments on first use."""
        if any(segment.impressions is not None for segment in self.segments):
            _, end = self.time_range() or (0, 0)
            return read_impressions(self.segments, self.num_users, end)
        return None

    @cached_property
    def item_features(self) -> dict[str, Column]:
        """Features of all items by name, in the order of `items`; empty without any.

        They are verified, and merged over the segments, on first use.

        Raises:
            LogFormatError: if a file of them is damaged, or segments contradict each other.
        """
        return merged_features(verified_columns(features_of(self.segments, ITEMS)), np.arange(self.num_items))

    @cached_property
    def event_features(self) -> ColumnValues:
        """The columns of `Histories.features`, with the values of each category; empty without any."""
        return values_of(declared_columns(features_of(self.segments, EVENTS)))

    @cached_property
    def request_features(self) -> ColumnValues:
        """The columns of `Impressions.features`, with the values of each category; empty without any."""
        return values_of(declared_columns(features_of(self.segments, IMPRESSIONS)))

    @cached_property
    def user_features(self) -> dict[str, Column]:
        """Features of all users by name, in the order of `users`; read like `item_features`."""
        return merged_features(verified_columns(features_of(self.segments, USERS)), np.arange(self.num_users))

    @cached_property
    def active(self) -> EventLog:
        """This log without passive events, which were made from impressions whose label is 0 (`PASSIVE`).

        Labels of next items, and what counts as a sign of interest, are active events. Rows of users and items stay.
        What opens the log again, such as `as_of` and pickling, gives all events.
        """
        if not self.passive:
            return self
        view = copy(self)
        view.impressions = self.impressions  # when their labels are known depends on all events
        view.__dict__.pop("lengths", None)
        left = []
        for segment in self.segments:
            passive = np.flatnonzero(~self.is_active(segment.events.columns["action"]))
            left.append(replace(segment, events=segment.events.without(passive)))
        view.passive, view.segments, view._tables = [], tuple(left), _filled(left)
        view.num_events = sum(segment.events.num_rows for segment in left)
        return view

    def is_active(self, action: NDArray[Any]) -> NDArray[np.bool_]:
        """Whether events with the codes `action` [N] are active: bool [N]."""
        return ~np.isin(action, self.passive)

    def active_counts(self, counts: Int, user_rows: Int | None = None) -> Int:
        """How many of the first counts[b] events of each user in `user_rows` [B], or of all, are active: int64 [B]."""
        if not self.passive:
            return counts
        found = np.zeros(len(counts), np.int64)
        for own, begin, _, is_active in self._histories_once(user_rows, counts):
            total = offsets_of(is_active)
            found[own] = total[begin + counts[own]] - total[begin]
        return found

    def counts_before_active(self, number: Int, user_rows: Int | None = None) -> Int:
        """How many events of each user in `user_rows` [B], or of all, come before its active event number[b], counted
        from 0, or before the end of its history if there is none: int64 [B]."""
        if not self.passive:
            return number if user_rows is None else np.minimum(number, self.lengths[user_rows])
        found = np.zeros(len(number), np.int64)
        for own, begin, end, is_active in self._histories_once(user_rows, None):
            total, place = offsets_of(is_active), np.append(np.flatnonzero(is_active), 0)
            asked = total[begin] + number[own]
            found[own] = np.where(asked < total[end], place[np.minimum(asked, len(place) - 1)], end) - begin
        return found

    def _histories_once(
        self, user_rows: Int | None, counts: Int | None
    ) -> Iterator[tuple[Int, Int, Int, NDArray[np.bool_]]]:
        """Which events of users in `user_rows` [B] are active, reading each history once, up to its largest count or as
        a whole: places int64 [n] in `user_rows`, and where the histories of these begin and end in bool [T]."""
        user_rows = np.arange(self.num_users) if user_rows is None else user_rows
        users, owner = np.unique(user_rows, return_inverse=True)
        most = self.lengths[users] if counts is None else np.zeros(len(users), np.int64)
        if counts is not None:
            np.maximum.at(most, owner, counts)
        order = owner.argsort(kind="stable")
        first = np.searchsorted(owner[order], np.arange(len(users) + 1))
        for part in token_groups(most, 1 << 22):
            events, own = (
                self.gather(users[part], most[part], features=False),
                order[first[part.start] : first[part.stop]],
            )
            place = owner[own] - part.start
            yield own, events.offsets[place], events.offsets[place + 1], self.is_active(events.action)

    def gather(self, user_rows: Any, counts: Any = None, *, features: bool = True) -> Histories:
        """Histories of several users.

        Args:
            user_rows: int [B] rows of `users`.
            counts: int [B], the number of leading events of each user to return; None returns all.
            features: whether to read features of events; without them, `Histories.features` has no columns.

        Returns:
            B histories, without copying if the log has one segment and the users are complete and consecutive.

        Raises:
            IndexError: if a row is out of range.
            TypeError, ValueError: if rows or counts are not int64 numbers, or differ in shape.
        """
        rows = self._checked_rows(user_rows)
        stops = self.lengths[rows] if counts is None else counts
        return self.gather_ranges(rows, np.zeros(len(rows), np.int64), stops, features=features)

    def gather_ranges(self, user_rows: Any, starts: Any, stops: Any, *, features: bool = True) -> Histories:
        """Events [starts[b], stops[b]) of each user in `user_rows` [B]; bounds are clipped to the history.

        Raises:
            IndexError, TypeError, ValueError: as in `gather`.
        """
        rows = self._checked_rows(user_rows)
        low, high = _bounds(starts, rows.shape), _bounds(stops, rows.shape)
        lengths = self.lengths[rows]
        low = np.clip(low, 0, lengths)
        high = np.clip(high, low, lengths)
        tables = self._tables if features else [replace(table, features={}) for table in self._tables]
        return take_histories(tables, rows, low, high)

    def as_of(self, segment: int) -> EventLog:
        """The log as it was when `segment`, a boundary (`has_boundary`), was its newest segment. No file is opened."""
        return EventLog(self.path, [opened for opened in self._opened if opened.last <= segment])

    def has_boundary(self, after: int) -> bool:
        """Whether `EventLog.open(path, last_segment=after)` can read the log as it was after segment `after`.

        False if that number is inside a compacted range, or not in the log.
        """
        return any(segment.last == after for segment in self.segments)

    def sources_digest(self, upto: int) -> str:
        """Identity of the log: SHA-256 over sources' digests and topics' offsets of the segments numbered up to `upto`.

        Deletions and compactions do not change it. It requires `has_boundary(upto)`.
        """
        digest = hashlib.sha256()
        manifests = [segment.manifest for segment in self.segments if segment.last <= upto]
        for source in (source for manifest in manifests for source in manifest["sources"]):
            digest.update(f"{source['table']} {source['sha256']}\n".encode())
        for partition, offset in sorted(stream_offsets(manifests).items()):
            digest.update(f"{offset.cluster} {partition.topic} {partition.number} {offset.next}\n".encode())
        return digest.hexdigest()

    def event_sources(self) -> list[str]:
        """Where the events came from, in words: each source of one or more events, and each partition of a topic."""
        found = []
        for manifest in self.manifests:
            found += [f"source with SHA-256 {one['sha256']}" for one in sources_of_events(manifest)]
            found += [
                "partition {partition} of topic {topic} ({cluster})".format_map(one) for one in manifest["offsets"]
            ]
        return found

    def changed_users(self, after: int) -> Int:
        """Users with new events, features, or deletions in segments numbered above `after` (0: in any segment).

        This also works inside a compacted range. The result includes users without remaining events, and erased users
        whose ids a compaction has removed (`users.has_ids`).

        Returns:
            int64 [U] user rows, ascending.

        Raises:
            LogFormatError: if the log ends before `after`.
        """
        self._check_number(after)
        changed = np.zeros(self.num_users, np.bool_)
        for segment in self.segments:
            changed[segment.changed_users(after)] = True
        return np.flatnonzero(changed)

    def may_delete(self, after: int) -> bool:
        """Whether segments numbered above `after` delete older rows, or a compaction may have applied deletions."""
        return any(
            segment.manifest["deletions"] > 0 or segment.first <= after
            for segment in self.segments
            if segment.last > after
        )

    def new_events(self, user_rows: Any, after: int) -> Histories:
        """Events of several users in segments numbered above `after`, without those that later segments delete.

        Args:
            user_rows: int [B] rows of `users`.
            after: a number for which `has_boundary` holds, or 0. Older segments are not read.

        Returns:
            B histories, sorted by time; equal times are in the order of the segments. Late events may be older than the
            newest event in earlier segments.

        Raises:
            LogFormatError: if the log ends before `after`, or a compacted segment contains older and newer events.
        """
        rows = self._checked_rows(user_rows)
        self._check_number(after)
        if mixed := [segment for segment in self.segments if segment.first <= after < segment.last]:
            raise LogFormatError(
                f"{self.path}: {mixed[0].path.name} was compacted and does not separate events after segment {after}; "
                "read the whole histories of `changed_users` instead"
            )
        segments = [segment for segment in self.segments if segment.first > after]
        if not segments:
            return self.gather(rows, np.zeros(len(rows), np.int64))
        tables = _filled(segments)
        num = sum((table.counts(self.num_users) for table in tables), np.zeros(self.num_users, np.int64))[rows]
        return take_histories(tables, rows, np.zeros(len(rows), np.int64), num)

    def _check_number(self, after: int) -> None:
        if not 0 <= after <= self.last_segment:
            raise LogFormatError(
                f"{self.path}: ends at segment {self.last_segment}, so it has no segment {after}; check that it is the "
                "right log and that no segment was removed, or refresh all users from it"
            )

    def counts_before(self, time: int) -> Int:
        """Number of events per user strictly before `time` (ms, or an ordinal): int64 [num_users]."""
        total = np.zeros(self.num_users, np.int64)
        for events in (segment.events for segment in self.segments):
            start, stop = events.offsets[:-1], events.offsets[1:]
            total[events.users] += events.first_since(start, stop, np.full(len(start), time)) - start
        return total

    def slice(self, user_row: SupportsIndex, start: int = 0, stop: int | None = None) -> Histories:
        """Events [start, stop) of one user (B = 1), with bounds like a list's; views if one segment has them all.

        Raises:
            IndexError: if the row is out of range.
            TypeError: if the row is beyond int64.
        """
        row = self._checked_rows([user_row])
        low, high, _ = slice(start, stop).indices(int(self.lengths[row[0]]))
        return take_histories(self._tables, row, np.array([low]), np.array([max(low, high)]))

    def _checked_rows(self, user_rows: Any) -> Int:
        rows = np.asarray(user_rows)
        if rows.ndim != 1 or (rows.size and rows.dtype.kind not in "iu"):
            raise TypeError(
                f"user_rows must be a one-dimensional array of integers, got {rows.dtype} of shape {rows.shape}"
            )
        rows = rows.astype(np.int64, copy=False)
        if rows.size and (rows.min() < 0 or rows.max() >= self.num_users):
            raise IndexError(f"user rows must lie in [0, {self.num_users}), got {rows.min()} to {rows.max()}")
        return rows


def _bounds(values: Any, shape: tuple[int, ...]) -> Int:
    """Checked starts or stops of ranges of events."""
    bounds = np.asarray(values)
    if bounds.shape != shape:
        raise ValueError(f"starts, stops and counts must have shape {shape}, got {bounds.shape}")
    if bounds.size and (bounds.dtype.kind not in "iu" or bounds.dtype == np.uint64):
        raise TypeError(f"starts, stops and counts must be int64, got {bounds.dtype}")
    return bounds.astype(np.int64)


def _filled(segments: Sequence[Segment]) -> list[PackedTable]:
    """The segments' events without empty tables, but at least one: a segment may have only deletion rows."""
    tables = [segment.events for segment in segments]
    return [table for table in tables if table.num_rows] or tables[:1]


def _reopen(path: str, last_segment: int) -> EventLog:
    return EventLog.open(path, last_segment=last_segment)


def log_digest(log: EventLog) -> str:
    """12 hex digits of the log's manifests, which hold checksums of all files."""
    manifests = json.dumps(log.manifests, sort_keys=True, default=str).encode()
    return hashlib.sha256(manifests).hexdigest()[:12]
