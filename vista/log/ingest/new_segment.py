"""The segment that one run of ingest writes: its manifest and its warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config import SourceConfig
from vista.errors import ConfigError, DataError, TakenError
from vista.log.event_keys import obey_deletions
from vista.log.features import declared_columns, values_of
from vista.log.histories import YEAR_1971_MS, ColumnValues
from vista.log.ingest.packer import NO_ACTION
from vista.log.ingest.rows import Part, id_kind
from vista.log.ingest.sources import Source
from vista.log.segment import Segment, features_of, read_segments, read_vocabularies
from vista.log.segment_files import EVENTS, IMPRESSIONS, MAX_FEATURES, OWNERS, FeatureOwner
from vista.log.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class ExistingLog:
    """The log before an ingest; a new log has no segments and no ids.

    segments: oldest first, without the rows that later ones delete; users, items: vocabularies of all segments.
    """

    segments: Sequence[Segment]
    users: Vocabulary
    items: Vocabulary

    @classmethod
    def open(cls, path: Path) -> ExistingLog:
        """Open the log in a folder.

        Raises:
            LogFormatError: if it is missing or damaged.
        """
        segments = read_segments(path)
        for segment in segments:
            segment.files.verify(large=False)  # A damaged id would be added to the log as a new one.
        return cls(obey_deletions(segments), *read_vocabularies(segments))

    @classmethod
    def empty(cls, kinds: Mapping[str, str]) -> ExistingLog:
        """A log without segments, with ids of the given `kinds` ("int" or "str", of "user" and "item")."""
        return cls((), Vocabulary.empty(kinds["user"]), Vocabulary.empty(kinds["item"]))

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """The segments' manifests, oldest first."""
        return [segment.manifest for segment in self.segments]

    @property
    def last_segment(self) -> int:
        """Number of the newest segment; 0 without segments."""
        return self.segments[-1].last if self.segments else 0

    @property
    def actions(self) -> list[str]:
        """Names of the actions by code."""
        return list(self.manifests[-1]["actions"]) if self.segments else []

    @property
    def tasks(self) -> list[str]:
        """Names of the impressions' labels; empty without impressions."""
        return list(self.manifests[-1]["tasks"]) if self.segments else []

    def row_values(self, owner: FeatureOwner) -> ColumnValues:
        """The columns of features of events or impressions, with the values of each category."""
        return values_of(declared_columns(features_of(self.segments, owner)))

    def next_ordinals(self) -> NDArray[np.int64]:
        """In a log without times: one more than the last ordinal of each user, int64 [num_users]."""
        following = np.zeros(len(self.users), np.int64)
        for events in (segment.events for segment in self.segments):
            has = np.flatnonzero(np.diff(events.offsets))
            last = events.columns["timestamp"][events.places(events.offsets[has + 1] - 1)]
            following[events.users[has]] = np.maximum(following[events.users[has]], last + 1)
        return following


@dataclass(frozen=True, kw_only=True, slots=True)
class NewSegment:
    """What one run of ingest writes into a segment.

    before: the log without it; parts: by table, "events", "impressions", "items", and "users"; users, items, actions,
    tasks: of the log with this segment; time_range_ms: oldest and newest time of the events, None in a log without
    times.
    """

    number: int
    before: ExistingLog
    parts: Mapping[str, Sequence[Part]]
    users: Vocabulary
    items: Vocabulary
    actions: list[str]
    tasks: list[str]
    time_range_ms: tuple[int | None, int | None]

    @classmethod
    def without_events(cls, before: ExistingLog, parts: Mapping[str, Sequence[Part]]) -> NewSegment:
        """A segment that adds only features to a log."""
        return cls(
            number=before.last_segment + 1,
            before=before,
            parts=parts,
            users=before.users,
            items=before.items,
            actions=before.actions,
            tasks=before.tasks,
            time_range_ms=(None, None),
        )

    def num_rows(self, table: str) -> int:
        """Good rows of a table; 0 without the table."""
        return sum(part.num_rows for part in self.parts.get(table, ()))

    @property
    def num_bad(self) -> int:
        """Number of bad rows in all tables."""
        return sum(part.num_bad for parts in self.parts.values() for part in parts)

    def manifest(
        self, active_users: Mapping[str, int], row_features: Mapping[str, list[dict[str, str]]]
    ) -> dict[str, Any]:
        """The manifest's entries (segment.py) of a segment with events, except for features of items and users.

        Args:
            active_users: by table, the number of users with rows.
            row_features: by table, the names and kinds of the features of its rows.
        """
        has_time = self.time_range_ms != (None, None)
        return {
            "first_segment": self.number,
            "last_segment": self.number,
            "num_users": len(self.users),
            "num_items": len(self.items),
            "id_types": {"users": self.users.kind, "items": self.items.kind},
            "actions": self.actions,
            "tasks": self.tasks,
            "has_time": has_time,
            "timestamp": "milliseconds since 1970-01-01 UTC" if has_time else "ordinal of the event in its history",
            "has_rating": "rating" in self.parts["events"][0].source.columns,
            "counts": {
                table: {"rows": self.num_rows(table), "users": active_users.get(table, 0)}
                for table in ("events", "impressions")
            },
            "event_features": row_features["events"],
            "request_features": row_features.get("impressions", []),
            "deletions": 0,
            "offsets": [],
        }

    def sources(self) -> list[dict[str, Any]]:
        """The manifest's entries of all sources."""
        return [
            {
                "table": table,
                "name": part.source.name,
                "bytes": part.source.size,
                "sha256": part.source.digest,
                "rows": part.num_rows,
                "bad_rows": part.num_bad,
            }
            for table, parts in self.parts.items()
            for part in parts
        ]

    def warnings(self) -> list[str]:
        """What is allowed, but is probably a mistake or needs another step."""
        warnings = []
        newest = self.time_range_ms[1]
        if newest is not None and newest < YEAR_1971_MS:
            warnings.append(
                "all times are before 1971; check events.time_unit, in case seconds were read as milliseconds"
            )
        new_actions = self.actions[len(self.before.actions) :]
        if self.before.segments and new_actions:
            warnings.append(
                f"the log has the new actions {', '.join(new_actions)}; models that use actions do not know them, so "
                "retrain these models before the next refresh"
            )
        return warnings


# Checks of sources against each other and the log, before any row is read.


def check_sources(sources: Mapping[str, Sequence[Source]], log: ExistingLog | None) -> None:
    """Refuse sources that the log already contains, that differ in their columns, or that do not match the log.

    Args:
        sources: by table: "events", "impressions", "items", "users".
        log: the log to extend; None for a new one.

    Raises:
        ConfigError: if there are impressions, but a table has no times, or a table has too many columns of features.
        DataError: naming the file.
    """
    for table, files in sources.items():
        # Features may be given again: they replace what came in between.
        _refuse_repeated_content(table, files, None if table in OWNERS else log)
        _refuse_other_columns(files)
        if log is not None and table == "events":
            _refuse_other_events(files[0], log)
        elif log is not None and table == "impressions":
            _refuse_other_tasks(files[0], log)
        if table in ("events", "impressions"):
            _refuse_too_many(table, files[0])
        if log is not None and table in ("events", "impressions"):
            _refuse_other_kinds(table, files[0], log)
    with_times = [files[0] for table, files in sources.items() if table not in OWNERS]
    if "impressions" in sources and any("timestamp" not in source.columns for source in with_times):
        raise ConfigError("impressions need times, and so do their events; set timestamp for both tables")


def _refuse_too_many(table: str, source: Source) -> None:
    num_features = sum(name.startswith(("category:", "number:")) for name in source.columns)
    if num_features > MAX_FEATURES:
        raise ConfigError(
            f"{table}.categories, {table}.numbers: name {num_features:,} columns, but at most {MAX_FEATURES:,} are "
            "possible; name fewer"
        )


def _refuse_repeated_content(table: str, files: Sequence[Source], log: ExistingLog | None) -> None:
    where_taken: dict[str, str] = {}
    for manifest in log.manifests if log else []:
        for entry in manifest["sources"]:
            if entry["table"] == table:
                place = f"segment {manifest['last_segment']} already contains it (as {entry['name']})"
                where_taken[entry["sha256"]] = place
    for source in files:
        if source.digest in where_taken:
            raise TakenError(
                f"{source.path}: {where_taken[source.digest]}; leave it out, because its rows would count twice"
            )
        where_taken[source.digest] = f"has the same content as {source.path}"


def _refuse_other_columns(files: Sequence[Source]) -> None:
    first = files[0]
    for source in files:
        if set(source.columns) != set(first.columns):
            raise DataError(
                f"{source.path}: has the columns {', '.join(source.columns)}, but {first.path} has "
                f"{', '.join(first.columns)}; prepare files with different columns separately"
            )


def _refuse_other_events(source: Source, log: ExistingLog) -> None:
    newest = log.manifests[-1]
    for name, in_log in (("timestamp", newest["has_time"]), ("rating", newest["has_rating"])):
        if (name in source.columns) != in_log:
            remedy = (
                f"name their column with events.{name}=..." if in_log else f"leave them out with events.{name}=null"
            )
            raise DataError(f"{source.path}: the log has {'' if in_log else 'no '}{name}s; {remedy}")
    if log.actions != [NO_ACTION] and "action" not in source.columns:
        raise DataError(
            f"{source.path}: the log has the actions {', '.join(log.actions)}; name their column with events.action=..."
        )


def _refuse_other_tasks(source: Source, log: ExistingLog) -> None:
    tasks = tasks_of(source)
    if log.tasks and tasks != log.tasks:
        raise DataError(
            f"{source.path}: the labels {tasks} differ from the log's {log.tasks}; name the log's labels in that order"
        )


def _refuse_other_kinds(table: str, source: Source, log: ExistingLog) -> None:
    """Refuse features whose kind is not that of the log's column."""
    known = log.row_values(EVENTS if table == "events" else IMPRESSIONS)
    for canonical in source.columns:
        kind, _, name = canonical.partition(":")
        if kind in ("category", "number") and name in known:
            in_log = "number" if known[name] is None else "category"
            if kind != in_log:
                key = "numbers" if in_log == "number" else "categories"
                raise DataError(
                    f"{source.path}: column {name!r} of the {table} is a {kind}, but in the log it is a {in_log}; name "
                    f"it under {table}.{key}, or give the column another name"
                )


def tasks_of(source: Source) -> list[str]:
    """Names of the labels of an impressions source."""
    return [name.split(":", 1)[1] for name in source.columns if name.startswith("label:")]


def id_kinds(source: Source, config: SourceConfig, log: ExistingLog | None) -> dict[str, str]:
    """Kinds of ids, "int" or "str", of "user" and "item": the log's, or else as configured or as in `source`.

    Raises:
        ConfigError: if the configured kind is not that of the log.
    """
    kinds = {}
    for name in ("user", "item"):
        wanted = str(getattr(config, f"{name}_ids").value)
        if log is None:
            kinds[name] = id_kind(source, name, wanted)
            continue
        kinds[name] = (log.users if name == "user" else log.items).kind
        if wanted not in ("auto", kinds[name]):
            raise ConfigError(
                f"events.{name}_ids={wanted}: the {name} ids of the log are {kinds[name]}; leave events.{name}_ids out"
            )
    return kinds
