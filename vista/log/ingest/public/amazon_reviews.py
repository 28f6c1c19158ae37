"""Amazon Reviews 2023: reviews and products of one category. The filtered reviews are CSV, the rest JSON Lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vista.installation import require_module
from vista.log.ingest.file_scan import FileScan
from vista.log.ingest.json_lines import scan_json_lines
from vista.log.ingest.public.file_form import FileForm
from vista.log.ingest.public.public_set import PublicSet

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")

_REVIEW_FIELDS = {"user": "user_id", "item": "parent_asin", "rating": "rating", "timestamp": "timestamp"}
_REVIEWS = {**_REVIEW_FIELDS, "time_unit": "ms"}


def read_reviews(file: Path) -> FileScan:
    """The reviews of a file of JSON Lines.

    Raises:
        DataError: as `scan_json_lines`.
    """
    rows = scan_json_lines(file, list(_REVIEW_FIELDS.values()), "events", AMAZON_REVIEWS.remedy)
    frame = rows.rename({own: canonical for canonical, own in _REVIEW_FIELDS.items()})
    return FileScan(frame, _REVIEW_FIELDS, is_text=False, time_unit="ms")


def read_products(file: Path) -> FileScan:
    """The products of a file of JSON Lines.

    Returns:
        Columns `parent_asin`, `main_category`, `brand` (the store), `categories` as lists of text, and `price`, which
        is missing where it is not one number.

    Raises:
        DataError: as `scan_json_lines`.
    """
    fields = ["parent_asin", "main_category", "store", "categories", "price"]
    rows = scan_json_lines(file, fields, "items", AMAZON_REVIEWS.remedy)
    price = pl.col("price").str.strip_prefix("$").str.replace_all(",", "", literal=True)
    frame = rows.with_columns(
        pl.col("categories").str.json_decode(pl.List(pl.String)), price.cast(pl.Float64, strict=False)
    ).rename({"store": "brand"})
    names = {"brand": "store"}
    return FileScan(frame, {name: names.get(name, name) for name in frame.collect_schema()}, is_text=False)


AMAZON_REVIEWS = PublicSet(
    # Names of categories begin with a capital letter.
    events=(
        FileForm(("[A-Z]*.csv", "[A-Z]*.csv.gz"), _REVIEWS),
        FileForm(("[A-Z]*.jsonl", "[A-Z]*.jsonl.gz"), _REVIEWS, read_reviews),
    ),
    items=(
        FileForm(
            ("meta_*.jsonl", "meta_*.jsonl.gz"),
            {"item": "parent_asin", "categories": ["main_category", "brand", "categories"], "numbers": ["price"]},
            read_products,
        ),
    ),
    marker="meta_*.jsonl*",
    has_text_ids=True,
    url="https://huggingface.co/datasets/McAuley-Lab/Amazon-Reviews-2023",
)
