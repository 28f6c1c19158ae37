"""Readers of source files: every supported kind becomes a lazy frame with canonical columns. Values are not parsed.

`row` is the 1-based number of the data row, not counting a header. Text files are read as text, so that one set of
rules parses and checks all values (row_rules.py). They get a column `extra`, which is null unless a line has more
fields than the header.

| kind | files | columns |
|---|---|---|
| table | Parquet, CSV, TSV (also .gz) | named in the config |
| ml-1m | ratings.dat, `user::item::rating::timestamp` | seconds, ratings; ml-10m has the same format |
| ml-latest-small | ratings.csv, `userId,movieId,rating,timestamp` | seconds, ratings; ml-20m, -25m, -32m too |
| ml-100k | u.data, tabs: user, item, rating, timestamp | seconds, ratings |
| recbole | *.inter, tabs, typed header (`user_id:token`) | timestamp in seconds unless `time_unit` says otherwise |
| npz | events.npz: user, item, user_raw, item_raw [, time in seconds, rating] | read into memory |
| simulated | folder of `vista simulate`: events.parquet, impressions.parquet | ms, actions, labels, probabilities |

The other kinds are tables, whose columns public_sets.py names.
"""

from __future__ import annotations

import csv
import hashlib
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vista.config import SourceConfig
from vista.errors import ConfigError, DataError
from vista.log.ingest.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import EXTRA, ROW, ScannedSource
from vista.log.ingest.sources import needed_columns, open_binary
from vista.log.polars_extra import pl

MOVIELENS_COLUMNS = ("user", "item", "rating", "timestamp")
SIMULATED_TASKS = ("click", "like", "long_view")
NPZ_ARRAYS = ("user", "item", "user_raw", "item_raw", "time", "rating")
MAX_LINE_BYTES = 1 << 20
"""Longest line of a text file, its header included."""
MAX_COLUMNS = 4096
_DEFAULT = SourceConfig()
_KEYS = {
    "label": "labels",
    "probability": "probabilities",
    "category": "categories",
    "number": "numbers",
    "vector": "vectors",
}
"""Keys of the configuration by the role of a column, where they differ."""
_Scan = tuple[pl.LazyFrame, dict[str, str], bool, str | None]
"""Canonical frame, names of the columns in the file, whether values are text, unit of time."""


def column_types(file: Path) -> dict[str, str]:
    """Names and types of the columns of a Parquet file, or those in the header of a text file, which are text."""
    if is_parquet(file):
        return {name: str(dtype) for name, dtype in pl.scan_parquet(file, glob=False).collect_schema().items()}
    separator = "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","
    return dict.fromkeys(read_header(file, separator, '"'), str(pl.String()))


def scan_source(file: Path, config: SourceConfig, table: str, max_bytes: int) -> ScannedSource:
    """Open a source file.

    Args:
        max_bytes: the most that the arrays of an .npz file may hold.

    Raises:
        ConfigError: if the configuration does not fit the file.
        DataError: if the file cannot be read, lacks a column, or has a line longer than `MAX_LINE_BYTES`.
    """
    try:
        frame, columns, is_text, time_unit = _scan(file, config, table, max_bytes)
        size, digest = digest_of(file, check_lines=is_text and file.suffix != ".gz")
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: cannot be read as {config.kind}: {reason}; check {table}.kind") from error
    return ScannedSource(
        path=str(file),
        name=file.name,
        digest=digest,
        size=size,
        columns=columns,
        is_text=is_text,
        time_unit=time_unit,
        frame=frame,
    )


def digest_of(file: Path, *, check_lines: bool) -> tuple[int, str]:
    """Size and hex SHA-256 of a file; refuses a line that is too long, which the parser would hold in memory."""
    sha, size, line_start = hashlib.sha256(), 0, 0
    with file.open("rb") as handle:
        while block := handle.read(MAX_LINE_BYTES):  # so a line within a block is not too long
            sha.update(block)
            if check_lines:
                first, last = block.find(b"\n"), block.rfind(b"\n")
                if size + (first if first >= 0 else len(block)) - line_start > MAX_LINE_BYTES:
                    raise _too_long(file, _newlines(file, line_start) + 1)
                if last >= 0:
                    line_start = size + last + 1
            size += len(block)
    return size, sha.hexdigest()


def _too_long(file: Path, line: int) -> DataError:
    return DataError(
        f"{file}: line {line} is longer than {MAX_LINE_BYTES:,} bytes; check that its lines end in a newline"
    )


def _newlines(file: Path, size: int) -> int:
    """Number of line ends in the first bytes of a file."""
    count = 0
    with file.open("rb") as handle:
        while size > 0 and (block := handle.read(min(size, MAX_LINE_BYTES))):
            count += block.count(b"\n")
            size -= len(block)
    return count


def _scan(file: Path, config: SourceConfig, table: str, max_bytes: int) -> _Scan:
    if config.kind == "npz":
        return _scan_npz(file, max_bytes)
    if config.kind in ("ml-1m", "ml-100k"):
        fields = list(MOVIELENS_COLUMNS)
        # The reader takes `::` for two separators, so every second field must be empty.
        layout = [name for field in fields for name in (field, None)][:-1] if config.kind == "ml-1m" else fields
        separator = ":" if config.kind == "ml-1m" else "\t"
        return scan_text(file, layout, separator, None, 0), dict(zip(fields, fields, strict=True)), True, "s"
    if config.kind == "recbole":
        return _scan_recbole(file, config, table)
    if config.kind == "simulated":
        config = _simulated(file, table)
    elif config.kind in PUBLIC_SETS:
        config = replace(config, **PUBLIC_SETS[config.kind].event_columns(file.name))
    if is_parquet(file):
        lazy = pl.scan_parquet(file, glob=False)
        names = lazy.collect_schema().names()
        columns = needed_columns(config)
        check_columns(str(file), columns, names, table, remedy_of_kind(config.kind))
        chosen = lazy.select(pl.col(own).alias(canonical) for canonical, own in columns.items())
        return chosen.with_row_index(ROW, 1), columns, False, config.time_unit
    return _scan_delimited(file, config, table, text_separator(file, config.separator, table), '"')


def is_parquet(file: Path) -> bool:
    """Whether the name of a file is that of a Parquet file; others are text."""
    return file.suffix in (".parquet", ".pq")


def text_separator(file: Path, configured: str, table: str) -> str:
    """The character that separates the columns of a text file; by default a comma, or a tab in a TSV file.

    Raises:
        ConfigError: if it is not one character.
    """
    separator = {"\\t": "\t", "tab": "\t"}.get(configured, configured)
    if separator == _DEFAULT.separator and file.name.removesuffix(".gz").endswith(".tsv"):
        separator = "\t"
    if len(separator.encode()) != 1:
        raise ConfigError(f"{table}.separator: must be one character, got {configured!r}")
    return separator


def _simulated(file: Path, table: str) -> SourceConfig:
    if table == "events":
        return SourceConfig(timestamp="timestamp", time_unit="ms", action="action")
    names = pl.scan_parquet(file, glob=False).collect_schema().names()
    tasks = [task for task in SIMULATED_TASKS if task in names]
    probabilities = [f"{task}_probability" for task in tasks if f"{task}_probability" in names]
    return SourceConfig(timestamp="timestamp", time_unit="ms", labels=tasks, probabilities=probabilities)


def _scan_recbole(file: Path, config: SourceConfig, table: str) -> _Scan:
    header = read_header(file, "\t", None)
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


def _scan_delimited(file: Path, config: SourceConfig, table: str, separator: str, quote: str | None) -> _Scan:
    """A text file with a header line."""
    header = read_header(file, separator, quote)
    columns = needed_columns(config)
    check_columns(str(file), columns, header, table, remedy_of_kind(config.kind))
    canonical = {own: name for name, own in columns.items()}
    if len(canonical) < len(columns):
        raise ConfigError(f"{table}: a column is named twice in {sorted(columns.values())}; name each column once")
    layout = [canonical.get(name, "") for name in header]
    return scan_text(file, layout, separator, quote, 1), columns, True, config.time_unit


def scan_text(
    file: Path,
    layout: Sequence[str | None],
    separator: str,
    quote: str | None,
    header_lines: int,
    encoding: Literal["utf8", "utf8-lossy"] = "utf8",
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
        encoding=encoding,
        glob=False,
    )
    empty = [f"field_{index}" for index, name in enumerate(layout) if name is None]
    chosen = [pl.col(f"field_{index}").alias(name) for index, name in enumerate(layout) if name]
    return lazy.select(ROW, *chosen, pl.coalesce(*empty, f"field_{len(layout)}").alias(EXTRA))


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


def _scan_npz(file: Path, max_bytes: int) -> _Scan:
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
    return frame.lazy().with_row_index(ROW, 1), columns, False, "s"


def check_columns(path: str, columns: Mapping[str, str], present: Iterable[str], table: str, remedy: str = "") -> None:
    """Refuse a table that does not have each of these columns once.

    Args:
        columns: canonical names to those of the table.
        present: the table's columns.
        remedy: what to do; by default, to set the key of the column.

    Raises:
        DataError: naming the column, with the remedy.
    """
    names = list(present)
    for canonical, own in columns.items():
        if names.count(own) != 1:
            raise DataError(
                f"{path}: column {own!r} {'is missing' if own not in names else 'occurs twice'}, the file has: "
                f"{', '.join(names)}; {remedy or _key_to_set(canonical, names, table)}"
            )


def _key_to_set(canonical: str, names: Sequence[str], table: str) -> str:
    key = _KEYS.get(canonical.split(":")[0], canonical)
    return (
        f"name the right one with {table}.{key}=..."
        + (f", or set {table}.separator=..." if len(names) == 1 else "")
        + (", or leave it out for a log without times" if canonical == "timestamp" and table == "events" else "")
    )


def first_line(file: Path, encoding: str = "utf-8-sig") -> str:
    """The first line of a text file, without its end."""
    try:
        with open_binary(file) as handle:
            content = handle.readline(MAX_LINE_BYTES + 1)
            line = content.decode(encoding)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: the header is not UTF-8 text ({error}); convert the file to UTF-8") from error
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{file}: the header cannot be read ({error}); write the file again") from error
    if len(content) > MAX_LINE_BYTES:
        raise _too_long(file, 1)
    return line.rstrip("\r\n")


def read_header(file: Path, separator: str, quote: str | None) -> list[str]:
    """Column names in the first line of a text file."""
    line = first_line(file)
    names = line.split(separator)
    if quote is not None:
        try:
            names = next(csv.reader([line], delimiter=separator, quotechar=quote), [])
        except csv.Error as error:
            raise DataError(f"{file}: the header cannot be read ({error}); correct its quotes") from error
    if not any(names):
        raise DataError(f"{file}: the first line is blank; write the column names there")
    if len(names) > MAX_COLUMNS:
        raise DataError(
            f"{file}: has {len(names):,} columns, but at most {MAX_COLUMNS:,} are possible; check the separator"
        )
    return names
