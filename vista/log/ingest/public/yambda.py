"""Yambda: what users of a music service listened to, as one row per event, or as lists of one user's events per row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vista.installation import require_module
from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import ROW, FileScan
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

LISTEN = "listen"
LONG_LISTEN, LONG_PERCENT = "listen+", 50
"""The action of a listen of which at least this share was played."""
_COLUMNS = {"user": "uid", "item": "item_id", "timestamp": "timestamp"}
_PLAYS = {**_COLUMNS, "time_unit": "s"}
_OF_LISTENS = ("played_ratio_pct", "track_length_seconds")
"""Columns that only listens have."""


def read_all_types(file: Path, features: Mapping[str, str]) -> FileScan:
    """The events of a file of all types, whose action is the event type.

    Args:
        features: other columns to read, canonical names to those of the file.

    Raises:
        DataError: if the file lacks a column.
    """
    more = {"action": "event_type", "played": "played_ratio_pct"}
    return _read(file, more, features, pl.col("action").cast(pl.String))


def read_one_type(file: Path, features: Mapping[str, str]) -> FileScan:
    """The events of a file such as likes.parquet, whose action is its name.

    Args:
        features: as `read_all_types`; those of listens are missing in other files.

    Raises:
        DataError: if the file lacks a column.
    """
    name = file.stem.removesuffix("s")
    if name == LISTEN:
        return _read(file, {"played": "played_ratio_pct"}, features, pl.lit(name))
    there = {canonical: own for canonical, own in features.items() if own not in _OF_LISTENS}
    scan = _read(file, {}, there, pl.lit(name))
    missing = [pl.lit(None, pl.Int64).alias(canonical) for canonical in features if canonical not in there]
    columns = {**scan.columns, **features}
    return replace(scan, frame=scan.frame.with_columns(missing).select(ROW, *columns), columns=columns)


def _read(file: Path, more: dict[str, str], features: Mapping[str, str], action: pl.Expr) -> FileScan:
    used = _COLUMNS | more | dict(features)
    if "played" in more:
        is_long = (action == LISTEN) & (pl.col("played") >= LONG_PERCENT)
        action = pl.when(is_long).then(pl.lit(LONG_LISTEN)).otherwise(action)
    rows = pl.scan_parquet(file, glob=False)
    types = rows.collect_schema()
    check_columns(str(file), used, types, "events", YAMBDA.remedy)
    lists = [name for name, own in used.items() if isinstance(types[own], pl.List)]
    rows = rows.select(pl.col(own).alias(name) for name, own in used.items())
    if lists:
        rows = rows.filter(pl.col(lists[0]).list.len() > 0).explode(lists)
    columns = _COLUMNS | {"action": more.get("action", "played_ratio_pct")} | dict(features)
    frame = rows.with_columns(action.alias("action")).select(*columns).with_row_index(ROW, 1)
    return FileScan(frame, columns, is_text=False, time_unit="s")


YAMBDA = PublicSet(
    events=(
        FileForm(("multi_event.parquet",), {**_PLAYS, "action": "event_type"}, read_named=read_all_types),
        FileForm(
            ("listens.parquet", "likes.parquet", "dislikes.parquet", "unlikes.parquet", "undislikes.parquet"),
            _PLAYS,
            read_named=read_one_type,
        ),
    ),
    url="https://huggingface.co/datasets/yandex/yambda",
)
