"""The events of Yambda: one per row, or in the sequential files, lists of one user's events per row."""

from __future__ import annotations

from pathlib import Path

from vista.log.ingest.column_names import check_columns
from vista.log.ingest.public_sets import PUBLIC_SETS, remedy_of_kind
from vista.log.ingest.scanned_source import ROW
from vista.log.polars_extra import pl

YAMBDA = "yambda"
LISTEN = "listen"
LONG_LISTEN, LONG_PERCENT = "listen+", 50
"""The action of a listen of which at least this share was played."""


def yambda_events(file: Path) -> tuple[pl.LazyFrame, dict[str, str]]:
    """The events of a file. Their action is the event type; a file of one type, such as likes.parquet, has its name.

    Returns:
        (canonical frame, names of the columns in the file).

    Raises:
        DataError: if the file lacks a column.
    """
    given = PUBLIC_SETS[YAMBDA].event_columns(file.name)
    columns = {name: given[name] for name in ("user", "item", "timestamp", "action") if name in given}
    action = pl.col("action").cast(pl.String) if "action" in columns else pl.lit(file.stem.removesuffix("s"))
    used = dict(columns)
    if "action" in columns or file.stem.removesuffix("s") == LISTEN:
        used["played"] = "played_ratio_pct"
        is_long = (action == LISTEN) & (pl.col("played") >= LONG_PERCENT)
        action = pl.when(is_long).then(pl.lit(LONG_LISTEN)).otherwise(action)
    rows = pl.scan_parquet(file, glob=False)
    types = rows.collect_schema()
    check_columns(str(file), used, types, "events", remedy_of_kind(YAMBDA))
    lists = [name for name, own in used.items() if isinstance(types[own], pl.List)]
    rows = rows.select(pl.col(own).alias(name) for name, own in used.items())
    if lists:
        rows = rows.filter(pl.col(lists[0]).list.len() > 0).explode(lists)
    frame = rows.select("user", "item", "timestamp", action.alias("action")).with_row_index(ROW, 1)
    return frame, columns | {"action": columns.get("action", "played_ratio_pct")}
