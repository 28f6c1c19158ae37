"""Yambda, on small samples of the public forms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.ingest.set_logs import events_of, load
from tests.log.log_oracle import values_of
from vista.errors import DataError
from vista.log.ingest.sources import detect_kind

TYPES = ("listen", "dislike", "like", "undislike", "unlike")
ROWS = pl.DataFrame(
    [
        (100, 5, 8326270, 0, "listen", 95, 170),
        (100, 10, 1441281, 1, "listen", 49, 215),
        (100, 10, 286361, 0, "like", None, None),
        (200, 0, 8326270, 1, "dislike", None, None),
        (200, 25999995, 3397170, 0, "listen", 50, 225),
        (200, 25999995, 8326270, 1, "undislike", None, None),
        (200, 26000000, 3397170, 1, "listen", 120, 225),
    ],
    schema={
        "uid": pl.UInt32,
        "timestamp": pl.UInt32,
        "item_id": pl.UInt32,
        "is_organic": pl.UInt8,
        "event_type": pl.Enum(TYPES),
        "played_ratio_pct": pl.UInt16,
        "track_length_seconds": pl.UInt32,
    },
    orient="row",
)
EVENTS = [
    (100, 8326270, 5_000, "listen+"),
    (100, 1441281, 10_000, "listen"),
    (100, 286361, 10_000, "like"),
    (200, 8326270, 0, "dislike"),
    (200, 3397170, 25_999_995_000, "listen+"),
    (200, 8326270, 25_999_995_000, "undislike"),
    (200, 3397170, 26_000_000_000, "listen+"),
]


def sequential(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per user, with the other columns as lists; also a user without events."""
    lists = rows.group_by("uid", maintain_order=True).all()
    empty: dict[str, Any] = {name: [[]] for name in lists.columns[1:]}
    return pl.concat([lists, pl.DataFrame({"uid": [150], **empty}, schema=lists.schema)])


@pytest.mark.parametrize("form", ["flat", "sequential"])
@pytest.mark.parametrize("files", ["multi_event", "one per type"])
def test_events_and_named_features(tmp_path: Path, form: str, files: str) -> None:
    folder = tmp_path / "50m"
    folder.mkdir()
    tables = {f"{kind}s": ROWS.filter(pl.col("event_type") == kind).drop("event_type") for kind in TYPES}
    tables = {
        name: table if name == "listens" else table.drop("played_ratio_pct", "track_length_seconds")
        for name, table in tables.items()
        if len(table)
    }
    if files == "multi_event":
        tables |= {"multi_event": ROWS}  # the other files are there too, and ignored
    for name, table in tables.items():
        (table if form == "flat" else sequential(table)).write_parquet(folder / f"{name}.parquet")
    assert detect_kind(folder) == "yambda"
    log = load(folder, categories=["is_organic"], numbers=["played_ratio_pct"])
    assert (log.num_users, log.num_events) == (2, len(EVENTS))
    if files == "multi_event":
        assert events_of(log) == EVENTS
    assert set(events_of(log)) == set(EVENTS)
    features = values_of(log.gather(np.arange(2)).features, log.event_features)
    found = {event: tuple(row.values()) for event, row in zip(events_of(log), features, strict=True)}
    of_rows = [(str(row["is_organic"]), row["played_ratio_pct"]) for row in ROWS.rows(named=True)]
    assert found == dict(zip(EVENTS, of_rows, strict=True))


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("multi_event", "event_type"),
        ("multi_event", "played_ratio_pct"),
        ("listens", "uid"),
        ("listens", "played_ratio_pct"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, name: str, lost: str) -> None:
    ROWS.drop(lost).write_parquet(tmp_path / f"{name}.parquet")
    message = (
        rf"{name}\.parquet: column '{lost}' is missing, the file has: .*; get the set from https://huggingface\.co"
    )
    with pytest.raises(DataError, match=message):
        load(tmp_path, "yambda")


def test_a_folder_of_another_kind(tmp_path: Path) -> None:
    ROWS.write_parquet(tmp_path / "events.parquet")
    with pytest.raises(
        DataError, match=r"has no multi_event\.parquet or listens\.parquet or .*kind=yambda reads; get the"
    ):
        load(tmp_path, "yambda")
