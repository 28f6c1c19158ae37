"""Yambda: what users of a music service listened to, as one row per event, or as lists of one user's events per row."""

from __future__ import annotations

from pathlib import Path

from vista.log.ingest.column_names import check_columns
from vista.log.ingest.file_scan import ROW, FileScan
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet
from vista.log.polars_extra import pl

LISTEN = "listen"
LONG_LISTEN, LONG_PERCENT = "listen+", 50
"""The action of a listen of which at least this share was played."""
_COLUMNS = {"user": "uid", "item": "item_id", "timestamp": "timestamp"}
_PLAYS = {**_COLUMNS, "time_unit": "s"}


def read_all_types(file: Path) -> FileScan:
    """The events of a file of all types, whose action is the event type.

    Raises:
        DataError: if the file lacks a column.
    """
    return _read(file, {"action": "event_type", "played": "played_ratio_pct"}, pl.col("action").cast(pl.String))


def read_one_type(file: Path) -> FileScan:
    """The events of a file such as likes.parquet, whose action is its name.

    Raises:
        DataError: if the file lacks a column.
    """
    name = file.stem.removesuffix("s")
    return _read(file, {"played": "played_ratio_pct"} if name == LISTEN else {}, pl.lit(name))


def _read(file: Path, more: dict[str, str], action: pl.Expr) -> FileScan:
    used = _COLUMNS | more
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
    frame = rows.select(*_COLUMNS, action.alias("action")).with_row_index(ROW, 1)
    columns = _COLUMNS | {"action": more.get("action", "played_ratio_pct")}
    return FileScan(frame, columns, is_text=False, time_unit="s")


YAMBDA = PublicSet(
    events=(
        FileForm(("multi_event.parquet",), {**_PLAYS, "action": "event_type"}, read_all_types),
        FileForm(
            ("listens.parquet", "likes.parquet", "dislikes.parquet", "unlikes.parquet", "undislikes.parquet"),
            _PLAYS,
            read_one_type,
        ),
    ),
    url="https://huggingface.co/datasets/yandex/yambda",
)
