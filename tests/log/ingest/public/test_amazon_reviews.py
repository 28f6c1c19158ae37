"""Amazon Reviews 2023, on small samples of the public form."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.log.feature_tables import features_of
from tests.log.ingest.set_logs import events_of, load
from vista.errors import DataError
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
PRODUCTS: list[dict[str, Any]] = [
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
FEATURES = {
    "main_category": {"0123456789": ["All Beauty"]},
    "brand": {"0123456789": ["Howard Products"]},
    "categories": {"B00YQ6X8EO": ["Beauty & Care", "Hair, Ω", 'The "best"']},
    "price": {"B00YQ6X8EO": 1019.5},
}
USER = "AGKHLEW2SOWHNMFQIJGBECAF7INQ"


def json_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    """Write the file as the set has it: non-ASCII text is escaped; compressed if its name ends in .gz."""
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


def write(folder: Path, form: str) -> Path:
    """Reviews as a CSV file of the 5-core or as raw JSON, and the products of the category."""
    folder.mkdir()
    suffix = ".gz" if form.endswith(".gz") else ""
    json_lines(folder / f"meta_All_Beauty.jsonl{suffix}", PRODUCTS)
    if form.startswith("jsonl"):
        json_lines(folder / f"All_Beauty.{form}", REVIEWS)
        return folder
    names = ("user_id", "parent_asin", "rating", "timestamp")
    text = "\n".join(",".join(map(str, row)) for row in [names, *([row[name] for name in names] for row in REVIEWS)])
    content = (text + "\n").encode()
    (folder / f"All_Beauty.{form}").write_bytes(gzip.compress(content) if suffix else content)
    return folder


@pytest.mark.parametrize("form", ["csv", "csv.gz", "jsonl", "jsonl.gz"])
def test_reviews_and_products(tmp_path: Path, form: str) -> None:
    folder = write(tmp_path / "set", form)
    assert detect_kind(folder) == "amazon-reviews-2023"
    log = load(folder)
    assert events_of(log) == [
        (USER, "0123456789", 1588615855070, "event"),
        (USER, "B00YQ6X8EO", 1588687728923, "event"),
    ]
    assert log[USER].rating.tolist() == [4.0, 5.0]  # type: ignore[union-attr]
    assert features_of(log) == FEATURES


def test_filtered_reviews_come_before_raw_ones_and_products_may_be_missing(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "csv")
    json_lines(folder / "All_Beauty.jsonl", REVIEWS * 2)
    (folder / "meta_All_Beauty.jsonl").unlink()
    log = load(folder, "amazon-reviews-2023")
    assert log.num_events == 2 and log.item_features is None


@pytest.mark.parametrize(
    ("price", "number"),
    [(12.5, 12.5), (7, 7), ("from 3.99", None), ("12.99 - 15.00", None), ("—", None), ("None", None), ("$3", 3)],
)
def test_prices(tmp_path: Path, price: Any, number: float | None) -> None:
    folder = write(tmp_path / "set", "jsonl")
    json_lines(folder / "meta_All_Beauty.jsonl", [PRODUCTS[0] | {"price": price}])
    assert features_of(load(folder))["price"] == ({} if number is None else {"0123456789": number})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "All_Beauty.jsonl",
            '{"user_id": "A", "asin": "B"}\n',
            r"column 'parent_asin' is missing, the file has: user_id,",
        ),
        ("All_Beauty.jsonl", "user_id,rating\n", r"All_Beauty\.jsonl: line 1 is not a JSON object"),
        (
            "All_Beauty.csv",
            "user_id,item_id,rating,timestamp\n",
            r"column 'parent_asin' is missing, the file has: user_id",
        ),
        (
            "meta_All_Beauty.jsonl",
            '{"parent_asin": "A"}\n',
            r"meta_All_Beauty\.jsonl: column 'main_category' is missing",
        ),
    ],
)
def test_other_layouts(tmp_path: Path, name: str, content: str, message: str) -> None:
    folder = write(tmp_path / "set", "csv" if name.endswith("csv") else "jsonl")
    (folder / name).write_text(content)
    with pytest.raises(DataError, match=message + r".*; get the set from https://huggingface\.co/datasets/McAuley-Lab"):
        load(folder)


def test_a_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "set", "jsonl")
    with (folder / "All_Beauty.jsonl").open("a") as file:
        file.write('{"user_id": "A", \n')
    with pytest.raises(DataError, match=r"All_Beauty\.jsonl: row 3, column 'user_id': the value is missing"):
        load(folder)
