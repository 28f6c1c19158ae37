"""`vista prepare`: source tables become one segment of an EventLog, out of core and atomically.

    sources -> parts, parsed and checked (parts.py) -> vocabularies -> packed tables (packer.py) -> manifest -> report

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

from vista.config import EventFilterConfig, FeatureTableConfig, PrepareConfig, SourceConfig
from vista.config.choices import OnBadRows, choice_of
from vista.errors import ConfigError, DataError, LogBusyError
from vista.files import checked_path
from vista.log.ingest.feature_sources import features_of_frame
from vista.log.ingest.kafka_messages import MessageRows, write_dead_letters
from vista.log.ingest.new_features import NewFeatures, NewRowFeatures, write_features
from vista.log.ingest.new_segment import ExistingLog, NewSegment, check_sources, id_kinds, tasks_of
from vista.log.ingest.packer import (
    BUCKET_EVENTS,
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
from vista.log.ingest.rows import Part, read_part, write_quarantine
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
from vista.log.segment import segment_name
from vista.log.segment_files import (
    DEAD_LETTERS_FILE,
    EVENTS,
    IMPRESSIONS,
    ITEMS,
    OWNERS,
    QUARANTINE_FILE,
    USERS,
    offset_entries,
    stream_offsets,
)
from vista.log.segment_writer import SegmentWriter, TableWriter, locked_log, staged_folder, write_without_events
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
        progress=config.progress,
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


@dataclass(kw_only=True, slots=True)
class _Run:
    """One run of ingest: its settings, its sources and configs by table, and the time that each stage takes."""

    target: Path
    append: bool
    on_bad_rows: OnBadRows
    event_filter: EventFilterConfig = field(default_factory=EventFilterConfig)
    bucket_events: int = BUCKET_EVENTS
    progress: bool = False
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
            self._check_offsets(log)
            check_sources(self.sources, log)
            if log is not None and "events" not in self.sources:
                kinds = {"user": log.users.kind, "item": log.items.kind}
            else:
                kinds = id_kinds(self.sources["events"][0], self.configs["events"], log)
            before = log or ExistingLog.empty(kinds)
            name = segment_name(before.last_segment + 1)
            self.times.lap("open")
            # A new log appears together with its first segment, by one rename.
            with staged_folder(self.target / name if self.append else self.target) as staging:
                folder = staging if self.append else staging / name
                folder.mkdir(exist_ok=True)
                scratch = staging / "scratch"
                scratch.mkdir()
                parts, kept = filtered(self._read_parts(kinds, scratch), self.event_filter)
                self.times.lap("read")
                segment, features = self._write_segment(before, parts, folder, scratch)
                shutil.rmtree(scratch)
                self.times.lap("write")
            self.times.lap("sync")
        return self._report(segment, features, self.target / name / QUARANTINE_FILE, kept)

    @contextmanager
    def _locked_log(self) -> Iterator[ExistingLog | None]:
        """The log to extend, locked against other writers; None for a new log."""
        if not self.append:
            yield None
            return
        with locked_log(self.target):
            yield ExistingLog.open(self.target)

    def _check_offsets(self, log: ExistingLog | None) -> None:
        """Refuse messages that another process has appended since they were read."""
        if log is not None and self.messages is not None:
            batch = self.messages.batch
            if not batch.continues(stream_offsets(log.manifests)):
                raise LogBusyError(
                    f"{self.target}: another process appended messages of {batch.source}; run one watch per "
                    "topic and log"
                )

    def _read_parts(self, kinds: Mapping[str, str], scratch: Path) -> dict[str, list[Part]]:
        """Parse and check every source."""
        total = sum(source.size for files in self.sources.values() for source in files)
        parts: dict[str, list[Part]] = {}
        with (
            progress_bar(total=total, desc="read", unit="B", unit_scale=True, shown=self.progress) as bar,
            ticking(bar),
        ):
            for table, files in self.sources.items():
                parts[table] = []
                for number, source in enumerate(files):
                    parts[table].append(read_part(source, kinds, table, scratch, number, self.on_bad_rows))
                    bar.update(source.size)
        return parts

    def _write_segment(
        self, before: ExistingLog, parts: Mapping[str, Sequence[Part]], folder: Path, scratch: Path
    ) -> tuple[NewSegment, list[NewFeatures]]:
        """Write vocabularies, packed tables, features, quarantined rows and manifest."""
        writer = SegmentWriter(folder)
        if "events" in parts:
            ids = {table: DistinctIds.of(of_table) for table, of_table in parts.items() if table not in OWNERS}
            segment = NewSegment(
                number=before.last_segment + 1,
                before=before,
                parts=parts,
                users=extended(before.users, [of_table.users["user"] for of_table in ids.values()]),
                items=extended(before.items, [of_table.items["item"] for of_table in ids.values()]),
                actions=actions_of(parts["events"], before.actions),
                tasks=tasks_of(parts["impressions"][0].source) if "impressions" in parts else before.tasks,
                time_range_ms=time_range(parts["events"]),
            )
            writer.save_vocabulary("new_users", segment.users.part(len(before.users)))
            writer.save_vocabulary("new_items", segment.items.part(len(before.items)))
            self.times.lap("vocabularies")
            active_users, of_rows = self._pack_tables(segment, ids, writer, scratch)
            fields = segment.manifest(active_users, {table: features.columns for table, features in of_rows.items()})
        else:
            segment, of_rows = NewSegment.without_events(before, parts), {}
            fields = write_without_events(writer, before.manifests[-1], before.users, before.items)
        of_items, of_users = (
            write_features(owner, parts.get(owner.table, ()), vocabulary, before.segments, writer, scratch)
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
        self, segment: NewSegment, ids: Mapping[str, DistinctIds], writer: SegmentWriter, scratch: Path
    ) -> tuple[dict[str, int], dict[str, NewFeatures]]:
        """Write the packed tables; returns the number of users with rows in each, and the features of its rows."""
        num_rows = sum(segment.num_rows(table) for table in ids)
        active_users, of_rows = {}, {}
        with progress_bar(total=num_rows, desc="write", unit="row", unit_scale=True, shown=self.progress) as bar:
            packer = Packer(
                scratch=scratch, bucket_events=self.bucket_events, times=self.times, on_rows_written=bar.update
            )
            for table in ids:
                parts = segment.parts[table]
                if table == "events":
                    columns = event_columns(parts[0].source, segment.actions, segment.before.next_ordinals)
                    owner, prefix = EVENTS, ""
                else:
                    columns = impression_columns(parts[0].source, segment.tasks)
                    owner, prefix = IMPRESSIONS, "impressions/"
                features = NewRowFeatures(owner, parts, segment.before.row_values(owner), writer)
                active_users[table] = packer.pack(
                    parts,
                    ids[table].user_rows(segment.users),
                    ids[table].item_rows(segment.items),
                    columns,
                    TableWriter(writer, prefix, segment.num_rows(table), columns.types),
                    features,
                )
                of_rows[table] = features.written()
        return active_users, of_rows

    def _report(
        self, segment: NewSegment, features: Sequence[NewFeatures], quarantine: Path, kept: str
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
