"""A table of items for a trained model, which has no log."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from vista.config import ItemTableConfig
from vista.config.choices import OnBadRows
from vista.installation import require_module
from vista.log.feature_owner import ITEMS
from vista.log.ingest.new_features import write_features
from vista.log.ingest.parts import read_part
from vista.log.ingest.source_parser import SourceParser
from vista.log.ingest.sources import open_feature_tables
from vista.log.item_features import ItemFeatures
from vista.log.segment_features import SegmentFeatures
from vista.log.segment_files import SegmentFiles
from vista.log.segment_writer import SegmentWriter
from vista.log.vocabulary import Vocabulary

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


def read_items(table: ItemTableConfig, kind: str, dims: Mapping[str, int]) -> tuple[Vocabulary, ItemFeatures | None]:
    """Read a table of items.

    Args:
        table: its files and columns.
        kind: of its ids, int or str.
        dims: by name of a column of vectors, their length.

    Returns:
        The ids in sorted order, and the features of these items; None if there are no items.

    Raises:
        ConfigError, DataError: naming file, row, column, and remedy, if the table is invalid.
    """
    with SourceParser() as parser, tempfile.TemporaryDirectory() as folder:
        sources = open_feature_tables(table, parser)
        kinds = {"user": "str", "item": kind}
        parts = [
            read_part(source, kinds, "items", Path(folder), number, OnBadRows.error)
            for number, source in enumerate(sources)
        ]
        ids = pl.concat([part.good().select("item") for part in parts]).unique().collect()["item"]
        items = Vocabulary.empty(kind).extended(ids.to_numpy() if kind == "int" else ids.to_list())
        if not len(items):
            return items, None
        writer = SegmentWriter(Path(folder))
        written = write_features(ITEMS, parts, items, (), writer, Path(folder), dims=dims)
        # The files stay mapped after the folder is removed.
        files = SegmentFiles(writer.folder, writer.entries)
        features = SegmentFeatures.read(writer.folder, files, ITEMS, written.columns)
        assert features is not None and np.array_equal(features.rows, np.arange(len(items)))
        return items, ItemFeatures(features.columns)


def with_columns(table: ItemTableConfig, kinds: Mapping[str, str]) -> ItemTableConfig:
    """The table with these columns in place of its own.

    Args:
        kinds: name of each column -> category, number, or vector.
    """
    named = {kind: [name for name, its in kinds.items() if its == kind] for kind in ("category", "number", "vector")}
    return replace(table, categories=named["category"], numbers=named["number"], vectors=named["vector"])
