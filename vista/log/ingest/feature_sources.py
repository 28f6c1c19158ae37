"""Sources of features of items and users: which columns of a table are features, and of which kind.

Canonical columns are `item` or `user`, `category:<name>`, `number:<name>`, and `vector:<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vista.config import FeatureTableConfig, ItemTableConfig
from vista.errors import ConfigError, DataError
from vista.installation import require_module
from vista.log.feature_owner import OWNERS
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import EXTRA, ROW, FileScan
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import ScannedSource, file_source, source_of_frame
from vista.log.ingest.source_formats import is_parquet, text_separator
from vista.log.ingest.text_features import refuse_numbers
from vista.log.ingest.text_files import read_header, scan_text
from vista.log.segment_manifest import MAX_FEATURES

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_KIND_OF_KEY = {"categories": "category", "numbers": "number", "vectors": "vector"}
_Types = Mapping[str, pl.DataType]
_NUMBERS_OF_TEXT = r"[^\s,\[\]]+"
"""What is between the spaces, commas, and brackets of a vector that is written as text."""


def scan_features(file: Path, config: FeatureTableConfig, kind: str) -> ScannedSource:
    """Open a file of features.

    Args:
        kind: the data set that the file is part of; "table" for a table of the user's own.

    Raises:
        ConfigError: if the separator is not one character.
        DataError: if the file cannot be read, lacks a column, or has a column that cannot be a feature.
    """
    try:
        scan = _scan(file, config, kind)
        separator = config.value_separator if isinstance(config, ItemTableConfig) else None
        source = file_source(file, replace(scan, frame=_split(scan.frame, separator)))
        if scan.is_text and config.is_inferred and kind not in PUBLIC_SETS:
            refuse_numbers(source, scan.frame, config.table)
        return source
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: cannot be read: {reason}; write the file again") from error


def _scan(file: Path, config: FeatureTableConfig, kind: str) -> FileScan:
    read = PUBLIC_SETS[kind].form_of(file, config.table).read if kind in PUBLIC_SETS else None
    if read is not None:
        scan = read(file)
        if scan.is_text and config.is_inferred:  # the file says what its columns are
            return scan
        schema = scan.frame.collect_schema()
        columns = _feature_columns(str(file), {name: schema[name] for name in scan.columns}, config)
        check_columns(str(file), columns, scan.columns, config.table)
        rest = [name for name in (ROW, EXTRA) if name in schema]
        frame = scan.frame.select(*rest, *(pl.col(own).alias(name) for name, own in columns.items()))
        return replace(scan, frame=frame, columns=columns)
    is_text = not is_parquet(file)
    if is_text:
        separator = text_separator(file, config.separator, config.table)
        header = read_header(file, separator, '"')
        types: _Types = dict.fromkeys(header, pl.String())
    else:
        lazy = pl.scan_parquet(file, glob=False)
        types = lazy.collect_schema()
        header = list(types)
    owner = OWNERS[config.table].name
    check_columns(str(file), {owner: config.id_column}, types, config.table, remedy_of_kind(kind))
    columns = _feature_columns(str(file), types, config)
    check_columns(str(file), columns, header, config.table, remedy_of_kind(kind))
    if is_text:
        canonical = {own: name for name, own in columns.items()}
        frame = scan_text(file, [canonical.get(name, "") for name in header], separator, '"', 1)
    else:
        frame = lazy.select(pl.col(own).alias(name) for name, own in columns.items()).with_row_index(ROW, 1)
    return FileScan(frame, columns, is_text)


def features_of_frame(frame: pl.DataFrame, config: FeatureTableConfig) -> ScannedSource:
    """A frame of features from `to_polars` as a source.

    Raises:
        DataError: as `scan_features`.
    """
    path, ids = f"<{config.table} frame>", config.id_column
    if ids not in frame.columns:
        raise DataError(
            f"{path}: column {ids!r} is missing, the frame has: {', '.join(frame.columns)}; name the column of ids as "
            f"in SourceColumns({OWNERS[config.table].name}=...)"
        )
    columns = _feature_columns(path, frame.schema, config)
    chosen = frame.select(pl.col(own).alias(name) for name, own in columns.items())
    return source_of_frame(chosen, columns, config.table)


def _split(frame: pl.LazyFrame, value_separator: str | None) -> pl.LazyFrame:
    """The frame with text split into the values of categories and the numbers of vectors."""
    split = []
    for name, dtype in frame.collect_schema().items():
        kind = name.partition(":")[0]
        if dtype == pl.String and kind == "vector":
            split.append(pl.col(name).str.extract_all(_NUMBERS_OF_TEXT))
        elif dtype == pl.String and kind == "category" and value_separator is not None:
            split.append(pl.col(name).str.split(value_separator))
    return frame.with_columns(split)


def _feature_columns(path: str, types: _Types, config: FeatureTableConfig) -> dict[str, str]:
    """The columns to read: canonical names to those of the table."""
    columns = {OWNERS[config.table].name: config.id_column}
    if config.is_inferred:
        for name, dtype in types.items():
            if name != config.id_column:
                columns[f"{_inferred_kind(path, name, dtype, config)}:{name}"] = name
    else:
        for key, names in config.named.items():
            kind = _KIND_OF_KEY[key]
            for name in names or ():
                if name in types and not _fits(kind, types[name], config):
                    raise DataError(
                        f"{path}: column {name!r} has type {types[name]} and cannot be a {kind}; convert it, or leave "
                        f"it out of {config.table}.{key}"
                    )
                columns[f"{kind}:{name}"] = name
    if len(columns) == 1:
        raise DataError(f"{path}: names no column but {config.id_column!r}; add columns of features")
    if len(columns) - 1 > MAX_FEATURES:
        raise ConfigError(
            f"{path}: has {len(columns) - 1:,} columns of features, but at most {MAX_FEATURES:,} are possible; name "
            f"fewer{', or join numbers to vectors' if _can_be_lists(config) else ''}"
        )
    return columns


def _can_be_lists(config: FeatureTableConfig) -> bool:
    """Whether a row can have several values, or a vector."""
    return "vectors" in config.named


def _inferred_kind(path: str, name: str, dtype: pl.DataType, config: FeatureTableConfig) -> str:
    is_list, inner = _inner(dtype)
    if is_list and not _can_be_lists(config):
        raise DataError(
            f"{path}: column {name!r} has type {dtype}, but a user has one value per column; name the other columns "
            "under users.categories or users.numbers"
        )
    if _is_text(inner):
        return "category"
    if inner.is_float():
        return "vector" if is_list else "number"
    if inner.is_integer():
        other = "vectors" if is_list else "numbers"
        raise DataError(
            f"{path}: column {name!r} has type {dtype} and could be categories or {other}; list all columns to "
            f"read, this one under {config.table}.categories or {config.table}.{other} (in a frame, convert it to text "
            "or to floats)"
        )
    raise DataError(
        f"{path}: column {name!r} has type {dtype} and cannot be a feature; convert it, or name the other columns "
        f"under {', '.join(f'{config.table}.{key}' for key in config.named)}"
    )


def _fits(kind: str, dtype: pl.DataType, config: FeatureTableConfig) -> bool:
    is_list, inner = _inner(dtype)
    if is_list and not _can_be_lists(config):
        return False
    if kind == "category":
        return _is_text(inner) or inner.is_integer()
    if kind == "number":
        return not is_list and (inner.is_numeric() or inner in (pl.Boolean, pl.String, pl.Null))
    return inner == pl.Null or (is_list and inner.is_numeric()) or (not is_list and inner == pl.String)


def _is_text(dtype: pl.DataType) -> bool:
    """Whether values can only be names; a column of Null has none."""
    return dtype in (pl.String, pl.Categorical, pl.Enum, pl.Boolean, pl.Null)


def _inner(dtype: Any) -> tuple[bool, pl.DataType]:
    """Whether a type is a list, and the type of its entries, or else the type itself."""
    is_list = isinstance(dtype, pl.List) or (isinstance(dtype, pl.Array) and len(dtype.shape) == 1)
    return is_list, dtype.inner if is_list else dtype
