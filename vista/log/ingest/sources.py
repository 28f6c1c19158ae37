"""Source files and their canonical columns: which files a config names, and what is known of each before it is read.

Canonical columns are `user`, `item`, and, if the source has them, `timestamp`, `rating`, `action`, `sequence`,
`label:<task>`, `probability:<task>`, `category:<name>`, and `number:<name>`; for a table of features of items or users
see feature_sources.py. Files are opened and parsed in a child process (source_formats.py lists the formats), because a
damaged one can end the process that parses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from enum import Enum
from pathlib import Path
from typing import Any

from vista.config import FeatureTableConfig, ItemTableConfig, SourceConfig, UserTableConfig
from vista.config.checks import MAX_VALUES
from vista.config.choices import IdType
from vista.errors import ConfigError, DataError
from vista.files import checked_path
from vista.log.ingest.public.file_form import FileForm, first_form
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.source_parser import SourceParser, npz_limit

KINDS = ("auto", "table", *PUBLIC_SETS)
KINDS_WITH_IMPRESSIONS = ("table", *(kind for kind, known in PUBLIC_SETS.items() if known.impressions))
CONFIGS: Mapping[str, type[FeatureTableConfig]] = {"items": ItemTableConfig, "users": UserTableConfig}
"""Of tables of features, by table."""
_TABLES = FileForm(("*.parquet", "*.csv", "*.csv.gz", "*.tsv"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source file or frame, ready to be read.

    path: name in errors; name: name in the manifest; digest: hex SHA-256; size: bytes; columns: canonical column names
    to those of the source; is_text: whether values are text to parse; time_unit: unit of numeric and text timestamps;
    max_values: distinct values that a category may have.
    """

    path: str
    name: str
    digest: str
    size: int
    columns: dict[str, str]
    is_text: bool
    time_unit: str | None
    max_values: int = MAX_VALUES


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource(Source):
    """A source file that is open in a parser.

    parser: the parser; table: events | impressions | items | users.
    """

    parser: SourceParser
    table: str


def open_sources(config: SourceConfig, table: str, parser: SourceParser) -> list[FileSource]:
    """Open the files that `config` names, in the order of their names.

    Args:
        config: kind, paths (files or folders), columns.
        table: events | impressions.
        parser: opens and later reads the files.

    Raises:
        ConfigError: if the configuration is contradictory.
        DataError: naming the file, if it is missing, empty, cannot be read, or lacks a column.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"{table}.kind: unknown kind {config.kind!r}; use one of {', '.join(KINDS)}")
    if not config.paths:
        raise ConfigError(f"{table}.paths: name at least one file, such as {table}.paths=[ratings.csv]")
    config = with_kind(config)
    if table == "impressions" and config.kind not in KINDS_WITH_IMPRESSIONS:
        raise ConfigError(
            f"{table}.kind: {config.kind} has no impressions; use one of {', '.join(KINDS_WITH_IMPRESSIONS)}"
        )
    if table == "impressions" and config.kind == "table":
        if not config.labels:
            raise ConfigError("impressions.labels: name at least one column of 0/1 labels")
        if config.timestamp is None:
            raise ConfigError("impressions.timestamp: impressions need times; name the column of times")
    if config.probabilities and len(config.probabilities) != len(config.labels):
        raise ConfigError(f"{table}.probabilities: name one column per label, or none")
    return [_open(file, config, table, parser) for file in _files(config, table)]


def open_feature_tables(config: FeatureTableConfig, parser: SourceParser) -> list[FileSource]:
    """Open the files of features of items or users that `config` names, in the order of their names.

    Raises:
        ConfigError: if no file is named.
        DataError: naming the file, if it is missing, empty, cannot be read, lacks a column, or has a column that cannot
            be a feature.
    """
    table = config.table
    if not config.paths:
        raise ConfigError(f"{table}.paths: name at least one file, such as {table}.paths=[{table}.parquet]")
    return [_open(file, config, table, parser) for file in _files(SourceConfig(paths=config.paths), table)]


def open_set_impressions(config: SourceConfig, parser: SourceParser) -> list[FileSource]:
    """Open the files of impressions that a data set has next to its events, or in the same files.

    Returns:
        The open files; none if the kind of `config` has no impressions, or these files are not there.

    Raises:
        DataError: as `open_sources`.
    """
    # What is known of an event is often known only after it, so features of events are not those of requests.
    config = replace(with_kind(config), categories=[], numbers=[])
    if config.kind not in PUBLIC_SETS or not (forms := PUBLIC_SETS[config.kind].impressions):
        return []
    if {form.patterns for form in forms} != {form.patterns for form in PUBLIC_SETS[config.kind].events}:
        folders = [folder for folder in _folders(config) if first_form(forms, folder)[1]]
        config = replace(config, paths=[str(folder) for folder in folders])
    return open_sources(config, "impressions", parser) if config.paths else []


def open_set_features(
    config: SourceConfig, table: str, parser: SourceParser, texts: list[str] | None = None
) -> list[FileSource]:
    """Open the files of item or user features that a data set has next to its events, in the order of their names.

    Args:
        table: items | users.
        texts: of items, columns to read as categories, in place of the features.

    Returns:
        The open files; none if the kind of `config` has no such features, or these files are not there.

    Raises:
        DataError: as `open_feature_tables`.
    """
    config = with_kind(config)
    if config.kind not in PUBLIC_SETS:
        return []
    form_of_file = {
        file: form
        for folder in _folders(config)
        for form, files in [first_form(PUBLIC_SETS[config.kind].forms(table), folder)]
        for file in files
        if form is not None
    }
    only = {} if texts is None else {"categories": texts, "numbers": None, "vectors": None}
    tables = {file: CONFIGS[table](**{**form.columns, **only}) for file, form in form_of_file.items()}
    files = sorted(tables, key=lambda file: (file.name, str(file)))
    return [_open(file, tables[file], table, parser, kind=config.kind) for file in files]


def _folders(config: SourceConfig) -> list[Path]:
    """The folders that `paths` names, or that hold the files that it names, each once."""
    return list(dict.fromkeys(path if path.is_dir() else path.parent for path in map(Path, config.paths)))


def with_kind(config: SourceConfig) -> SourceConfig:
    """The config with the detected kind in place of `auto`, and with the types of ids that its kind has.

    Raises:
        DataError: as `detect_kind`.
    """
    if config.kind == "auto" and config.paths:
        config = replace(config, kind=detect_kind(config.paths[0]))
    if config.kind in PUBLIC_SETS and PUBLIC_SETS[config.kind].has_text_ids:
        config = replace(config, user_ids=IdType.string, item_ids=IdType.string)
    return config


def detect_kind(path: str | Path) -> str:
    """Detect the kind of source at a path, which is a file or the folder of a data set.

    Raises:
        DataError: if no known file is there.
    """
    path = checked_path(path, DataError)
    for kind, known in PUBLIC_SETS.items():
        if path.exists() and known.is_at(path):
            return kind
    if path.is_file():
        return "table"
    problem = f"has the files of none of {', '.join(PUBLIC_SETS)}" if path.is_dir() else "no such file"
    raise DataError(
        f"{path}: {problem}; name the kind, or to read a table of your own, the file, kind=table, and its columns"
    )


def _files(config: SourceConfig, table: str) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, config.paths):
        if path.is_dir():
            forms = PUBLIC_SETS[config.kind].forms(table) if config.kind in PUBLIC_SETS else (_TABLES,)
            matching = first_form(forms, path)[1]
            if not matching:
                wanted = " or ".join(pattern for form in forms for pattern in form.patterns)
                remedy = remedy_of_kind(config.kind) or f"check {table}.paths"
                raise DataError(f"{path}: has no {wanted}, which {table}.kind={config.kind} reads; {remedy}")
        elif path.is_file():
            matching = [path]
        else:
            raise DataError(f"{path}: no such file or folder; check {table}.paths")
        files.extend(matching)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; check {table}.paths")
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; leave it out of {table}.paths or write it again")
    return sorted(files, key=lambda file: (file.name, str(file)))


def _open(
    file: Path, config: SourceConfig | FeatureTableConfig, table: str, parser: SourceParser, kind: str = "table"
) -> FileSource:
    settings, max_bytes = plain_settings(config), npz_limit(file.stat().st_size)
    known, _ = parser.call("open_source", file, config=settings, table=table, max_bytes=max_bytes, kind=kind)
    return FileSource(**known, parser=parser, table=table)


def plain_settings(config: SourceConfig | FeatureTableConfig) -> dict[str, Any]:
    """The settings by name, as JSON has them."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {name: value.value if isinstance(value, Enum) else value for name, value in values.items()}


def needed_columns(config: SourceConfig) -> dict[str, str]:
    """The columns that a config names: canonical names to those of the table."""
    single = ("user", "item", "timestamp", "rating", "action", "sequence")
    columns = {name: own for name in single if (own := getattr(config, name)) is not None}
    columns |= {f"label:{own}": own for own in config.labels}
    columns |= {f"probability:{task}": own for task, own in zip(config.labels, config.probabilities, strict=False)}
    return columns | feature_columns(config)


def feature_columns(config: SourceConfig) -> dict[str, str]:
    """The columns of features that a config names: canonical names to those of the table."""
    return {f"category:{own}": own for own in config.categories} | {f"number:{own}": own for own in config.numbers}
