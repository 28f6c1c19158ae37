"""Sources of features of items and users: which columns of a table are features, and of which kind.

Canonical columns are `item` or `user`, `category:<name>`, `number:<name>`, and `vector:<name>`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vista.arrays import Float32s
from vista.config import FeatureTableConfig, ItemsEmbedConfig, ItemTableConfig, SourceConfig
from vista.config.checks import OnBadRows
from vista.errors import ConfigError, DataError, shown
from vista.files import checked_path, replaced_file
from vista.installation import require_module
from vista.log.ingest.new_features import check_one_row_each
from vista.log.ingest.public.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.rows import ORDER, can_be, entries_of, id_kind, is_text_type, read_part
from vista.log.ingest.source_files import EXTRA, ROW, FileScan, check_columns, read_header, scan_text
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import (
    KINDS,
    FileSource,
    ScannedSource,
    collected,
    file_source,
    is_parquet,
    open_feature_tables,
    open_set_features,
    source_of_frame,
    text_separator,
    with_kind,
)
from vista.log.segment_files import MAX_FEATURES, OWNERS

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


_NUMBER = r"^[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)?$"
"""A number as programs write it. Text with leading zeros, such as a postal code, is not."""


def refuse_numbers(source: ScannedSource, rows: pl.LazyFrame, table: str) -> None:
    """Refuse a text file with a column of only numbers, which has to be named as categories or numbers.

    Args:
        rows: of the file, with the text of each column.
        table: for the error, such as items.

    Raises:
        DataError: naming the column and a value.
    """
    columns = [name for name in source.columns if name.startswith("category:")]
    given = rows.select(columns)
    is_number = pl.all().str.contains(_NUMBER)
    only_numbers = given.select(is_number.all(ignore_nulls=True) & pl.all().is_not_null().any())
    for column, has_only_numbers in collected(source, only_numbers).row(0, named=True).items():
        if has_only_numbers:
            value = given.select(pl.col(column).drop_nulls().first()).collect(engine="streaming").item()
            raise DataError(
                f"{source.path}: column {source.columns[column]!r} has only numbers, such as {shown(value)}, and "
                f"could be categories or numbers; list all columns to read, this one under {table}.categories or "
                f"{table}.numbers"
            )


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
        header = read_header(file, separator)
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
    """A frame of features from `to_polars` as a source. Raises DataError as `scan_features` does."""
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
                if name in types and not can_be(kind, types[name], has_lists=_can_be_lists(config)):
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
    is_list, inner = entries_of(dtype)
    if is_list and not _can_be_lists(config):
        raise DataError(
            f"{path}: column {name!r} has type {dtype}, but a user has one value per column; name the other columns "
            "under users.categories or users.numbers"
        )
    if is_text_type(inner):
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


def read_texts(config: ItemsEmbedConfig, parser: SourceParser) -> tuple[pl.Series, pl.Series]:
    """Read one text per item: the values of each column joined by commas, the columns by periods.

    Args:
        config: kind, files, columns, and `out`, which must not be one of the files.
        parser: reads the files.

    Returns:
        The ids, int64 or text, with the name of their column; and the texts, null for an item without any.

    Raises:
        ConfigError: if the kind is unknown, no file or column is named, or `out` is one of the files.
        DataError: naming file, row, and column, if a table is invalid; or if no item has a text.
    """
    if config.kind not in KINDS:
        raise ConfigError(f"kind: unknown kind {config.kind!r}; use one of {', '.join(KINDS)}")
    sources = _open_texts(config, parser)
    # A public data set may have its items in a file next to the one that is named.
    check_not_a_source(Path(config.out), [*config.items.paths, *(source.path for source in sources)])
    rows = _rows(sources)
    columns = [name for name in sources[0].columns if name != "item"]
    text = pl.concat_str(map(_joined, columns), separator=". ", ignore_nulls=True)
    texts = rows.select(text=pl.when(text != "").then(text))["text"]
    if texts.null_count() == len(texts):
        names = ", ".join(sources[0].columns[name] for name in columns)
        raise DataError(f"{sources[0].path}: no item has a text in the columns {names}; name other columns")
    return rows["item"].alias(sources[0].columns["item"]), texts


def _open_texts(config: ItemsEmbedConfig, parser: SourceParser) -> list[FileSource]:
    files = with_kind(SourceConfig(kind=config.kind, paths=config.items.paths))
    columns = config.columns or (list(PUBLIC_SETS[files.kind].texts) if files.kind in PUBLIC_SETS else [])
    if not columns:
        raise ConfigError("columns: name the columns of text, such as columns=[title,brand]")
    if files.kind == "table":
        return open_feature_tables(replace(config.items, categories=columns), parser)
    sources = open_set_features(files, "items", parser, columns)
    if not sources:
        raise ConfigError(
            f"kind={files.kind}: finds no table of items at items.paths=[{','.join(files.paths)}]; name the folder of "
            "the data set, or a table of your own with kind=table"
        )
    return sources


def _joined(column: str) -> pl.Expr:
    """The values of a category as one text; null without a value."""
    values = pl.col(column).list.eval(pl.element().str.strip_chars())
    text = values.list.eval(pl.element().filter(pl.element() != "")).list.join(", ")
    return pl.when(text != "").then(text)


def read_vectors(file: Path, item: str, column: str, parser: SourceParser) -> tuple[pl.Series, Float32s]:
    """Read a vector per item from a Parquet file.

    Args:
        item, column: names of the columns of ids and vectors.
        parser: reads the file.

    Returns:
        The ids, int64 or text; and the vectors float32 [N, D], NaN for an item without one.

    Raises:
        ConfigError: if the file is not Parquet.
        DataError: naming file, row, item, and column, if the file is invalid; or if no item has a vector.
    """
    if not is_parquet(file):
        raise ConfigError(f"vectors={file}: name a Parquet file, which ends in .parquet")
    present, _ = parser.call("column_types", file)
    for key, name in (("item", item), ("column", column)):
        check_columns(str(file), {key: name}, present, "vectors", f"name the right one with {key}=...")
    rows = _rows(open_feature_tables(ItemTableConfig(paths=[str(file)], item=item, vectors=[column]), parser))
    given = rows[f"vector:{column}"]
    is_known = given.is_not_null().to_numpy()
    if not is_known.any():
        raise DataError(f"{file}: column {column!r} has no vectors; name another column")
    known = given.drop_nulls()
    vectors = np.full((len(rows), known.list.len()[0]), np.nan, np.float32)
    vectors[is_known] = known.explode().to_numpy().reshape(len(known), -1)
    return rows["item"], vectors


def _rows(sources: Sequence[FileSource]) -> pl.DataFrame:
    """All rows of tables of items, with the canonical columns of `parse`, in the order of the files."""
    # Ids in text files stay text, because only the log that takes the new column knows their type.
    is_int = all(not source.is_text and id_kind(source, "item", "auto") == "int" for source in sources)
    kinds = {"user": "str", "item": "int" if is_int else "str"}
    with tempfile.TemporaryDirectory() as folder:
        parts = [
            read_part(source, kinds, "items", Path(folder), number, OnBadRows.error)
            for number, source in enumerate(sources)
        ]
        rows = pl.concat([part.good() for part in parts]).collect().sort(ORDER)
        check_one_row_each(rows.select(ORDER, "item"), parts)
    return rows.drop(ORDER)


def check_not_a_source(out: Path, paths: Sequence[str]) -> None:
    """Refuse a new file that is one of the files that are read, or lies in a folder that is read. Raises ConfigError
    naming the file."""
    read = [checked_path(path, DataError).resolve() for path in paths]
    if not {out.resolve(), out.resolve().parent}.isdisjoint(read):
        raise ConfigError(f"out={out}: is one of the files that are read, or in their folder; name another file")


def write_values(frame: pl.DataFrame, out: Path) -> None:
    """Write a Parquet file atomically and durably, replacing an older one. Raises ConfigError if it cannot be written,
    for example because the disk is full."""
    try:
        with replaced_file(out) as file:
            frame.write_parquet(file)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"out={out}: cannot be written ({error}); free space, or name another file") from error
