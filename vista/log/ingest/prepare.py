"""`vista prepare`: source tables become one segment of an EventLog, out of core and atomically.

    sources -> parts, parsed and checked (rows.py) -> vocabularies -> packed tables (packer.py) -> manifest -> report

Everything is written into a folder next to the log, fsynced, and renamed into place: a run that fails leaves what was
there unchanged. The same files give the same bytes, whatever the number of threads, chunks or buckets.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config import EventFilterConfig, FeatureTableConfig, PrepareConfig, SourceConfig
from vista.config.checks import OnBadRows, choice_of
from vista.errors import ConfigError, DataError, LogBusyError, TakenError
from vista.files import checked_path
from vista.log.event_keys import obey_deletions
from vista.log.features import declared_columns, values_of
from vista.log.histories import YEAR_1971_MS, ColumnValues
from vista.log.ingest.feature_sources import features_of_frame
from vista.log.ingest.kafka_messages import MessageRows, write_dead_letters
from vista.log.ingest.new_features import NewFeatures, NewRowFeatures, write_features
from vista.log.ingest.packer import (
    BUCKET_EVENTS,
    NO_ACTION,
    DistinctIds,
    Packer,
    StageTimes,
    actions_of,
    event_columns,
    extended,
    filtered,
    impression_columns,
    time_range,
)
from vista.log.ingest.rows import Part, id_kind, read_part, write_quarantine
from vista.log.ingest.source_files import to_polars
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import (
    Source,
    frame_source,
    needed_columns,
    open_feature_tables,
    open_set_features,
    open_set_impressions,
    open_sources,
    with_kind,
)
from vista.log.segment import Segment, features_of, read_segments, read_vocabularies, segment_name
from vista.log.segment_files import (
    DEAD_LETTERS_FILE,
    EVENTS,
    IMPRESSIONS,
    ITEMS,
    MAX_FEATURES,
    OWNERS,
    QUARANTINE_FILE,
    USERS,
    FeatureOwner,
    offset_entries,
    stream_offsets,
)
from vista.log.segment_writer import SegmentWriter, TableWriter, locked_log, staged_folder, write_without_events
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar, ticking


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote, and how long each stage took.

    num_users and num_items count the whole log, the other numbers only the new segment. kept: how many rows a filter
    kept, as text; empty without one. first_ms, last_ms: oldest and newest time of the events, None in a log without
    times. features: a line per column of features of items and users. stages: seconds for open (with digests), read
    (parse, check, and filter), vocabularies, sort (join and sort), write, and sync (fsync and rename).
    """

    path: Path
    segment: int
    num_users: int
    num_items: int
    num_events: int
    num_impressions: int
    num_quarantined: int
    quarantine: Path | None
    kept: str
    first_ms: int | None
    last_ms: int | None
    features: list[str]
    stages: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Total time."""
        return sum(self.stages.values())

    @property
    def rows_per_second(self) -> float:
        """Good rows (events and impressions) divided by the total time."""
        return (self.num_events + self.num_impressions) / max(self.seconds, 1e-9)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the total time."""
        return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stages.items()}

    def __str__(self) -> str:
        times = "order only"
        if self.first_ms is not None and self.last_ms is not None:
            days = [datetime.fromtimestamp(ms / 1000, UTC).date().isoformat() for ms in (self.first_ms, self.last_ms)]
            times = f"{days[0]} to {days[1]}"
        content = f"{self.num_events:,} events ({times}) and {self.num_impressions:,} impressions"
        if not self.num_events:
            content = "features only"
        lines = [
            f"{self.path}: segment {self.segment} with {content}; the log has {self.num_users:,} users and "
            f"{self.num_items:,} items",
            f"{self.seconds:.2f} s, {self.rows_per_second:,.0f} rows/s: "
            + ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items()),
            *([self.kept] if self.kept else []),
            *(f"feature {line}" for line in self.features),
        ]
        if self.quarantine is not None:
            lines.append(f"{self.num_quarantined:,} bad rows set aside in {self.quarantine}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])


_LOG = logging.getLogger("vista.prepare")


def prepare(
    config: PrepareConfig, *, bucket_events: int = BUCKET_EVENTS, parser: SourceParser | None = None
) -> PrepareReport:
    """Ingest source files into a new EventLog, or with `append` into a new segment of an existing one.

    Args:
        bucket_events: rows without features that are sorted at once, about 150 bytes of memory each; it never changes
            the result. Of rows with features, as many are sorted as take the same memory.
        parser: reads the files, and stays open for other calls; None starts one, which takes about half a second.

    Raises:
        ConfigError: if the configuration is contradictory, or a timestamp has no unit.
        DataError: naming file, row, column, value and remedy; nothing is written then.
    """
    run = _Run(
        target=checked_path(config.out, ConfigError),
        append=config.append,
        on_bad_rows=config.on_bad_rows,
        event_filter=config.filter,
        bucket_events=bucket_events,
    )
    run.check_target()
    with SourceParser() if parser is None else nullcontext(parser) as files:
        for table in (config.items, config.users):
            if table is not None:
                run.add_features(table.table, open_feature_tables(table, files), is_inferred=table.is_inferred)
        if run.sources and config.append and not config.events.paths and config.impressions is None:
            return run.ingest()
        events = with_kind(config.events)
        run.add("events", events, open_sources(events, "events", files))
        for owner, given in (("items", config.items), ("users", config.users)):
            if given is None and (features := open_set_features(events, owner, files)):
                run.add_features(owner, features, is_inferred=False)
        if config.impressions is not None:
            run.add("impressions", config.impressions, open_sources(config.impressions, "impressions", files))
        elif shown := open_set_impressions(events, files):
            run.add("impressions", events, shown)
        return run.ingest()


def prepare_frames(
    tables: Mapping[str, tuple[Any, SourceConfig | FeatureTableConfig]],
    path: str | os.PathLike[str],
    *,
    on_bad_rows: OnBadRows | str = OnBadRows.error,
    append: bool = False,
    bucket_events: int = BUCKET_EVENTS,
) -> PrepareReport:
    """Ingest frames in memory as `prepare` ingests files.

    Args:
        tables: by table (items, users, events, impressions), a frame (pandas, Polars, or a mapping of columns), and its
            columns. Without events, features are appended to a log.
        bucket_events: see `prepare`.
    """
    run = _Run(
        target=checked_path(path, ConfigError),
        append=append,
        on_bad_rows=choice_of(OnBadRows, on_bad_rows, "on_bad_rows"),
        bucket_events=bucket_events,
    )
    run.check_target()
    for table, (frame, config) in tables.items():
        if not isinstance(config, SourceConfig):
            run.add_features(table, [features_of_frame(to_polars(frame), config)], is_inferred=True)
            continue
        if table == "impressions" and not config.labels:
            raise ConfigError("columns.labels: name at least one column of 0/1 labels")
        used = to_polars(frame, needed_columns(config).values())
        run.add(table, config, [frame_source(used, config, table)])
    return run.ingest()


def prepare_messages(rows: MessageRows, path: str | os.PathLike[str], *, events: SourceConfig) -> PrepareReport:
    """Append the events of messages to a log, together with their dead letters and the offsets after them.

    Args:
        events: names of the columns.

    Raises:
        ConfigError, DataError: if the events do not fit the log.
        LogBusyError: if another process is writing the log, or has appended these messages.
    """
    run = _Run(target=checked_path(path, ConfigError), append=True, on_bad_rows=OnBadRows.error, messages=rows)
    run.check_target()
    if rows.events is not None:
        run.add("events", events, [rows.events])
    return run.ingest()


@dataclass(frozen=True, slots=True)
class _OldLog:
    """The log before an ingest, whose segments are oldest first; a new log has no segments and no ids."""

    segments: Sequence[Segment]
    users: Vocabulary
    items: Vocabulary

    @classmethod
    def open(cls, path: Path) -> _OldLog:
        """Open the log in a folder.

        Raises:
            LogFormatError: if it is missing or damaged.
        """
        segments = read_segments(path)
        for segment in segments:
            segment.files.verify(large=False)  # A damaged id would be added to the log as a new one.
        return cls(obey_deletions(segments), *read_vocabularies(segments))

    @property
    def manifests(self) -> list[dict[str, Any]]:
        """The segments' manifests, oldest first."""
        return [segment.manifest for segment in self.segments]

    @property
    def last_segment(self) -> int:
        """Number of the newest segment; 0 without segments."""
        return self.segments[-1].last if self.segments else 0

    def names(self, field: str) -> list[str]:
        """The `actions` by code, or the `tasks` of impressions."""
        return list(self.manifests[-1][field]) if self.segments else []

    def values(self, owner: FeatureOwner) -> ColumnValues:
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
class _NewSegment:
    """What one run of ingest writes into a segment.

    log: without the segment; parts: by table, "events", "impressions", "items", and "users"; users, items, actions,
    tasks: of the log with this segment; time_range_ms: oldest and newest time of the events, None in a log without
    times.
    """

    log: _OldLog
    parts: Mapping[str, Sequence[Part]]
    users: Vocabulary
    items: Vocabulary
    actions: list[str]
    tasks: list[str]
    time_range_ms: tuple[int | None, int | None]

    @property
    def number(self) -> int:
        return self.log.last_segment + 1

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
        new_actions = self.actions[len(self.log.names("actions")) :]
        if self.log.segments and new_actions:
            warnings.append(
                f"the log has the new actions {', '.join(new_actions)}; models that use actions do not know them, so "
                "retrain these models before the next refresh"
            )
        return warnings


@dataclass(kw_only=True, slots=True)
class _Run:
    """One run of ingest: its settings, its sources and configs by table, and the time that each stage takes."""

    target: Path
    append: bool
    on_bad_rows: OnBadRows
    event_filter: EventFilterConfig = field(default_factory=EventFilterConfig)
    bucket_events: int = BUCKET_EVENTS
    messages: MessageRows | None = None
    """The messages that `sources` come from."""
    sources: dict[str, list[Source]] = field(default_factory=dict)
    configs: dict[str, SourceConfig] = field(default_factory=dict)
    times: StageTimes = field(default_factory=StageTimes)

    def check_target(self) -> None:
        """Refuse to append to nothing, and to overwrite anything."""
        target = self.target
        if self.append and not target.exists():
            raise DataError(f"{target}: no such log; leave append out to make one")
        if not self.append and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            raise DataError(
                f"{target}: already exists; add these sources to it with append=true, choose another folder, or remove "
                "this one first"
            )

    def add(self, table: str, config: SourceConfig, sources: Sequence[Source]) -> None:
        """Add the sources of "events" or "impressions"."""
        self.sources[table], self.configs[table] = list(sources), config

    def add_features(self, table: str, sources: Sequence[Source], *, is_inferred: bool) -> None:
        """Add the sources of "items" or "users"; if the types decided what features they are, say what that is."""
        self.sources[table] = list(sources)
        if is_inferred:
            kinds = [name.split(":", 1) for name in sources[0].columns if ":" in name]
            named = ", ".join(f"{name} ({kind})" for kind, name in kinds)
            _LOG.info("%s: features by the types of the columns: %s", sources[0].path, named)

    def ingest(self) -> PrepareReport:
        """Write the sources as one segment, and report it."""
        with self._locked_log() as log:
            _check_sources(self.sources, log)
            if log is not None and "events" not in self.sources:
                kinds = {"user": log.users.kind, "item": log.items.kind}
            else:
                kinds = _id_kinds(self.sources["events"][0], self.configs["events"], log)
            if log is None:
                log = _OldLog((), Vocabulary.empty(kinds["user"]), Vocabulary.empty(kinds["item"]))
            name = segment_name(log.last_segment + 1)
            self.times.lap("open")
            # A new log appears together with its first segment, by one rename.
            with staged_folder(self.target / name if self.append else self.target) as staging:
                folder = staging if self.append else staging / name
                folder.mkdir(exist_ok=True)
                scratch = staging / "scratch"
                scratch.mkdir()
                parts, kept = filtered(self._read_parts(kinds, scratch), self.event_filter)
                self.times.lap("read")
                segment, features = self._write_segment(log, parts, folder, scratch)
                shutil.rmtree(scratch)
                self.times.lap("write")
            self.times.lap("sync")
        return self._report(segment, features, self.target / name / QUARANTINE_FILE, kept)

    @contextmanager
    def _locked_log(self) -> Iterator[_OldLog | None]:
        """The log to extend, locked against other writers; None for a new log.

        Raises:
            LogBusyError: if another process is writing it, or has appended the messages since they were read.
        """
        if not self.append:
            yield None
            return
        with locked_log(self.target):
            log = _OldLog.open(self.target)
            if self.messages is not None and not self.messages.batch.continues(stream_offsets(log.manifests)):
                raise LogBusyError(
                    f"{self.target}: another process appended messages of {self.messages.batch.source}; run one watch "
                    "per topic and log"
                )
            yield log

    def _read_parts(self, kinds: Mapping[str, str], scratch: Path) -> dict[str, list[Part]]:
        """Parse and check every source."""
        total = sum(source.size for files in self.sources.values() for source in files)
        parts: dict[str, list[Part]] = {}
        with (
            progress_bar(total=total, desc="read", unit="B", unit_scale=True) as bar,
            ticking(bar),
        ):
            for table, files in self.sources.items():
                parts[table] = []
                for number, source in enumerate(files):
                    parts[table].append(read_part(source, kinds, table, scratch, number, self.on_bad_rows))
                    bar.update(source.size)
        return parts

    def _write_segment(
        self, log: _OldLog, parts: Mapping[str, Sequence[Part]], folder: Path, scratch: Path
    ) -> tuple[_NewSegment, list[NewFeatures]]:
        """Write vocabularies, packed tables, features, quarantined rows and manifest."""
        writer = SegmentWriter(folder)
        events = parts.get("events")
        ids = {table: DistinctIds.of(of_table) for table, of_table in parts.items() if table not in OWNERS}
        actions = log.names("actions")
        segment = _NewSegment(
            log=log,
            parts=parts,
            users=extended(log.users, [of_table.users["user"] for of_table in ids.values()]),
            items=extended(log.items, [of_table.items["item"] for of_table in ids.values()]),
            actions=actions if events is None else actions_of(events, actions),
            tasks=_tasks_of(parts["impressions"][0].source) if "impressions" in parts else log.names("tasks"),
            time_range_ms=(None, None) if events is None else time_range(events),
        )
        of_rows: dict[str, NewFeatures] = {}
        if events is not None:
            writer.save_vocabulary("new_users", segment.users.part(len(log.users)))
            writer.save_vocabulary("new_items", segment.items.part(len(log.items)))
            self.times.lap("vocabularies")
            active_users, of_rows = self._pack_tables(segment, ids, writer, scratch)
            fields = segment.manifest(active_users, {table: features.columns for table, features in of_rows.items()})
        else:
            fields = write_without_events(writer, log.manifests[-1], log.users, log.items)
        of_items, of_users = (
            write_features(owner, parts.get(owner.table, ()), vocabulary, log.segments, writer, scratch)
            for owner, vocabulary in ((ITEMS, segment.items), (USERS, segment.users))
        )
        if segment.num_bad:
            write_quarantine([part for of_table in parts.values() for part in of_table], folder / QUARANTINE_FILE)
        what_is_new = {
            ITEMS.field: of_items.columns,
            USERS.field: of_users.columns,
            "quarantined": segment.num_bad,
            "sources": segment.sources(),
        }
        if self.messages is not None:
            letters = self.messages.letters
            # Offsets identify messages, so that there is no entry per batch in the manifest of a compacted log.
            offsets = offset_entries(self.messages.batch.offsets)
            what_is_new |= {"quarantined": len(letters), "sources": [], "offsets": offsets}
            if letters:
                write_dead_letters(letters, folder / DEAD_LETTERS_FILE)
        writer.write_manifest(fields | what_is_new)
        return segment, [*of_rows.values(), of_items, of_users]

    def _pack_tables(
        self, segment: _NewSegment, ids: Mapping[str, DistinctIds], writer: SegmentWriter, scratch: Path
    ) -> tuple[dict[str, int], dict[str, NewFeatures]]:
        """Write the packed tables; returns the number of users with rows in each, and the features of its rows."""
        num_rows = sum(segment.num_rows(table) for table in ids)
        active_users, of_rows = {}, {}
        with progress_bar(total=num_rows, desc="write", unit="row", unit_scale=True) as bar:
            packer = Packer(
                scratch=scratch, bucket_events=self.bucket_events, times=self.times, on_rows_written=bar.update
            )
            for table in ids:
                parts = segment.parts[table]
                if table == "events":
                    owner, columns = EVENTS, event_columns(parts[0].source, segment.actions, segment.log.next_ordinals)
                else:
                    owner, columns = IMPRESSIONS, impression_columns(parts[0].source, segment.tasks)
                features = NewRowFeatures(owner, parts, segment.log.values(owner), writer)
                active_users[table] = packer.pack(
                    parts,
                    ids[table].user_rows(segment.users),
                    ids[table].item_rows(segment.items),
                    columns,
                    TableWriter(writer, owner.prefix or "", segment.num_rows(table), columns.types),
                    features,
                )
                of_rows[table] = features.written()
        return active_users, of_rows

    def _report(
        self, segment: _NewSegment, features: Sequence[NewFeatures], quarantine: Path, kept: str
    ) -> PrepareReport:
        first_ms, last_ms = segment.time_range_ms
        report = PrepareReport(
            path=self.target,
            segment=segment.number,
            num_users=len(segment.users),
            num_items=len(segment.items),
            num_events=segment.num_rows("events"),
            num_impressions=segment.num_rows("impressions"),
            num_quarantined=segment.num_bad,
            quarantine=quarantine if segment.num_bad else None,
            kept=kept,
            first_ms=first_ms,
            last_ms=last_ms,
            features=[line for written in features for line in written.lines],
            stages=dict(self.times),
            warnings=[
                *segment.warnings(),
                # A batch of messages is too small to say anything about features.
                *(warning for written in features if self.messages is None for warning in written.warnings),
            ],
        )
        for warning in report.warnings:
            _LOG.warning("%s: %s", self.target, warning)
        return report


def _check_sources(sources: Mapping[str, Sequence[Source]], log: _OldLog | None) -> None:
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
        if table in OWNERS:
            continue
        if log is not None and table == "events":
            _refuse_other_events(files[0], log)
        elif log is not None:
            _refuse_other_tasks(files[0], log)
        num_features = sum(name.startswith(("category:", "number:")) for name in files[0].columns)
        if num_features > MAX_FEATURES:
            raise ConfigError(
                f"{table}.categories, {table}.numbers: name {num_features:,} columns, but at most {MAX_FEATURES:,} are "
                "possible; name fewer"
            )
        if log is not None:
            _refuse_other_kinds(table, files[0], log)
    with_times = [files[0] for table, files in sources.items() if table not in OWNERS]
    if "impressions" in sources and any("timestamp" not in source.columns for source in with_times):
        raise ConfigError("impressions need times, and so do their events; set timestamp for both tables")


def _refuse_repeated_content(table: str, files: Sequence[Source], log: _OldLog | None) -> None:
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


def _refuse_other_events(source: Source, log: _OldLog) -> None:
    newest = log.manifests[-1]
    for name, in_log in (("timestamp", newest["has_time"]), ("rating", newest["has_rating"])):
        if (name in source.columns) != in_log:
            remedy = (
                f"name their column with events.{name}=..." if in_log else f"leave them out with events.{name}=null"
            )
            raise DataError(f"{source.path}: the log has {'' if in_log else 'no '}{name}s; {remedy}")
    actions = log.names("actions")
    if actions != [NO_ACTION] and "action" not in source.columns:
        raise DataError(
            f"{source.path}: the log has the actions {', '.join(actions)}; name their column with events.action=..."
        )


def _refuse_other_tasks(source: Source, log: _OldLog) -> None:
    tasks, in_log = _tasks_of(source), log.names("tasks")
    if in_log and tasks != in_log:
        raise DataError(
            f"{source.path}: the labels {tasks} differ from the log's {in_log}; name the log's labels in that order"
        )


def _refuse_other_kinds(table: str, source: Source, log: _OldLog) -> None:
    """Refuse features whose kind is not that of the log's column."""
    known = log.values(EVENTS if table == "events" else IMPRESSIONS)
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


def _tasks_of(source: Source) -> list[str]:
    """Names of the labels of an impressions source."""
    return [name.split(":", 1)[1] for name in source.columns if name.startswith("label:")]


def _id_kinds(source: Source, config: SourceConfig, log: _OldLog | None) -> dict[str, str]:
    """Kinds of ids, "int" or "str", of "user" and "item": the log's, or else as configured or as in `source`.

    Raises:
        ConfigError: if the configured kind is not that of the log.
    """
    kinds, wanted = {}, str(config.ids.value)
    for name in ("user", "item"):
        if log is None:
            kinds[name] = id_kind(source, name, wanted)
            continue
        kinds[name] = (log.users if name == "user" else log.items).kind
        if wanted not in ("auto", kinds[name]):
            raise ConfigError(f"events.ids={wanted}: the {name} ids of the log are {kinds[name]}; leave events.ids out")
    return kinds
