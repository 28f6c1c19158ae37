"""Tables of item features, prepared for tests, and the features of a log's items and users as plain dictionaries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from tests.log.conftest import PARSER, write_csv
from vista.config import ItemTableConfig, PrepareConfig, SourceConfig
from vista.log.event_log import EventLog
from vista.log.features import Column
from vista.log.ingest.prepare import PrepareReport, prepare

EVENTS = [(1, 10, 1), (1, 20, 2), (2, 30, 3), (2, 40, 4)]


def add_items(
    folder: Path, *files: Path, append: bool = False, on_bad_rows: str = "raise", events: Any = None, **items: Any
) -> PrepareReport:
    """Prepare item tables, with the events of EVENTS unless they are appended."""
    source = SourceConfig(timestamp="timestamp", time_unit="s")
    if not append or events:
        source.paths = [str(write_csv(folder / f"events-{append}.csv", events or EVENTS))]
    table = ItemTableConfig(paths=[str(file) for file in files], **items)
    settings = PrepareConfig(
        out=str(folder / "log"), events=source, items=table, append=append, on_bad_rows=on_bad_rows
    )  # type: ignore[arg-type]
    return prepare(settings, parser=PARSER)


def table_of(folder: Path, **columns: list[Any]) -> Path:
    """A Parquet file of only these columns."""
    pl.DataFrame(columns).write_parquet(folder / "items.parquet")
    return folder / "items.parquet"


def text_file(folder: Path, content: str, name: str = "items.csv") -> Path:
    (folder / name).write_text(content)
    return folder / name


def features_of(log: EventLog) -> dict[str, dict[Any, Any]]:
    """The features of a log that are not missing: column -> id -> values, number, or vector."""
    ids = log.items.ids(np.arange(log.num_items)).tolist()
    return {
        name: {item: value for item, value in zip(ids, _values(column), strict=True) if value not in (None, [])}
        for name, column in log.item_features.items()
    }


def _values(column: Column) -> list[Any]:
    if column.kind == "number":
        return [None if np.isnan(number) else number for number in column.data.tolist()]
    if column.kind == "vector":
        return [None if np.isnan(vector).all() else vector for vector in column.data.tolist()]
    return [names_of(column, row) for row in range(len(column.is_known))]


def names_of(column: Column, row: int) -> list[str]:
    """The values of one item, sorted."""
    assert column.values is not None and column.offsets is not None
    codes = column.data[column.offsets[row] : column.offsets[row + 1]]
    assert (np.diff(codes) > 0).all()
    return sorted(column.values.ids(codes).tolist())


def user_features_of(log: EventLog) -> dict[str, dict[Any, Any]]:
    """The features of users that are not missing: column -> id -> value."""
    rows = np.flatnonzero(log.users.has_ids(np.arange(log.num_users)))
    ids, found = log.users.ids(rows).tolist(), {}
    for name, column in log.user_features.items():
        data, values = column.data[rows].tolist(), column.values
        texts = data if values is None else [None if code < 0 else values.ids([code])[0] for code in data]
        found[name] = {user: text for user, text in zip(ids, texts, strict=True) if text is not None and text == text}
    return found
