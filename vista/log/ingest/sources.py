"""Readers of source files: every supported kind becomes a lazy frame with canonical columns. Values are not parsed.

Canonical columns are `user`, `item`, and, if the source has them, `timestamp`, `rating`, `action`, `sequence`,
`label:<task>`, and `probability:<task>`. `row` is the 1-based number of the data row, not counting a header. Text files
are read as text, so that one set of rules parses and checks all values (rules.py). They get a column `extra`, which is
null unless a line has more fields than the header.

| kind | files | columns |
|---|---|---|
| table | Parquet, CSV, TSV (also .gz) | named in the config |
| ml-1m | ratings.dat, `user::item::rating::timestamp` | seconds, ratings; ml-10m has the same format |
| ml-latest-small | ratings.csv, `userId,movieId,rating,timestamp` | seconds, ratings; ml-20m, -25m, -32m too |
| ml-100k | u.data, tabs: user, item, rating, timestamp | seconds, ratings |
| recbole | *.inter, tabs, typed header (`user_id:token`) | timestamp in seconds unless `time_unit` says otherwise |
| npz | events.npz: user, item, user_raw, item_raw [, time in seconds, rating] | read into memory |
| simulated | folder of `vista simulate`: events.parquet, impressions.parquet | ms, actions, labels, probabilities |
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, cast

import numpy as np

from vista.config import SourceConfig
from vista.errors import ConfigError, DataError, LogWriteError
from vista.log.polars_extra import pl

ROW, EXTRA = "row", "extra"
MOVIELENS_COLUMNS = ("user", "item", "rating", "timestamp")
SIMULATED_TASKS = ("click", "like", "long_view")
_DEFAULT = SourceConfig()
_FILE_OF_KIND = {
    "ml-1m": "ratings.dat",
    "ml-latest-small": "ratings.csv",
    "ml-100k": "u.data",
    "recbole": "*.inter",
    "npz": "events.npz",
    "simulated": "events.parquet",
}
KINDS = ("auto", "table", *_FILE_OF_KIND)


@dataclass(frozen=True, slots=True)
class Source:
    """A source file or frame, ready to be read.

    path: name in errors; name: name in the manifest; digest: hex SHA-256; size: bytes; frame: canonical columns with
    raw values; columns: canonical column names to those of the source; is_text: whether values are text to parse;
    time_unit: unit of numeric and text timestamps.
    """

    path: str
    name: str
    digest: str
    size: int
    frame: pl.LazyFrame
    columns: dict[str, str]
    is_text: bool
    time_unit: str | None


def open_sources(config: SourceConfig, table: str = "events") -> list[Source]:
    """Open the files that `config` names, in the order of their names.

    Args:
        config: kind, paths (files or folders), columns.
        table: events | impressions.

    Raises:
        ConfigError: if the configuration is contradictory.
        DataError: naming the file, if it is missing, empty, cannot be read, or lacks a column.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"{table}.kind: unknown kind {config.kind!r}; use one of {', '.join(KINDS)}")
    if not config.paths:
        raise ConfigError(f"{table}.paths: name at least one file, such as {table}.paths=[ratings.csv]")
    if config.kind == "auto":
        config = replace(config, kind=detect_kind(config.paths[0]))
    if table == "impressions" and config.kind not in ("table", "simulated"):
        raise ConfigError(f"{table}.kind: {config.kind} has no impressions; use table or simulated")
    if table == "impressions" and config.kind == "table":
        if not config.labels:
            raise ConfigError("impressions.labels: name at least one column of 0/1 labels")
        if config.timestamp is None:
            raise ConfigError("impressions.timestamp: impressions need times; name the column of times")
    if config.probabilities and len(config.probabilities) != len(config.labels):
        raise ConfigError(f"{table}.probabilities: name one column per label, or none")
    files = _files(config, table)
    return [_open(file, config, table) for file in files]


def detect_kind(path: str | Path) -> str:
    """Detect the kind of source at a path, which is a file or the folder of a data set.

    Raises:
        DataError: if no known file is there.
    """
    path = Path(path)
    for kind, pattern in _FILE_OF_KIND.items():
        if path.is_dir() and any(path.glob(pattern)):
            return kind
        if path.is_file() and path.match(pattern) and kind != "simulated":
            return kind
    if path.is_file():
        return "table"
    problem = f"contains none of {', '.join(_FILE_OF_KIND.values())}" if path.is_dir() else "no such file"
    raise DataError(f"{path}: {problem}; to read a table of your own, name the file, kind=table, and its columns")


def column_names(file: Path, separator: str = ",") -> list[str]:
    """Column names of a Parquet file, or in the header of a text file; empty if there is no such file."""
    if not file.is_file() or file.stat().st_size == 0:
        return []
    if file.suffix in (".parquet", ".pq"):
        try:
            return pl.scan_parquet(file, glob=False).collect_schema().names()
        except (OSError, pl.exceptions.PolarsError) as error:
            raise DataError(
                f"{file}: cannot be read: {str(error).splitlines()[0]}; check that it is a Parquet file"
            ) from error
    return _header(file, "\t" if file.name.removesuffix(".gz").endswith(".tsv") else separator, '"')


def frame_source(frame: pl.DataFrame, config: SourceConfig, table: str) -> Source:
    """A frame from `to_polars` as a source. The digest is that of the columns used."""
    name = f"<{table} frame>"
    columns = _needed(config)
    used = frame.select(pl.col(own).alias(canonical) for canonical, own in columns.items()).rechunk()
    hasher = _Hasher()
    used.write_ipc(cast(IO[bytes], hasher))
    lazy = used.lazy().with_row_index(ROW, 1)
    return Source(name, name, hasher.sha.hexdigest(), hasher.size, lazy, columns, False, config.time_unit)


def unreadable(source: Source, error: Exception) -> DataError:
    """The error for a source that Polars cannot read. For text, it names the first line that is not UTF-8."""
    cause = re.search(r"Original error: ```(.*?)```", str(error), re.DOTALL)
    reason = " ".join((cause[1] if cause else str(error).split("\n\n")[0]).split())
    if "No space left" in reason or "quota exceeded" in reason:
        return LogWriteError(
            f"{source.path}: no disk space left for its rows; free disk space, or choose another folder"
        )
    if source.is_text and "utf-8" in reason:
        with _binary(Path(source.path)) as handle:
            for number, line in enumerate(handle, 1):
                try:
                    line.decode()
                except UnicodeDecodeError as bad:
                    shown = line[max(bad.start - 10, 0) : bad.end + 10]
                    return DataError(f"{source.path}: line {number}: {shown!r} is not UTF-8; convert the file to UTF-8")
    return DataError(f"{source.path}: cannot be read: {reason}; check the file, the separator and the quotes")


class _Hasher:
    """A file that only computes the SHA-256 and the size of what is written to it."""

    def __init__(self) -> None:
        self.sha = hashlib.sha256()
        self.size = 0

    def write(self, data: bytes) -> int:
        self.sha.update(data)
        self.size += len(data)
        return len(data)

    def flush(self) -> None:
        return


def _files(config: SourceConfig, table: str) -> list[Path]:
    files: list[Path] = []
    for path in map(Path, config.paths):
        if path.is_dir():
            patterns = [_FILE_OF_KIND.get(config.kind, "")]
            if config.kind == "table":
                patterns = ["*.parquet", "*.csv", "*.csv.gz", "*.tsv"]
            matching = [file for pattern in patterns for file in path.glob(pattern)]
            if not matching:
                wanted = " or ".join(patterns)
                raise DataError(f"{path}: has no {wanted}, which {table}.kind={config.kind} reads; check {table}.paths")
        elif path.is_file():
            matching = [path]
        else:
            raise DataError(f"{path}: no such file or folder; check {table}.paths")
        if table == "impressions" and config.kind == "simulated":
            matching = [file.with_name("impressions.parquet") for file in matching]
        files.extend(matching)
    for file in files:
        if not file.is_file():
            raise DataError(f"{file}: no such file; check {table}.paths")
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; leave it out of {table}.paths or write it again")
    return sorted(files, key=lambda file: (file.name, str(file)))


def _open(file: Path, config: SourceConfig, table: str) -> Source:
    try:
        frame, columns, is_text, time_unit = _scan(file, config, table)
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(
            f"{file}: cannot be read as {config.kind}: {str(error).splitlines()[0]}; check {table}.kind"
        ) from error
    return Source(str(file), file.name, digest, file.stat().st_size, frame, columns, is_text, time_unit)


def _scan(file: Path, config: SourceConfig, table: str) -> tuple[pl.LazyFrame, dict[str, str], bool, str | None]:
    """(canonical frame, names of the columns in the file, whether values are text, unit of time)."""
    if config.kind == "npz":
        return _scan_npz(file)
    if config.kind in ("ml-1m", "ml-100k"):
        fields = list(MOVIELENS_COLUMNS)
        # The reader takes `::` for two separators, so every second field must be empty.
        layout = [name for field in fields for name in (field, None)][:-1] if config.kind == "ml-1m" else fields
        separator = ":" if config.kind == "ml-1m" else "\t"
        return _scan_text(file, layout, separator, None, 0), dict(zip(fields, fields, strict=True)), True, "s"
    if config.kind == "ml-latest-small":
        config = replace(config, user="userId", item="movieId", rating="rating", timestamp="timestamp", time_unit="s")
        return _scan_delimited(file, config, table, ",", '"')
    if config.kind == "recbole":
        return _scan_recbole(file, config, table)
    if config.kind == "simulated":
        config = _simulated(file, table)
    if file.suffix in (".parquet", ".pq"):
        lazy = pl.scan_parquet(file, glob=False)
        names = lazy.collect_schema().names()
        columns = _needed(config)
        _check_columns(str(file), columns, names, table)
        chosen = lazy.select(pl.col(own).alias(canonical) for canonical, own in columns.items())
        return chosen.with_row_index(ROW, 1), columns, False, config.time_unit
    separator = {"\\t": "\t", "tab": "\t"}.get(config.separator, config.separator)
    if separator == _DEFAULT.separator and file.name.removesuffix(".gz").endswith(".tsv"):
        separator = "\t"
    if len(separator.encode()) != 1:
        raise ConfigError(f"{table}.separator: must be one character, got {config.separator!r}")
    return _scan_delimited(file, config, table, separator, '"')


def _simulated(file: Path, table: str) -> SourceConfig:
    if table == "events":
        return SourceConfig(timestamp="timestamp", time_unit="ms", action="action")
    names = pl.scan_parquet(file, glob=False).collect_schema().names()
    tasks = [task for task in SIMULATED_TASKS if task in names]
    probabilities = [f"{task}_probability" for task in tasks if f"{task}_probability" in names]
    return SourceConfig(timestamp="timestamp", time_unit="ms", labels=tasks, probabilities=probabilities)


def _scan_recbole(
    file: Path, config: SourceConfig, table: str
) -> tuple[pl.LazyFrame, dict[str, str], bool, str | None]:
    header = _header(file, "\t", None)
    by_field = {name.split(":")[0]: name for name in header}
    user = "user_id" if config.user == _DEFAULT.user else config.user
    item = "item_id" if config.item == _DEFAULT.item else config.item
    named = replace(
        config,
        user=by_field.get(user, f"{user}:token"),
        item=by_field.get(item, f"{item}:token"),
        timestamp=by_field.get(config.timestamp or "timestamp"),
        rating=by_field.get(config.rating or "rating"),
        time_unit=config.time_unit or "s",
    )
    return _scan_delimited(file, named, table, "\t", None)


def _scan_delimited(
    file: Path, config: SourceConfig, table: str, separator: str, quote: str | None
) -> tuple[pl.LazyFrame, dict[str, str], bool, str | None]:
    """A text file with a header line."""
    header = _header(file, separator, quote)
    columns = _needed(config)
    _check_columns(str(file), columns, header, table)
    canonical = {own: name for name, own in columns.items()}
    if len(canonical) < len(columns):
        raise ConfigError(f"{table}: a column is named twice in {sorted(columns.values())}; name each column once")
    layout = [canonical.get(name, "") for name in header]
    return _scan_text(file, layout, separator, quote, 1), columns, True, config.time_unit


def _scan_text(
    file: Path, layout: Sequence[str | None], separator: str, quote: str | None, header_lines: int
) -> pl.LazyFrame:
    """Read all values as text. `layout` names the fields of a line: "" skips a field, None requires it to be empty."""
    schema = {f"field_{index}": pl.String for index in range(len(layout) + 1)}
    lazy = pl.scan_csv(
        file,
        has_header=False,
        skip_lines=header_lines,
        schema=schema,
        separator=separator,
        quote_char=quote,
        truncate_ragged_lines=True,
        missing_columns="insert",
        extra_columns="ignore",
        row_index_name=ROW,
        row_index_offset=1,
        glob=False,
    )
    empty = [f"field_{index}" for index, name in enumerate(layout) if name is None]
    chosen = [pl.col(f"field_{index}").alias(name) for index, name in enumerate(layout) if name]
    return lazy.select(ROW, *chosen, pl.coalesce(*empty, f"field_{len(layout)}").alias(EXTRA))


def _scan_npz(file: Path) -> tuple[pl.LazyFrame, dict[str, str], bool, str | None]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"{file}: not a valid .npz archive ({error}); copy it again") from error
    for name in ("user", "item"):
        if name not in arrays:
            raise DataError(
                f"{file}: array {name!r} is missing, the file has: {', '.join(sorted(arrays))}; write the file again"
            )
        raw = arrays.get(f"{name}_raw")
        if raw is not None:
            rows = arrays[name]
            if rows.dtype.kind not in "iu":
                raise DataError(
                    f"{file}: array {name!r} has type {rows.dtype} and cannot index {name}_raw; write the file again"
                )
            bad = np.flatnonzero((rows < 0) | (rows >= len(raw)))
            if len(bad):
                raise DataError(
                    f"{file}: row {bad[0] + 1}, column {name!r}: {rows[bad[0]]} is not an index into {name}_raw "
                    f"({len(raw)} ids); write the file again"
                )
            arrays[name] = raw[rows]
    own = {"user": "user", "item": "item", "timestamp": "time", "rating": "rating"}
    columns = {canonical: name for canonical, name in own.items() if name in arrays}
    lengths = {name: len(arrays[name]) for name in columns.values()}
    if len(set(lengths.values())) != 1:
        raise DataError(f"{file}: the arrays differ in length ({lengths}); write the file again")
    frame = pl.DataFrame({canonical: arrays[name] for canonical, name in columns.items()})
    return frame.lazy().with_row_index(ROW, 1), columns, False, "s"


def _needed(config: SourceConfig) -> dict[str, str]:
    """The columns that a config names: canonical names to those of the table."""
    single = ("user", "item", "timestamp", "rating", "action", "sequence")
    columns = {name: own for name in single if (own := getattr(config, name)) is not None}
    columns |= {f"label:{own}": own for own in config.labels}
    columns |= {f"probability:{task}": own for task, own in zip(config.labels, config.probabilities, strict=False)}
    return columns


def _check_columns(path: str, columns: Mapping[str, str], present: Iterable[str], table: str) -> None:
    names = list(present)
    for canonical, own in columns.items():
        if names.count(own) != 1:
            key = {"label": "labels", "probability": "probabilities"}.get(canonical.split(":")[0], canonical)
            raise DataError(
                f"{path}: column {own!r} {'is missing' if own not in names else 'occurs twice'}, the file has: "
                f"{', '.join(names)}; name the right one with {table}.{key}=..."
                + (f", or set {table}.separator=..." if len(names) == 1 else "")
                + (
                    ", or leave it out for a log without times"
                    if canonical == "timestamp" and table == "events"
                    else ""
                )
            )


def _binary(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb"))


def _header(file: Path, separator: str, quote: str | None) -> list[str]:
    """Column names in the first line of a text file."""
    try:
        with _binary(file) as handle:
            line = handle.readline().decode("utf-8-sig")
    except (UnicodeDecodeError, OSError, EOFError) as error:
        raise DataError(f"{file}: the header is not UTF-8 text ({error}); convert the file to UTF-8") from error
    line = line.rstrip("\r\n")
    names = line.split(separator)
    if quote is not None:
        names = next(csv.reader([line], delimiter=separator, quotechar=quote), [])
    if not any(names):
        raise DataError(f"{file}: the first line is blank; write the column names there")
    return names
