"""Tables of items from which commands make a new column: their texts or vectors are read, the column is written."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vista.arrays import Float32s
from vista.config import ItemsEmbedConfig, ItemTableConfig, SourceConfig
from vista.config.choices import OnBadRows
from vista.errors import ConfigError, DataError
from vista.files import check_replaceable, checked_path, create_file, sync
from vista.installation import require_module
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.new_features import check_one_row_each
from vista.log.ingest.parts import ORDER, read_part
from vista.log.ingest.public.public_sets import PUBLIC_SETS
from vista.log.ingest.row_rules import id_kind
from vista.log.ingest.source_formats import is_parquet
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import KINDS, FileSource, open_feature_tables, open_set_features, with_kind

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


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
    """Refuse a new file that is one of the files that are read, or lies in a folder that is read.

    Raises:
        ConfigError: naming the file.
    """
    read = [checked_path(path, DataError).resolve() for path in paths]
    if not {out.resolve(), out.resolve().parent}.isdisjoint(read):
        raise ConfigError(f"out={out}: is one of the files that are read, or in their folder; name another file")


def write_values(frame: pl.DataFrame, out: Path) -> None:
    """Write a Parquet file atomically and durably, replacing an older one.

    Raises:
        ConfigError: if it cannot be written, for example because the disk is full.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        check_replaceable(out)
        with create_file(partial, 0o666) as file:
            frame.write_parquet(file)
        sync(partial)
        partial.replace(out)
        sync(out.absolute().parent)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise ConfigError(f"out={out}: cannot be written ({error}); free space, or name another file") from error
    finally:
        partial.unlink(missing_ok=True)
