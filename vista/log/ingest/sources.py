"""Source files and their canonical columns: which files a config names, and what is known of each before it is read.

Canonical columns are `user`, `item`, and, if the source has them, `timestamp`, `rating`, `action`, `sequence`,
`label:<task>`, `probability:<task>`, `category:<name>`, and `number:<name>`; for a table of features of items or users
see feature_sources.py. Files are opened and parsed in a child process, because a damaged one can end the process that
parses it.

| kind | files | columns |
|---|---|---|
| table | Parquet, CSV, TSV (also .gz) | named in the config |
| npz | events.npz: user, item, user_raw, item_raw [, time in seconds, rating] | read into memory |
| simulated | folder of `vista simulate`: events.parquet, impressions.parquet | ms, actions, labels, probabilities |

The other kinds are public data sets, which the modules in `public` describe. Every kind becomes a lazy frame of raw
values, with `row`, the 1-based number of the data row, not counting a header. Text files are read as text, so that one
set of rules parses and checks all values (rows.py). They get a column `extra`, which is null unless a line has more
fields than the header.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray

from vista.config import FeatureTableConfig, ItemTableConfig, SourceConfig, UserTableConfig
from vista.config.checks import MAX_VALUES, IdType, to_dict
from vista.config.log_config import POSITION, PROPENSITY
from vista.errors import ConfigError, DataError, LogWriteError
from vista.files import checked_path
from vista.installation import require_module
from vista.log.ingest.public.public_set import FileForm, first_form
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.source_files import ROW, FileScan, check_columns, digest_of, read_header, scan_text, text_fault
from vista.log.ingest.source_parser import SourceParser, npz_limit

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


KINDS = ("auto", "table", *PUBLIC_SETS)
KINDS_WITH_IMPRESSIONS = ("table", *(kind for kind, known in PUBLIC_SETS.items() if known.impressions))
CONFIGS: Mapping[str, type[FeatureTableConfig]] = {"items": ItemTableConfig, "users": UserTableConfig}
"""Of tables of features, by table."""
_TABLES = FileForm(("*.parquet", "*.csv", "*.csv.gz", "*.tsv"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A source file or frame, ready to be read.

    path: name in errors; name: name in the manifest; digest: hex SHA-256; size: bytes; columns: canonical column names
    to those of the source; is_text: whether values are text to parse; time_form: what times are, as in `TimeUnit`;
    max_values: distinct values that a category may have.
    """

    path: str
    name: str
    digest: str
    size: int
    columns: dict[str, str]
    is_text: bool
    time_form: str | None
    max_values: int = MAX_VALUES


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource(Source):
    """A source file that is open in a parser. parser: the parser; table: events | impressions | items | users."""

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
    if config.kind == "table" and config.timestamp is None and config.time_form is not None:
        key = f"{table}.{'time_format' if config.time_format else 'time_unit'}"
        raise ConfigError(f"{key}: no column of times is set; set {table}.timestamp=..., or leave {key} out")
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
    config = replace(config, categories=[], numbers=[])
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
    """The config with the detected kind in place of `auto`, and with the types of ids that its kind has. Raises
    DataError as `detect_kind`."""
    if config.kind == "auto" and config.paths:
        config = replace(config, kind=detect_kind(config.paths[0]))
    if config.kind in PUBLIC_SETS and PUBLIC_SETS[config.kind].has_text_ids:
        config = replace(config, ids=IdType.string)
    return config


def detect_kind(path: str | Path) -> str:
    """Detect the kind of source at a path, which is a file or the folder of a data set. Raises DataError if no known
    file is there."""
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
            raise _no_file(path, "no such file or folder", table)
        files.extend(matching)
    for file in files:
        if not file.is_file():
            raise _no_file(file, "no such file", table)
        if file.stat().st_size == 0:
            raise DataError(f"{file}: the file is empty; leave it out of {table}.paths or write it again")
    return sorted(files, key=lambda file: (file.name, str(file)))


def _no_file(path: Path, missing: str, table: str) -> DataError:
    if path.exists():  # such as a named pipe
        return DataError(f"{path}: is not a regular file; write its contents to a file first")
    return DataError(f"{path}: {missing}; check {table}.paths")


def _open(
    file: Path, config: SourceConfig | FeatureTableConfig, table: str, parser: SourceParser, kind: str = "table"
) -> FileSource:
    settings, max_bytes = to_dict(config), npz_limit(file.stat().st_size)
    known, _ = parser.call("open_source", file, config=settings, table=table, max_bytes=max_bytes, kind=kind)
    return FileSource(**known, parser=parser, table=table)


def tasks_of(source: Source) -> list[str]:
    """Names of the labels of a source of impressions."""
    return [name.split(":", 1)[1] for name in source.columns if name.startswith("label:")]


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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScannedSource(Source):
    """A source with its rows: a frame in memory or, in the parser process, a file. frame: canonical columns with raw
    values, and the columns ROW and (of a text file) EXTRA."""

    frame: pl.LazyFrame

    def described(self) -> dict[str, Any]:
        """The fields of a Source, as JSON values."""
        return {field.name: getattr(self, field.name) for field in fields(Source)}


def frame_source(frame: pl.DataFrame, config: SourceConfig, table: str) -> ScannedSource:
    """A frame from `to_polars` as a source. Its digest covers the columns that are used."""
    columns = needed_columns(config)
    used = frame.select(pl.col(own).alias(canonical) for canonical, own in columns.items())
    return replace(source_of_frame(used, columns, table, config.time_form), max_values=config.max_values)


def file_source(file: Path, scan: FileScan) -> ScannedSource:
    """A file as a source; its digest and its lines are checked by `digest_of`. `scan`: its rows, with canonical
    columns."""
    size, digest = digest_of(file, check_lines=scan.is_text and file.suffix != ".gz")
    return ScannedSource(
        path=str(file),
        name=file.name,
        digest=digest,
        size=size,
        columns=dict(scan.columns),
        is_text=scan.is_text,
        time_form=scan.time_form,
        frame=scan.frame,
    )


def source_of_frame(
    frame: pl.DataFrame, columns: dict[str, str], table: str, time_form: str | None = None
) -> ScannedSource:
    """A frame of canonical columns as a source. `columns`: canonical names to those that the columns had."""
    name, used = f"<{table} frame>", frame.rechunk()
    hasher = _Hasher()
    used.write_ipc(cast(IO[bytes], hasher))
    return ScannedSource(
        path=name,
        name=name,
        digest=hasher.sha.hexdigest(),
        size=hasher.size,
        columns=columns,
        is_text=False,
        time_form=time_form,
        frame=used.lazy().with_row_index(ROW, 1),
    )


def unreadable(source: Source, error: Exception) -> DataError:
    """The error for a source that Polars cannot read. For text, it names a line that is not UTF-8 or misquoted."""
    cause = re.search(r"Original error: ```(.*?)```", str(error), re.DOTALL)
    reason = " ".join((cause[1] if cause else str(error).split("\n\n")[0]).split())
    if "No space left" in reason or "quota exceeded" in reason:
        return LogWriteError(
            f"{source.path}: no disk space left for its rows; free disk space, or choose another folder"
        )
    if "File too large" in reason:
        return DataError(f"{source.path}: has too many rows for a file of its size; write it again, or split it")
    if source.is_text and (fault := text_fault(Path(source.path), reason)):
        return DataError(f"{source.path}: {fault}")
    return DataError(f"{source.path}: cannot be read: {reason}; check the file, the separator and the quotes")


def collected(source: Source, rows: pl.LazyFrame) -> pl.DataFrame:
    """Rows that are read from a source. Raises DataError if they cannot be read."""
    try:
        return rows.collect(engine="streaming")
    except (pl.exceptions.PolarsError, OSError) as error:
        raise unreadable(source, error) from error


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


SIMULATED_TASKS = ("click", "like", "long_view")
NPZ_ARRAYS = ("user", "item", "user_raw", "item_raw", "time", "rating")
_DEFAULT = SourceConfig()


def column_types(file: Path) -> dict[str, str]:
    """Names and types of the columns of a Parquet file, or those in the header of a text file, which are text."""
    if is_parquet(file):
        return {name: str(dtype) for name, dtype in pl.scan_parquet(file, glob=False).collect_schema().items()}
    separator = "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","
    return dict.fromkeys(read_header(file, separator), str(pl.String()))


def scan_source(file: Path, config: SourceConfig, table: str, max_bytes: int) -> ScannedSource:
    """Open a source file.

    Args:
        max_bytes: the most that the arrays of an .npz file may hold.

    Raises:
        ConfigError: if the configuration does not fit the file.
        DataError: if the file cannot be read, lacks a column, or has a line longer than `MAX_LINE_BYTES`.
    """
    try:
        scan = _scan(file, config, table, max_bytes)
        _check_features(config, scan.columns, table)
        return file_source(file, scan)
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: cannot be read as {config.kind}: {reason}; check {table}.kind") from error


def _check_features(config: SourceConfig, columns: Mapping[str, str], table: str) -> None:
    """Refuse columns of features that the reader of a kind of files does not read."""
    for canonical, own in feature_columns(config).items():
        if canonical not in columns:
            key = "categories" if canonical.startswith("category:") else "numbers"
            raise ConfigError(
                f"{table}.{key}: column {own!r} cannot be read, because {table}.kind={config.kind} has fixed columns; "
                f"leave it out, or read the file as a table with {table}.kind=table"
            )


def _scan(file: Path, config: SourceConfig, table: str, max_bytes: int) -> FileScan:
    if config.kind == "npz":
        return _scan_npz(file, max_bytes)
    if config.kind == "simulated":
        config = _simulated(file, config, table)
    elif config.kind in PUBLIC_SETS:
        form = PUBLIC_SETS[config.kind].form_of(file, table)
        if form.read is not None:
            return form.read(file)
        if form.read_named is not None:
            return form.read_named(file, feature_columns(config))
        more = [name for name in config.categories if name not in form.columns.get("categories", ())]
        config = replace(config, **form.columns)
        config.categories = [*config.categories, *more] if "categories" in form.columns else more
    if is_parquet(file):
        lazy = pl.scan_parquet(file, glob=False)
        names = lazy.collect_schema().names()
        columns = needed_columns(config)
        check_columns(str(file), columns, names, table, remedy_of_kind(config.kind))
        chosen = lazy.select(pl.col(own).alias(canonical) for canonical, own in columns.items())
        return FileScan(chosen.with_row_index(ROW, 1), columns, False, config.time_form)
    separator = text_separator(file, config.separator, table)
    return _scan_delimited(file, config, needed_columns(config), table, separator)


def is_parquet(file: Path) -> bool:
    """Whether the name of a file is that of a Parquet file; others are text."""
    return file.suffix in (".parquet", ".pq")


def text_separator(file: Path, configured: str, table: str) -> str:
    """The character that separates the columns of a text file; by default a comma, or a tab in a TSV file. Raises
    ConfigError if it is not one character."""
    separator = {"\\t": "\t", "tab": "\t"}.get(configured, configured)
    if separator == _DEFAULT.separator and file.name.removesuffix(".gz").endswith(".tsv"):
        separator = "\t"
    if len(separator.encode()) != 1:
        raise ConfigError(f"{table}.separator: must be one character, got {configured!r}")
    return separator


def _simulated(file: Path, config: SourceConfig, table: str) -> SourceConfig:
    """The columns of `vista simulate`, and those of features, which a user may have added."""
    config = SourceConfig(timestamp="timestamp", time_unit="ms", categories=config.categories, numbers=config.numbers)
    if table == "events":
        return replace(config, action="action")
    names = pl.scan_parquet(file, glob=False).collect_schema().names()
    tasks = [task for task in SIMULATED_TASKS if task in names]
    probabilities = [f"{task}_probability" for task in tasks if f"{task}_probability" in names]
    numbers = [name for name in (POSITION, PROPENSITY) if name in names and name not in config.numbers]
    return replace(config, labels=tasks, probabilities=probabilities, numbers=[*config.numbers, *numbers])


def _scan_delimited(file: Path, config: SourceConfig, columns: dict[str, str], table: str, separator: str) -> FileScan:
    """A text file with a header line."""
    header = read_header(file, separator)
    check_columns(str(file), columns, header, table, remedy_of_kind(config.kind))
    canonical = {own: name for name, own in columns.items()}
    if len(canonical) < len(columns):
        raise ConfigError(f"{table}: a column is named twice in {sorted(columns.values())}; name each column once")
    layout = [canonical.get(name, "") for name in header]
    return FileScan(scan_text(file, layout, separator, '"', 1), columns, True, config.time_form)


def _npz_arrays(file: Path, max_bytes: int) -> dict[str, NDArray[Any]]:
    """The arrays that are used. Their sizes are checked before they are decompressed."""
    arrays = {}
    try:
        with zipfile.ZipFile(file) as archive:
            held = [(entry.filename.removesuffix(".npy"), entry) for entry in archive.infolist()]
            size = sum(entry.file_size for name, entry in held if name in NPZ_ARRAYS)
            if size > max_bytes:
                raise DataError(
                    f"{file}: its arrays hold {size:,} bytes, but at most {max_bytes:,} are read from a file of this "
                    "size; write Parquet instead"
                )
            for name, entry in held:
                with archive.open(entry) as member:  # refuses a name in the directory that is not that of the member
                    if name not in NPZ_ARRAYS:
                        continue
                    arrays[name] = np.lib.format.read_array(member, allow_pickle=False)
                    if member.read(1):  # the end of the member, where its checksum is compared
                        raise ValueError(f"{entry.filename} has bytes after its array")
                if arrays[name].ndim != 1:
                    raise DataError(
                        f"{file}: array {name!r} has the shape {arrays[name].shape}; write one value per event"
                    )
    # zipfile raises NotImplementedError for archives of an unknown kind, and RuntimeError for encrypted ones.
    except (ValueError, OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not a valid .npz archive ({error}); copy it again") from error
    for name in ("user", "item"):
        if name not in arrays:
            raise DataError(
                f"{file}: array {name!r} is missing, the file has: {', '.join(sorted(dict(held)))}; "
                "write the file again"
            )
    return arrays


def _scan_npz(file: Path, max_bytes: int) -> FileScan:
    arrays = _npz_arrays(file, max_bytes)
    for name in ("user", "item"):
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
    return FileScan(frame.lazy().with_row_index(ROW, 1), columns, False, "s")
