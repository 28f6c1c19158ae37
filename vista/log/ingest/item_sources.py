"""Sources of item features: which columns of a table are features, and of which kind.

Canonical columns are `item`, `category:<name>`, `number:<name>`, and `vector:<name>`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vista.config import ItemTableConfig
from vista.errors import ConfigError, DataError
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import ROW, FileScan
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import ScannedSource, file_source, source_of_frame
from vista.log.ingest.source_formats import is_parquet, text_separator
from vista.log.ingest.text_files import read_header, scan_text
from vista.log.polars_extra import pl
from vista.log.segment_manifest import MAX_FEATURES

_LIST_OF_KIND = {"category": "categories", "number": "numbers", "vector": "vectors"}
FEATURE_KINDS = tuple(_LIST_OF_KIND)
_Types = Mapping[str, pl.DataType]
_NUMBERS_OF_TEXT = r"[^\s,\[\]]+"
"""What is between the spaces, commas, and brackets of a vector that is written as text."""


def scan_items(file: Path, config: ItemTableConfig, kind: str) -> ScannedSource:
    """Open a file of item features.

    Args:
        kind: the data set that the file is part of; "table" for a table of the user's own.

    Raises:
        ConfigError: if the separator is not one character.
        DataError: if the file cannot be read, lacks a column, or has a column that cannot be a feature.
    """
    try:
        scan = _scan(file, config, kind)
        return file_source(file, replace(scan, frame=_split(scan.frame, config.value_separator)))
    except (OSError, pl.exceptions.PolarsError) as error:
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: cannot be read: {reason}; write the file again") from error


def _scan(file: Path, config: ItemTableConfig, kind: str) -> FileScan:
    read = PUBLIC_SETS[kind].form_of(file, "items").read if kind in PUBLIC_SETS else None
    if read is not None:
        scan = read(file)
        schema = scan.frame.collect_schema()
        columns = _feature_columns(str(file), {name: schema[name] for name in scan.columns}, config)
        return replace(scan, frame=scan.frame.rename({own: name for name, own in columns.items()}), columns=columns)
    is_text = not is_parquet(file)
    if is_text:
        separator = text_separator(file, config.separator, "items")
        header = read_header(file, separator, '"')
        types: _Types = dict.fromkeys(header, pl.String())
    else:
        lazy = pl.scan_parquet(file, glob=False)
        types = lazy.collect_schema()
        header = list(types)
    check_columns(str(file), {"item": config.item}, types, "items", remedy_of_kind(kind))
    columns = _feature_columns(str(file), types, config)
    check_columns(str(file), columns, header, "items", remedy_of_kind(kind))
    if is_text:
        canonical = {own: name for name, own in columns.items()}
        frame = scan_text(file, [canonical.get(name, "") for name in header], separator, '"', 1)
    else:
        frame = lazy.select(pl.col(own).alias(name) for name, own in columns.items()).with_row_index(ROW, 1)
    return FileScan(frame, columns, is_text)


def items_of_frame(frame: pl.DataFrame, config: ItemTableConfig) -> ScannedSource:
    """A frame of item features from `to_polars` as a source.

    Raises:
        DataError: as `scan_items`.
    """
    if config.item not in frame.columns:
        raise DataError(
            f"<items frame>: column {config.item!r} is missing, the frame has: {', '.join(frame.columns)}; name the "
            "column of ids as in SourceColumns(item=...)"
        )
    columns = _feature_columns("<items frame>", frame.schema, config)
    return source_of_frame(frame.select(pl.col(own).alias(name) for name, own in columns.items()), columns, "items")


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


def _feature_columns(path: str, types: _Types, config: ItemTableConfig) -> dict[str, str]:
    """The columns to read: canonical names to those of the table."""
    columns = {"item": config.item}
    if config.is_inferred:
        for name, dtype in types.items():
            if name != config.item:
                columns[f"{_inferred_kind(path, name, dtype)}:{name}"] = name
    else:
        for kind, key in _LIST_OF_KIND.items():
            for name in getattr(config, key) or ():
                if name in types and not _fits(kind, types[name]):
                    raise DataError(
                        f"{path}: column {name!r} has type {types[name]} and cannot be a {kind}; convert it, or leave "
                        f"it out of items.{key}"
                    )
                columns[f"{kind}:{name}"] = name
    if len(columns) == 1:
        raise DataError(f"{path}: names no column but {config.item!r}; add columns of features")
    if len(columns) - 1 > MAX_FEATURES:
        raise ConfigError(
            f"{path}: has {len(columns) - 1:,} columns of features, but at most {MAX_FEATURES:,} are possible; name "
            "fewer, or join numbers to vectors"
        )
    return columns


def _inferred_kind(path: str, name: str, dtype: pl.DataType) -> str:
    is_list, inner = _inner(dtype)
    if _is_text(inner):
        return "category"
    if inner.is_float():
        return "vector" if is_list else "number"
    if inner.is_integer():
        other = "vectors" if is_list else "numbers"
        raise DataError(
            f"{path}: column {name!r} has type {dtype} and may hold categories or numbers; name the columns to read, "
            f"and this one under items.categories or items.{other} (in a frame, convert it to text or to floats)"
        )
    raise DataError(
        f"{path}: column {name!r} has type {dtype} and cannot be a feature; convert it, or name the other columns "
        "under items.categories, items.numbers, or items.vectors"
    )


def _fits(kind: str, dtype: pl.DataType) -> bool:
    is_list, inner = _inner(dtype)
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
