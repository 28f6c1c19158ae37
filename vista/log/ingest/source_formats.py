"""Readers of source files: every supported kind becomes a lazy frame with canonical columns. Values are not parsed.

`row` is the 1-based number of the data row, not counting a header. Text files are read as text, so that one set of
rules parses and checks all values (row_rules.py). They get a column `extra`, which is null unless a line has more
fields than the header.

| kind | files | columns |
|---|---|---|
| table | Parquet, CSV, TSV (also .gz) | named in the config |
| recbole | *.inter, tabs, typed header (`user_id:token`) | timestamp in seconds unless `time_unit` says otherwise |
| npz | events.npz: user, item, user_raw, item_raw [, time in seconds, rating] | read into memory |
| simulated | folder of `vista simulate`: events.parquet, impressions.parquet | ms, actions, labels, probabilities |

The other kinds are public data sets, which the modules in `public` describe.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from vista.config import SourceConfig
from vista.errors import ConfigError, DataError
from vista.installation import require_module
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import ROW, FileScan
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import ScannedSource, file_source
from vista.log.ingest.sources import feature_columns, needed_columns
from vista.log.ingest.text_files import read_header, scan_text

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

SIMULATED_TASKS = ("click", "like", "long_view")
NPZ_ARRAYS = ("user", "item", "user_raw", "item_raw", "time", "rating")
_DEFAULT = SourceConfig()


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
    if config.kind == "recbole":
        return _scan_recbole(file, config, table)
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
        return FileScan(chosen.with_row_index(ROW, 1), columns, False, config.time_unit)
    separator = text_separator(file, config.separator, table)
    return _scan_delimited(file, config, needed_columns(config), table, separator, '"')


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


def _simulated(file: Path, config: SourceConfig, table: str) -> SourceConfig:
    """The columns of `vista simulate`, and those of features, which a user may have added."""
    config = SourceConfig(timestamp="timestamp", time_unit="ms", categories=config.categories, numbers=config.numbers)
    if table == "events":
        return replace(config, action="action")
    names = pl.scan_parquet(file, glob=False).collect_schema().names()
    tasks = [task for task in SIMULATED_TASKS if task in names]
    probabilities = [f"{task}_probability" for task in tasks if f"{task}_probability" in names]
    return replace(config, labels=tasks, probabilities=probabilities)


def _scan_recbole(file: Path, config: SourceConfig, table: str) -> FileScan:
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
    columns = needed_columns(replace(named, categories=[], numbers=[]))
    columns |= {canonical: by_field.get(own, own) for canonical, own in feature_columns(config).items()}
    return _scan_delimited(file, named, columns, table, "\t", None)


def _scan_delimited(
    file: Path, config: SourceConfig, columns: dict[str, str], table: str, separator: str, quote: str | None
) -> FileScan:
    """A text file with a header line."""
    header = read_header(file, separator, quote)
    check_columns(str(file), columns, header, table, remedy_of_kind(config.kind))
    canonical = {own: name for name, own in columns.items()}
    if len(canonical) < len(columns):
        raise ConfigError(f"{table}: a column is named twice in {sorted(columns.values())}; name each column once")
    layout = [canonical.get(name, "") for name in header]
    return FileScan(scan_text(file, layout, separator, quote, 1), columns, True, config.time_unit)


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
