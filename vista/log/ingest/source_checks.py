"""Checks of sources against each other and the log, before any row is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vista.config import SourceConfig
from vista.errors import ConfigError, DataError, TakenError
from vista.log.feature_owner import OWNERS
from vista.log.ingest.columns import NO_ACTION
from vista.log.ingest.existing_log import ExistingLog
from vista.log.ingest.row_rules import id_kind
from vista.log.ingest.sources import Source
from vista.log.segment_manifest import MAX_FEATURES


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
    known = log.row_values(table)
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
