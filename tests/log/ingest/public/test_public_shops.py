"""Public data sets of shops, on small samples of their forms: Amazon Reviews 2023 and Complete Journey."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load, load_real
from vista.errors import DataError
from vista.log.features import described
from vista.log.ingest.sources import detect_kind

REVIEWS: list[dict[str, Any]] = [
    {
        "rating": 5.0,
        "title": 'Such a "lovely" scent',
        "text": "This, too.<br />Ω\n\tend",
        "images": [],
        "asin": "B00YQ6X8EO",
        "parent_asin": "B00YQ6X8EO",
        "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
        "verified_purchase": True,
    },
    {"rating": 4.0, "title": "", "text": "", "images": [{"small_image_url": "https://x"}], "asin": "B07"}
    | {"parent_asin": "0123456789", "user_id": "AGKHLEW2SOWHNMFQIJGBECAF7INQ", "timestamp": 1588615855070}
    | {"helpful_vote": 2, "verified_purchase": False},
]
AMAZON_PRODUCTS: list[dict[str, Any]] = [
    {
        "main_category": "All Beauty",
        "title": "Howard LC0008",
        "average_rating": 4.8,
        "rating_number": 10,
        "features": [],
        "description": [],
        "price": None,
        "images": [{"thumb": "https://x"}],
        "videos": [],
        "store": "Howard Products",
        "categories": [],
        "details": {"Brand": "Other", "price": 7},
        "parent_asin": "0123456789",
        "bought_together": None,
    },
    {"main_category": None, "title": "Yes", "average_rating": 4.5, "rating_number": 3, "features": ["a"]}
    | {"description": [], "price": "$1,019.50", "images": [], "videos": [], "store": None}
    | {"categories": ["Beauty & Care", "Hair, Ω", 'The "best"'], "details": {}, "parent_asin": "B00YQ6X8EO"}
    | {"bought_together": None},
]
AMAZON_FEATURES = {
    "main_category": {"0123456789": ["All Beauty"]},
    "brand": {"0123456789": ["Howard Products"]},
    "categories": {"B00YQ6X8EO": ["Beauty & Care", "Hair, Ω", 'The "best"']},
    "price": {"B00YQ6X8EO": 1019.5},
}
AMAZON_USER = "AGKHLEW2SOWHNMFQIJGBECAF7INQ"


def json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the file as the set has it: non-ASCII text is escaped; compressed if its name ends in .gz."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write_amazon(folder: Path, form: str) -> Path:
    """Reviews as a CSV file of the 5-core or as raw JSON, and the products of the category."""
    folder.mkdir()
    suffix = ".gz" if form.endswith(".gz") else ""
    json_lines(folder / f"meta_All_Beauty.jsonl{suffix}", AMAZON_PRODUCTS)
    if form.startswith("jsonl"):
        json_lines(folder / f"All_Beauty.{form}", REVIEWS)
        return folder
    names = ("user_id", "parent_asin", "rating", "timestamp")
    text = "\n".join(",".join(map(str, row)) for row in [names, *([row[name] for name in names] for row in REVIEWS)])
    content = (text + "\n").encode()
    (folder / f"All_Beauty.{form}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.mark.parametrize("form", ["csv", "jsonl.gz"])
def test_reviews_and_products(tmp_path: Path, form: str) -> None:
    folder = write_amazon(tmp_path / "set", form)
    assert detect_kind(folder) == "amazon-reviews-2023"
    log = load(folder)
    assert events_of(log) == [
        (AMAZON_USER, "0123456789", 1588615855070, "event"),
        (AMAZON_USER, "B00YQ6X8EO", 1588687728923, "event"),
    ]
    assert log[AMAZON_USER].rating.tolist() == [4.0, 5.0]  # type: ignore[union-attr]
    assert features_of(log) == AMAZON_FEATURES


def test_filtered_reviews_come_before_raw_ones_and_products_may_be_missing(tmp_path: Path) -> None:
    folder = write_amazon(tmp_path / "set", "csv")
    json_lines(folder / "All_Beauty.jsonl", REVIEWS * 2)
    (folder / "meta_All_Beauty.jsonl").unlink()
    log = load(folder, "amazon-reviews-2023")
    assert log.num_events == 2 and log.item_features == {}


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    folder = write_amazon(tmp_path / "set", "jsonl")
    with (folder / "All_Beauty.jsonl").open("a") as file:
        file.write('{"user_id": "A", \n')
    with pytest.raises(DataError, match=r"All_Beauty\.jsonl: row 3, column 'user_id': the value is missing"):
        load(folder)


JOURNEY_PRODUCTS = pl.DataFrame(
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


def write_journey(folder: Path, events: str) -> Path:
    folder.mkdir()
    JOURNEY_PRODUCTS.write_parquet(folder / "products.parquet")
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
    folder = write_journey(tmp_path / "cj", events)
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


@pytest.mark.data
def test_the_real_complete_journey(tmp_path: Path) -> None:
    log = load_real("complete-journey", tmp_path / "log")
    assert (log.num_users, log.num_items, log.num_events) == (1238, 53_185, 738_201)
    assert described(log.item_features, "items")[1] == "brand: category of 2 values, 100% of items"
    known = {name: len(values) for name, values in user_features_of(log).items()}
    missing = {"home_ownership": 419 - 296, "marital_status": 419 - 338}
    assert known == {name: 419 - missing.get(name, 0) for name in HOUSEHOLDS.columns[1:]}


@pytest.mark.parametrize(("file", "lost"), [("households.parquet", "income"), ("products.parquet", "brand")])
def test_a_missing_column_of_a_shop_is_named(tmp_path: Path, file: str, lost: str) -> None:
    folder = write_journey(tmp_path / "set", "events.parquet")
    pl.read_parquet(folder / file).drop(lost).write_parquet(folder / file)
    message = rf"{file}: column '{lost}' is missing, the file has: .*; get the set from https://pypi\.org/project/compl"
    with pytest.raises(DataError, match=message):
        load(folder)
