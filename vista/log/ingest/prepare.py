"""`vista prepare`: source tables become a segment of an EventLog, out of core, all or nothing.

    sources → parts, parsed and judged (validation.py, parts.py) → vocabularies → packed columns (packing.py)

Everything is written into a folder beside the log, fsynced, and renamed into place: a failing run leaves what was there
as it was. The same files give the same bytes, whatever the threads, chunks or buckets.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vista.config import PrepareConfig, SourceConfig
from vista.config.choices import OnBadRows
from vista.errors import ConfigError, DataError, TakenError
from vista.log.event_log import EventLog
from vista.log.frames import to_polars
from vista.log.gaps import YEAR_1971_MS
from vista.log.ingest.columns import NO_ACTION, actions_of, event_columns, impression_columns, time_range
from vista.log.ingest.packing import BUCKET_EVENTS, ITEM_ROW, USER_ROW, distinct, extended, pack, rows_of
from vista.log.ingest.parts import Part, read_part, write_quarantine
from vista.log.ingest.prepare_report import PrepareReport, Stages
from vista.log.ingest.rules import id_kind
from vista.log.ingest.sources import Source, frame_source, open_sources
from vista.log.segment import segment_name
from vista.log.segment_writer import locked_log, staged_folder, write_manifest
from vista.log.vocabulary import Vocabulary

__all__ = ["PrepareReport", "prepare", "prepare_frames"]
_LOG = logging.getLogger("vista.prepare")


def prepare(config: PrepareConfig, *, bucket_events: int = BUCKET_EVENTS) -> PrepareReport:
    """Ingest source files into a new EventLog, or with `append` into a new segment of one.

    Args:
        bucket_events: rows that are sorted at once, some 150 bytes of memory each; it never changes the result.

    Raises:
        ConfigError: if the configuration is contradictory, or a timestamp has no unit.
        DataError: naming file, row, column, value and remedy; nothing is written then.
    """
    stages = Stages()
    target = Path(config.out)
    _check_target(target, config.append)
    sources = {"events": open_sources(config.events, "events")}
    configs = {"events": config.events, "impressions": config.impressions or config.events}
    if config.impressions is not None:
        sources["impressions"] = open_sources(config.impressions, "impressions")
    elif (Path(sources["events"][0].path).parent / "impressions.parquet").is_file() and _is_simulated(config.events):
        sources["impressions"] = open_sources(config.events, "impressions")
    return _ingest(
        target, sources, configs, config.append, config.on_bad_rows, stages, bucket_events, progress=config.progress
    )


def prepare_frames(
    frame: Any,
    path: str | os.PathLike[str],
    *,
    columns: Mapping[str, str | None],
    time_unit: str | None = None,
    impressions: Any = None,
    labels: Sequence[str] = (),
    probabilities: Sequence[str] = (),
    on_bad_rows: OnBadRows | str = OnBadRows.error,
    append: bool = False,
) -> PrepareReport:
    """The same for frames in memory (pandas, Polars, or a mapping of columns).

    Args:
        columns: names of the frame's columns: user, item, timestamp, action, rating, sequence.
    """
    stages = Stages()
    target = Path(path)
    _check_target(target, append)
    given: dict[str, Any] = {name: own for name, own in columns.items() if own is not None}
    configs = {"events": SourceConfig(**given, time_unit=time_unit)}
    sources = {"events": [frame_source(to_polars(frame, given.values()), configs["events"], "events")]}
    if impressions is not None:
        if not labels:
            raise ConfigError("labels: name at least one 0/1 column of the impressions")
        key = {name: own for name, own in given.items() if name in ("user", "item", "timestamp")}
        configs["impressions"] = SourceConfig(
            **key, time_unit=time_unit, labels=list(labels), probabilities=list(probabilities)
        )
        sources["impressions"] = [
            frame_source(
                to_polars(impressions, [*key.values(), *labels, *probabilities]), configs["impressions"], "impressions"
            )
        ]
    return _ingest(target, sources, configs, append, OnBadRows(on_bad_rows), stages, BUCKET_EVENTS, progress=False)


def _is_simulated(config: SourceConfig) -> bool:
    return config.kind == "simulated" or (config.kind == "auto" and Path(config.paths[0]).is_dir())


def _check_target(target: Path, append: bool) -> None:
    if append and not target.exists():
        raise DataError(f"{target}: no log to append to; leave append out to make one")
    if not append and target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise DataError(
            f"{target}: exists already; append=true adds these sources to it, another out=… makes another log, "
            "or remove the folder first"
        )


def _ingest(
    target: Path,
    sources: dict[str, list[Source]],
    configs: Mapping[str, SourceConfig],
    append: bool,
    on_bad_rows: OnBadRows,
    stages: Stages,
    bucket_events: int,
    *,
    progress: bool,
) -> PrepareReport:
    with ExitStack() as stack:
        if append and target.is_dir():
            stack.enter_context(locked_log(target))
        log = EventLog.open(target) if append else None
        for table, files in sources.items():
            _check_sources(table, files, log)
        if "impressions" in sources and any("timestamp" not in files[0].columns for files in sources.values()):
            raise ConfigError("impressions need times, and events too: name both tables' timestamp columns")
        kinds = {name: _kind(name, sources["events"][0], configs["events"], log) for name in ("user", "item")}
        number = log.last_segment + 1 if log else 1
        destination = target / segment_name(number) if log else target
        stages.lap("open")
        with staged_folder(destination) as staging:
            folder = staging if log else staging / segment_name(number)
            scratch = staging / "scratch"
            scratch.mkdir()
            folder.mkdir(exist_ok=True)
            parts = _read(sources, kinds, scratch, on_bad_rows, progress)
            stages.lap("read")
            written = _write(folder, scratch, parts, kinds, log, number, stages, bucket_events, progress)
            shutil.rmtree(scratch)
            stages.lap("write")
        stages.lap("sync")
    quarantine = target / segment_name(number) / "quarantine.csv"
    report = PrepareReport(
        path=target,
        segment=number,
        quarantine=quarantine if written["num_quarantined"] else None,
        stages=dict(stages),
        **written,
    )
    for warning in report.warnings:
        _LOG.warning("%s: %s", target, warning)
    return report


def _check_sources(table: str, files: Sequence[Source], log: EventLog | None) -> None:
    """Refuse what was taken before, and files of one table that do not have the same columns."""
    taken: dict[str, str] = {}
    for manifest in log.manifests if log else []:
        for entry in manifest["sources"]:
            if entry["table"] == table:
                taken[entry["sha256"]] = f"segment {manifest['last_segment']} holds it already (as {entry['name']})"
    for source in files:
        if source.digest in taken:
            raise TakenError(f"{source.path}: {taken[source.digest]}; its rows would count twice, so leave it out")
        taken[source.digest] = f"has the same content as {source.path}"
        if set(source.columns) != set(files[0].columns):
            raise DataError(
                f"{source.path}: has {', '.join(source.columns)}, but {files[0].path} has "
                f"{', '.join(files[0].columns)}; files of one call need the same columns"
            )
    first = files[0]
    if log is None:
        return
    if table == "events":
        for name, has in (("timestamp", log.has_time), ("rating", log.has_rating)):
            if (name in first.columns) != has:
                remedy = f"name its column with events.{name}=…" if has else f"leave it out with events.{name}=null"
                raise DataError(f"{first.path}: the log has {'' if has else 'no '}{name}s; {remedy}")
        if log.actions != [NO_ACTION] and "action" not in first.columns:
            raise DataError(
                f"{first.path}: the log has the actions {', '.join(log.actions)}; name their column by events.action=…"
            )
    else:
        tasks, known = _tasks(first), log.manifests[-1]["tasks"]
        if known and tasks != known:
            raise DataError(f"{first.path}: labels {tasks} differ from the log's {known}; name the same in that order")


def _tasks(source: Source) -> list[str]:
    return [name.split(":", 1)[1] for name in source.columns if name.startswith("label:")]


def _kind(name: str, source: Source, config: SourceConfig, log: EventLog | None) -> str:
    wanted = str(getattr(config, f"{name}_ids").value)
    if log is None:
        return id_kind(source, name, wanted)
    kind = (log.users if name == "user" else log.items).kind
    if wanted not in ("auto", kind):
        raise ConfigError(f"events.{name}_ids={wanted}: the log's {name} ids are {kind}; leave it out")
    return kind


def _read(
    sources: Mapping[str, Sequence[Source]],
    kinds: Mapping[str, str],
    scratch: Path,
    on_bad_rows: OnBadRows,
    progress: bool,
) -> dict[str, list[Part]]:
    total = sum(source.size for files in sources.values() for source in files)
    parts: dict[str, list[Part]] = {}
    with tqdm(total=total, desc="read", unit="B", unit_scale=True, disable=not progress) as bar:
        for table, files in sources.items():
            parts[table] = []
            for number, source in enumerate(files):
                parts[table].append(read_part(source, kinds, table, scratch, number, on_bad_rows))
                bar.update(source.size)
    return parts


def _write(
    folder: Path,
    scratch: Path,
    parts: Mapping[str, Sequence[Part]],
    kinds: Mapping[str, str],
    log: EventLog | None,
    number: int,
    stages: Stages,
    bucket_events: int,
    progress: bool,
) -> dict[str, Any]:
    """Vocabularies, packed tables and manifest of the segment; returns the report's numbers."""
    old_users = log.users if log else Vocabulary.empty(kinds["user"])
    old_items = log.items if log else Vocabulary.empty(kinds["item"])
    found = {table: distinct(those) for table, those in parts.items()}
    users = extended(old_users, [user["user"] for user, _ in found.values()])
    items = extended(old_items, [item["item"] for _, item in found.values()])
    users.tail(len(old_users)).save(folder, "new_users")
    items.tail(len(old_items)).save(folder, "new_items")
    actions = actions_of(parts["events"], log.actions if log else [])
    first_ms, last_ms = time_range(parts["events"])
    stages.lap("vocabularies")
    tasks: list[str] = log.manifests[-1]["tasks"] if log else []
    rows = {table: sum(part.num_rows for part in those) for table, those in parts.items()}
    active = {}
    ordinals = log.next_ordinals() if log and not log.has_time else np.empty(0, np.int64)
    with tqdm(total=sum(rows.values()), desc="write", unit="row", unit_scale=True, disable=not progress) as bar:
        for table, those in parts.items():
            if table == "events":
                columns, values = event_columns(those[0].source, actions, ordinals)
            else:
                tasks = _tasks(those[0].source)
                columns, values = impression_columns(those[0].source, tasks)
            active[table] = pack(
                those,
                found[table][0].join(rows_of(users, found[table][0]["user"], USER_ROW), on="user"),
                rows_of(items, found[table][1]["item"], ITEM_ROW),
                folder if table == "events" else folder / table,
                scratch,
                columns,
                values,
                bucket_events=bucket_events,
                stages=stages,
                written=bar.update,
            )
    bad = sum(part.num_bad for those in parts.values() for part in those)
    if bad:
        write_quarantine([part for those in parts.values() for part in those], folder / "quarantine.csv")
    has_time = first_ms is not None
    write_manifest(
        folder,
        {
            "first_segment": number,
            "last_segment": number,
            "num_users": len(users),
            "num_items": len(items),
            "id_types": {"users": users.kind, "items": items.kind},
            "actions": actions,
            "tasks": tasks,
            "has_time": has_time,
            "timestamp": "milliseconds since 1970-01-01 UTC" if has_time else "ordinal of the event in its history",
            "has_rating": "rating" in parts["events"][0].source.columns,
            "counts": {
                table: {"rows": rows.get(table, 0), "users": active.get(table, 0)}
                for table in ("events", "impressions")
            },
            "deletions": 0,
            "quarantined": bad,
            "sources": [
                {
                    "table": table,
                    "name": part.source.name,
                    "bytes": part.source.size,
                    "sha256": part.source.digest,
                    "rows": part.num_rows,
                    "bad_rows": part.num_bad,
                }
                for table, those in parts.items()
                for part in those
            ],
        },
    )
    warnings = []
    if last_ms is not None and last_ms < YEAR_1971_MS:
        warnings.append("all times lie before 1971: check events.time_unit (seconds read as milliseconds look so)")
    if log and (new := actions[len(log.actions) :]):
        warnings.append(
            f"the log had no action {', '.join(new)} so far: models trained before that read actions refuse it; train "
            "them anew before the next refresh"
        )
    return {
        "num_users": len(users),
        "num_items": len(items),
        "num_events": rows["events"],
        "num_impressions": rows.get("impressions", 0),
        "num_quarantined": bad,
        "first_ms": first_ms,
        "last_ms": last_ms,
        "warnings": warnings,
    }
