"""`vista prepare`: source tables become one segment of an EventLog, out of core and atomically.

    sources -> parts, parsed and checked (rows.py) -> vocabularies -> packed tables (packer.py) -> manifest -> report

Everything is written into a folder next to the log, fsynced, and renamed into place: a run that fails leaves what was
there unchanged. The same files give the same bytes, whatever the number of threads, chunks or buckets.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from vista.arrays import Int
from vista.config import EventFilterConfig, FeatureTableConfig, FromEventsConfig, PrepareConfig, SourceConfig
from vista.config.checks import OnBadRows, choice_of
from vista.errors import ConfigError, DataError, LogBusyError, TakenError
from vista.files import checked_path
from vista.log.event_keys import obey_deletions
from vista.log.features import declared_columns, values_of
from vista.log.histories import YEAR_1971_MS, rows_that_fit
from vista.log.ingest.column_guess import settings_of, with_earlier_settings, with_guesses
from vista.log.ingest.feature_sources import features_of_frame
from vista.log.ingest.kafka_messages import MessageRows, write_dead_letters
from vista.log.ingest.made_impressions import MadeImpressions, check_as_events, check_labels, events_of_impressions
from vista.log.ingest.new_features import NewFeatures, NewRowFeatures, write_features
from vista.log.ingest.packer import (
    BUCKET_EVENTS,
    NO_ACTION,
    SORTED_ROW_BYTES,
    USER_ROW,
    DistinctIds,
    actions_of,
    distinct_ids,
    event_columns,
    extended,
    filtered,
    impression_columns,
    sorted_blocks,
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
    tasks_of,
    with_kind,
)
from vista.log.ingest.times import infer_form
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
    offset_entries,
    stream_offsets,
)
from vista.log.segment_writer import (
    SegmentWriter,
    TableWriter,
    locked_log,
    staged_folder,
    sync_name,
    write_without_events,
)
from vista.log.vocabulary import Vocabulary
from vista.progress_bar import progress_bar, ticking


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote, and how long each stage took.

    num_users and num_items count the whole log, the other numbers only the new segment. kept: how many rows a filter
    kept, as text; empty without one. first_ms, last_ms: oldest and newest time of the events, None in a log without
    times. features: a line per column of features of items and users. labels: a line per label of impressions that were
    made from events. stages: seconds for open (with digests), read (parse, check, and filter), vocabularies, sort (join
    and sort), write, and sync (fsync and rename).
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
    labels: list[str]
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
            *self.labels,
            *(f"feature {line}" for line in self.features),
        ]
        if self.quarantine is not None:
            lines.append(f"{self.num_quarantined:,} bad rows set aside in {self.quarantine}")
        return "\n".join(lines)


class StageTimes(dict[str, float]):
    """Seconds per stage; `lap` adds the time since the previous lap."""

    def __init__(self) -> None:
        super().__init__(dict.fromkeys(("open", "read", "vocabularies", "sort", "write", "sync"), 0.0))
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Add the seconds since the previous lap, or since the start, to `stage`."""
        now = time.perf_counter()
        self[stage] += now - self._last
        self._last = now


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
    run = _Ingest(
        target=checked_path(config.out, ConfigError),
        append=config.append,
        on_bad_rows=config.on_bad_rows,
        event_filter=config.filter,
        bucket_events=bucket_events,
    )
    with SourceParser() if parser is None else nullcontext(parser) as files:
        for table in (config.items, config.users):
            if table is not None:
                run.add_features(table.table, open_feature_tables(table, files), is_inferred=table.is_inferred)
        table_of_events = config.events
        if config.append and (config.files or config.events.paths):
            table_of_events = with_earlier_settings(table_of_events, run.target)
        if config.files:
            table_of_events = with_guesses(table_of_events, config.files, files)
        if run.sources and config.append and not table_of_events.paths and config.impressions is None:
            return run.write()
        events = run.events = with_kind(table_of_events)
        run.sources["events"] = open_sources(events, "events", files)
        for owner, given in (("items", config.items), ("users", config.users)):
            if given is None and (features := open_set_features(events, owner, files)):
                run.add_features(owner, features, is_inferred=False)
        asked = config.impressions
        if asked is not None:
            run.from_events, run.as_events = asked.from_events, asked.as_events
        if asked is None or (asked.as_events is not None and not asked.paths):
            if shown := open_set_impressions(events, files):
                run.sources["impressions"] = shown
        elif asked.from_events is None:
            run.sources["impressions"] = open_sources(asked.files(), "impressions", files)
        return run.write()


def prepare_frames(
    tables: Mapping[str, tuple[Any, SourceConfig | FeatureTableConfig]],
    path: str | os.PathLike[str],
    *,
    on_bad_rows: OnBadRows | str = OnBadRows.error,
    append: bool = False,
    from_events: FromEventsConfig | None = None,
    as_events: str | None = None,
    bucket_events: int = BUCKET_EVENTS,
) -> PrepareReport:
    """Ingest frames in memory as `prepare` ingests files.

    Args:
        tables: by table (items, users, events, impressions), a frame (pandas, Polars, or a mapping of columns), and its
            columns. Without events, features are appended to a log.
        from_events: labels of impressions that are made from the events.
        as_events: the label whose impressions become events.
        bucket_events: see `prepare`.
    """
    run = _Ingest(
        target=checked_path(path, ConfigError),
        append=append,
        on_bad_rows=choice_of(OnBadRows, on_bad_rows, "on_bad_rows"),
        from_events=from_events,
        as_events=as_events,
        bucket_events=bucket_events,
    )
    for table, (frame, config) in tables.items():
        if not isinstance(config, SourceConfig):
            run.add_features(table, [features_of_frame(to_polars(frame), config)], is_inferred=True)
            continue
        if table == "impressions" and not config.labels:
            raise ConfigError("columns.labels: name at least one column of 0/1 labels")
        used = to_polars(frame, needed_columns(config).values())
        run.sources[table] = [frame_source(used, config, table)]
        if table == "events":
            run.events = config
    return run.write()


def prepare_messages(rows: MessageRows, path: str | os.PathLike[str], *, events: SourceConfig) -> PrepareReport:
    """Append the events of messages to a log, together with their dead letters and the offsets after them.

    Args:
        events: names of the columns.

    Raises:
        ConfigError, DataError: if the events do not fit the log.
        LogBusyError: if another process is writing the log, or has appended these messages.
    """
    target = checked_path(path, ConfigError)
    run = _Ingest(target=target, append=True, on_bad_rows=OnBadRows.error, messages=rows, events=events)
    if rows.events is not None:
        run.sources["events"] = [rows.events]
    return run.write()


@dataclass(kw_only=True, slots=True)
class _Ingest:
    """One segment that is being made: the settings, the sources by table, and what is known of the segment so far."""

    target: Path
    append: bool
    on_bad_rows: OnBadRows
    event_filter: EventFilterConfig = field(default_factory=EventFilterConfig)
    from_events: FromEventsConfig | None = None
    """Labels of impressions that are made from the events."""
    as_events: str | None = None
    """The label whose impressions become events; None for that of earlier ones in the log, if there are any."""
    bucket_events: int = BUCKET_EVENTS
    messages: MessageRows | None = None
    """The messages that `sources` come from."""
    sources: dict[str, Sequence[Source]] = field(default_factory=dict)
    events: SourceConfig | None = None
    """How the events are read."""
    times: StageTimes = field(default_factory=StageTimes)
    before: Sequence[Segment] = field(init=False, default=())
    """The log's segments, oldest first; none in a new log."""
    parts: dict[str, list[Part]] = field(init=False)
    """By table: events, impressions, items, users."""
    users: Vocabulary = field(init=False)
    """Of the log, at first without and then with this segment, as are `items`, `actions`, and `tasks`."""
    items: Vocabulary = field(init=False)
    actions: list[str] = field(init=False, default_factory=list)
    tasks: list[str] = field(init=False, default_factory=list)
    inferred: list[str] = field(init=False, default_factory=list)
    """What was inferred of times, and why."""
    made: MadeImpressions | None = field(init=False, default=None)
    """Impressions that were made from the events."""
    time_range_ms: tuple[int | None, int | None] = (None, None)
    """Oldest and newest time of the events; (None, None) in a log without times."""

    def __post_init__(self) -> None:
        """Refuse to append to a missing log, or to overwrite anything. An existing log's name is made durable first."""
        target = self.target
        if self.append and not target.exists():
            raise DataError(f"{target}: no such log; leave append out to make one")
        if not self.append and target.exists() and not (target.is_dir() and not any(target.iterdir())):
            sync_name(target)
            raise DataError(
                f"{target}: already exists; add these sources to it with append=true, choose another folder, or remove "
                "this one first"
            )

    def add_features(self, table: str, sources: Sequence[Source], *, is_inferred: bool) -> None:
        """Add the sources of "items" or "users"; if the types decided what features they are, say what that is."""
        self.sources[table] = sources
        if is_inferred:
            kinds = [name.split(":", 1) for name in sources[0].columns if ":" in name]
            named = ", ".join(f"{name} ({kind})" for kind, name in kinds)
            _LOG.info("%s: features by the types of the columns: %s", sources[0].path, named)

    @property
    def number(self) -> int:
        return self.before[-1].last + 1 if self.before else 1

    def num_rows(self, table: str) -> int:
        """Good rows of a table, or impressions that were made; 0 without the table."""
        if table == "impressions" and self.made is not None:
            return self.made.num_rows
        return sum(part.num_rows for part in self.parts.get(table, ()))

    @property
    def num_bad(self) -> int:
        """Bad rows of all tables."""
        return sum(part.num_bad for parts in self.parts.values() for part in parts)

    def write(self) -> PrepareReport:
        """Write the sources as one segment, and report it."""
        with locked_log(self.target) if self.append else nullcontext():
            if self.append:
                self._open_log()
            _check_sources(self.sources, self.before)
            if self.from_events is not None:
                check_labels(self.from_events, self.sources.get("events", ()), self.tasks)
            self._fix_as_events()
            self._fix_id_kinds()
            self._fix_times()
            name = segment_name(self.number)
            self.times.lap("open")
            # A new log appears together with its first segment, by one rename.
            with staged_folder(self.target / name if self.append else self.target) as staging:
                folder = staging if self.append else staging / name
                folder.mkdir(exist_ok=True)
                scratch = staging / "scratch"
                scratch.mkdir()
                self.parts, kept = filtered(self._read_parts(scratch), self.event_filter)
                shown = self.parts.get("impressions", [])
                if self.as_events is not None and (shown or not self.before):
                    self.parts["events"] += events_of_impressions(shown, self.parts["events"], self.as_events)
                self.times.lap("read")
                features = self._write_segment(SegmentWriter(folder), scratch)
                shutil.rmtree(scratch)
                self.times.lap("write")
            self.times.lap("sync")
        report = PrepareReport(
            path=self.target,
            segment=self.number,
            num_users=len(self.users),
            num_items=len(self.items),
            num_events=self.num_rows("events"),
            num_impressions=self.num_rows("impressions"),
            num_quarantined=self.num_bad,
            quarantine=self.target / name / QUARANTINE_FILE if self.num_bad else None,
            kept=kept,
            first_ms=self.time_range_ms[0],
            last_ms=self.time_range_ms[1],
            features=[line for written in features for line in written.lines],
            labels=self.made.lines() if self.made is not None else [],
            stages=dict(self.times),
            warnings=self._warnings(features),
        )
        for warning in report.warnings:
            _LOG.warning("%s: %s", self.target, warning)
        return report

    def _open_log(self) -> None:
        """Open the log to extend, which is locked."""
        segments = read_segments(self.target)
        for segment in segments:
            segment.files.verify(large=False)  # A damaged id would be added to the log as a new one.
        stored = stream_offsets(segment.manifest for segment in segments)
        if self.messages is not None and not self.messages.batch.continues(stored):
            raise LogBusyError(
                f"{self.target}: another process appended messages of {self.messages.batch.source}; run one watch "
                "per topic and log"
            )
        self.before = obey_deletions(segments)
        self.users, self.items = read_vocabularies(segments)
        self.actions, self.tasks = (list(segments[-1].manifest[name]) for name in ("actions", "tasks"))

    def _fix_id_kinds(self) -> None:
        """Check the configured kinds of ids, which, or else those in the events, are the kinds of a new log."""
        if self.events is None or "events" not in self.sources:
            return
        wanted = str(self.events.ids.value)
        if not self.before:
            self.users, self.items = (
                Vocabulary.empty(id_kind(self.sources["events"][0], name, wanted)) for name in ("user", "item")
            )
        for name, known in (("user", self.users), ("item", self.items)):
            if wanted not in ("auto", known.kind):
                raise ConfigError(
                    f"events.ids={wanted}: the {name} ids of the log are {known.kind}; leave events.ids out"
                )

    def _fix_as_events(self) -> None:
        """Check what impressions become events by: the given label, or that of the log's earlier impressions."""
        if self.before and self.before[-1].manifest["tasks"] and "impressions" in self.sources:
            known, asked = self.before[-1].manifest["as_events"], self.as_events
            if asked not in (None, known):
                are = "are not events" if known is None else f"are events by {known}"
                raise ConfigError(
                    f"impressions.as_events={asked}: impressions that the log already has {are}; leave this out, or "
                    "prepare a new log"
                )
            self.as_events = known
        if self.as_events is not None:
            check_as_events(self.as_events, self.sources)

    def _fix_times(self) -> None:
        """Infer the form of times that are text and have none."""
        for table, files in self.sources.items():
            if table in OWNERS or "timestamp" not in files[0].columns or files[0].time_form is not None:
                continue
            if (inferred := infer_form(files, table)) is not None:
                self.sources[table] = [replace(source, time_form=inferred.form) for source in files]
                if inferred.why:
                    self.inferred.append(f"{table}: {inferred.why}")

    def _read_parts(self, scratch: Path) -> dict[str, list[Part]]:
        """Parse and check every source."""
        kinds = {"user": self.users.kind, "item": self.items.kind}
        total = sum(source.size for files in self.sources.values() for source in files)
        parts: dict[str, list[Part]] = {}
        with progress_bar(total=total, desc="read", unit="B", unit_scale=True) as bar, ticking(bar):
            for table, files in self.sources.items():
                parts[table] = []
                for number, source in enumerate(files):
                    parts[table].append(read_part(source, kinds, table, scratch, number, self.on_bad_rows))
                    bar.update(source.size)
        return parts

    def _write_segment(self, writer: SegmentWriter, scratch: Path) -> list[NewFeatures]:
        """Write vocabularies, packed tables, features, quarantined rows and manifest; returns the features."""
        events, users, items = self.parts.get("events"), self.users, self.items
        ids = {table: distinct_ids(parts) for table, parts in self.parts.items() if table not in OWNERS}
        self.users = extended(users, [of_table["user"] for of_table, _ in ids.values()])
        self.items = extended(items, [of_table["item"] for _, of_table in ids.values()])
        if "impressions" in self.parts:
            self.tasks = tasks_of(self.parts["impressions"][0].source)
        elif self.from_events is not None:
            self.tasks = self.from_events.tasks
        of_rows: list[NewFeatures] = []
        if events is not None:
            self.actions = actions_of(events, self.actions)
            self.time_range_ms = time_range(events)
            writer.save_vocabulary("new_users", self.users.part(len(users)))
            writer.save_vocabulary("new_items", self.items.part(len(items)))
            self.times.lap("vocabularies")
            fields, of_rows = self._pack_tables(ids, writer, scratch)
        else:
            fields = write_without_events(writer, self.before[-1].manifest, users, items)
        of_items, of_users = (
            write_features(owner, self.parts.get(owner.table, ()), vocabulary, self.before, writer, scratch)
            for owner, vocabulary in ((ITEMS, self.items), (USERS, self.users))
        )
        if self.num_bad:
            write_quarantine([part for parts in self.parts.values() for part in parts], writer.folder / QUARANTINE_FILE)
        fields |= {
            ITEMS.field: of_items.columns,
            USERS.field: of_users.columns,
            "quarantined": self.num_bad,
            "sources": [
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
            ],
        }
        if self.messages is not None:
            letters = self.messages.letters
            # Offsets identify messages, so that there is no entry per batch in the manifest of a compacted log.
            offsets = offset_entries(self.messages.batch.offsets)
            fields |= {"quarantined": len(letters), "sources": [], "offsets": offsets}
            if letters:
                write_dead_letters(letters, writer.folder / DEAD_LETTERS_FILE)
        writer.write_manifest(fields)
        return [*of_rows, of_items, of_users]

    def _pack_tables(
        self, ids: Mapping[str, DistinctIds], writer: SegmentWriter, scratch: Path
    ) -> tuple[dict[str, Any], list[NewFeatures]]:
        """Write the packed tables; returns the manifest's entries (segment.py), except for features of items and users.
        `ids`: by table, its `distinct_ids`."""
        active_users, of_rows = {}, {}
        num_rows = sum(self.num_rows(table) for table in ids)
        if self.from_events is not None:
            source, end = self.parts["events"][0].source, self.time_range_ms[1]
            assert end is not None  # `check_labels` has checked
            self.made = MadeImpressions(self.from_events, source, self.actions, end, scratch)
        with progress_bar(total=num_rows, desc="write", unit="row", unit_scale=True) as bar:
            for table in ids:
                parts = self.parts[table]
                if table == "events":
                    owner = EVENTS
                    types, columns_of = event_columns(
                        parts[0].source, self.actions, lambda: _next_ordinals(self.before)
                    )
                else:
                    owner = IMPRESSIONS
                    types, columns_of = impression_columns(parts[0].source, self.tasks)
                features = NewRowFeatures(
                    owner, parts, values_of(declared_columns(features_of(self.before, owner))), writer
                )
                rows = TableWriter(writer, owner.prefix or "", self.num_rows(table), types)
                for block in sorted_blocks(
                    [features.rows(part) for part in parts],
                    ids[table],
                    (self.users, self.items),
                    rows_that_fit(self.bucket_events, SORTED_ROW_BYTES, features.num_columns),
                    scratch,
                ):
                    self.times.lap("sort")
                    rows.append(block[USER_ROW].to_numpy(), columns_of(block))
                    features.append(block)
                    if self.made is not None:
                        self.made.add(block)
                    self.times.lap("write")
                    bar.update(block.height)
                features.close()
                active_users[table] = rows.close()
                of_rows[table] = features.written()
        if self.made is not None:
            active_users["impressions"] = self.made.write(writer)
        has_time = self.time_range_ms != (None, None)
        before = self.before[-1].manifest if self.before else {}
        return {
            "first_segment": self.number,
            "last_segment": self.number,
            "num_users": len(self.users),
            "num_items": len(self.items),
            "id_types": {"users": self.users.kind, "items": self.items.kind},
            "actions": self.actions,
            "tasks": self.tasks,
            "again_days": (self.from_events and self.from_events.again_days) or before.get("again_days"),
            "as_events": self.as_events or before.get("as_events"),
            "has_time": has_time,
            "timestamp": "milliseconds since 1970-01-01 UTC" if has_time else "ordinal of the event in its history",
            "has_rating": "rating" in self.parts["events"][0].source.columns,
            "read_with": settings_of(self.events, self.sources["events"][0].time_form) or before.get("read_with", {}),
            "counts": {
                owner.table: {"rows": self.num_rows(owner.table), "users": active_users.get(owner.table, 0)}
                for owner in (EVENTS, IMPRESSIONS)
            },
            **{
                owner.field: of_rows[owner.table].columns if owner.table in of_rows else []
                for owner in (EVENTS, IMPRESSIONS)
            },
            "deletions": 0,
            "offsets": [],
        }, list(of_rows.values())

    def _warnings(self, features: Sequence[NewFeatures]) -> list[str]:
        """What is allowed, but is probably a mistake or needs another step."""
        warnings = list(self.inferred)
        newest = self.time_range_ms[1]
        chooses_unit = self.events is not None and self.events.kind == "table"
        if chooses_unit and newest is not None and newest < YEAR_1971_MS:
            warnings.append(
                "all times are before 1971; check events.time_unit, in case seconds were read as milliseconds"
            )
        if self.before and (new_actions := self.actions[len(self.before[-1].manifest["actions"]) :]):
            warnings.append(
                f"the log has the new actions {', '.join(new_actions)}; models that use actions do not know them, so "
                "retrain these models before the next refresh"
            )
        if self.messages is None:  # a batch of messages is too small to say anything about features
            warnings += [warning for written in features for warning in written.warnings]
        return warnings


def _next_ordinals(segments: Sequence[Segment]) -> Int:
    """In a log without times: one more than the last ordinal of each user, int64 [num_users]."""
    following = np.zeros(segments[-1].manifest["num_users"] if segments else 0, np.int64)
    for events in (segment.events for segment in segments):
        has = np.flatnonzero(np.diff(events.offsets))
        last = events.columns["timestamp"][events.places(events.offsets[has + 1] - 1)]
        following[events.users[has]] = np.maximum(following[events.users[has]], last + 1)
    return following


def _check_sources(sources: Mapping[str, Sequence[Source]], log: Sequence[Segment]) -> None:
    """Refuse sources that the log already contains, that differ in their columns, or that do not match the log.

    Args:
        sources: by table: "events", "impressions", "items", "users".
        log: segments of the log to extend, oldest first; none for a new one.
    """
    for table, files in sources.items():
        # Features may be given again: they replace what came in between.
        _refuse_repeated_content(table, files, () if table in OWNERS else log)
        first = files[0]
        for source in files:
            if set(source.columns) != set(first.columns):
                raise DataError(
                    f"{source.path}: has the columns {', '.join(source.columns)}, but {first.path} has "
                    f"{', '.join(first.columns)}; prepare files with different columns separately"
                )
        if table in OWNERS:
            continue
        num_features = sum(name.startswith(("category:", "number:")) for name in first.columns)
        if num_features > MAX_FEATURES:
            raise ConfigError(
                f"{table}.categories, {table}.numbers: name {num_features:,} columns, but at most {MAX_FEATURES:,} are "
                "possible; name fewer"
            )
        if log:
            _refuse_other_columns(table, first, log)
    with_times = [files[0] for table, files in sources.items() if table not in OWNERS]
    if "impressions" in sources and any("timestamp" not in source.columns for source in with_times):
        raise ConfigError("impressions need times, and so do their events; set timestamp for both tables")


def _refuse_repeated_content(table: str, files: Sequence[Source], log: Sequence[Segment]) -> None:
    where_taken: dict[str, str] = {}
    for manifest in (segment.manifest for segment in log):
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


def _refuse_other_columns(table: str, source: Source, log: Sequence[Segment]) -> None:
    """Refuse events or impressions whose columns are not those of the log, or have features of other kinds."""
    newest = log[-1].manifest
    if table == "events":
        for name, in_log in (("timestamp", newest["has_time"]), ("rating", newest["has_rating"])):
            if (name in source.columns) != in_log:
                remedy = (
                    f"name their column with events.{name}=..." if in_log else f"leave them out with events.{name}=null"
                )
                raise DataError(f"{source.path}: the log has {'' if in_log else 'no '}{name}s; {remedy}")
        if newest["actions"] != [NO_ACTION] and "action" not in source.columns:
            raise DataError(
                f"{source.path}: the log has the actions {', '.join(newest['actions'])}; name their column with "
                "events.action=..."
            )
    elif newest["tasks"] and tasks_of(source) != newest["tasks"]:
        raise DataError(
            f"{source.path}: the labels {tasks_of(source)} differ from the log's {newest['tasks']}; name the log's "
            "labels in that order"
        )
    known = values_of(declared_columns(features_of(log, EVENTS if table == "events" else IMPRESSIONS)))
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
