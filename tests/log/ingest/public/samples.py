"""Folders of the public data sets, in exactly their form, with enough events for a training run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import polars as pl

from tests.log.conftest import write_csv
from tests.log.ingest.public.test_public_sets import (
    HOUSEHOLDS,
    KUAIRAND_COLUMNS,
    KUAIRAND_USER_COLUMNS,
    VIDEO_COLUMNS,
    YAMBDA_ROWS,
    shown,
)

USERS, ITEMS, EVENTS = range(1, 9), range(10, 22), 40
HOUSEHOLD = HOUSEHOLDS.columns[1:]
Draws = list[tuple[int, int, float]]


def draws(seed: int = 0) -> Draws:
    """User, item, and time of each event. Times are in [0, 1], in order per user, and the last one is 1."""
    chance = random.Random(seed)
    times = [sorted([*(chance.random() for _ in range(EVENTS - 1)), 1.0]) for _ in USERS]
    return [(user, chance.choice(ITEMS), time) for user, own in zip(USERS, times, strict=True) for time in own]


def movielens_dat(folder: Path) -> None:
    """Also ml-1m-half, whose ratings have the same form."""
    lines = [f"{user}::{item}::{item % 5 + 1}::{978300000 + int(1e6 * time)}\n" for user, item, time in draws()]
    (folder / "ratings.dat").write_text("".join(lines))
    (folder / "users.dat").write_text("".join(f"{user}::F::{user % 3}::{user % 4}::48067\n" for user in USERS))
    (folder / "movies.dat").write_text("".join(f"{item}::Title: {item}::Drama|War\n" for item in ITEMS))


def movielens_csv(folder: Path) -> None:
    rows = [(user, item, 3.5, 978300000 + int(1e6 * time)) for user, item, time in draws()]
    write_csv(folder / "ratings.csv", rows, "userId,movieId,rating,timestamp")
    write_csv(folder / "movies.csv", [(item, f"Title {item}", "Drama|War") for item in ITEMS], "movieId,title,genres")


def movielens_100k(folder: Path) -> None:
    rows = [f"{user}\t{item}\t3\t{978300000 + int(1e6 * time)}\n" for user, item, time in draws()]
    (folder / "u.data").write_text("".join(rows))
    (folder / "u.user").write_text("".join(f"{user}|{20 + user}|M|writer|85711\n" for user in USERS))


def complete_journey(folder: Path) -> None:
    year = timedelta(days=364)
    user, product, time = zip(*draws(), strict=True)
    times = [datetime(2017, 1, 1) + at * year for at in time]
    columns = {"household_id": user, "store_id": [1] * len(user), "basket_id": range(len(user)), "product_id": product}
    more = {"quantity": [1] * len(user), "sales_value": [2.5] * len(user), "transaction_timestamp": times}
    pl.DataFrame(columns | more).write_parquet(folder / "transactions.parquet")
    names = ("department", "brand", "product_category", "product_type", "package_size")
    texts = {name: [f"{name} {item % 3}" for item in ITEMS] for name in names}
    pl.DataFrame({"product_id": ITEMS, "manufacturer_id": [item % 4 for item in ITEMS]} | texts).write_parquet(
        folder / "products.parquet"
    )
    households = {name: [HOUSEHOLDS[name][user % 2] for user in USERS] for name in HOUSEHOLD}
    pl.DataFrame({"household_id": USERS} | households).write_parquet(folder / "demographics.parquet")


def amazon_reviews(folder: Path) -> None:
    rows = [(f"A{user}", f"B{item}", 4.0, 1_500_000_000_000 + int(1e10 * time)) for user, item, time in draws()]
    write_csv(folder / "All_Beauty.csv", rows, "user_id,parent_asin,rating,timestamp")
    products = [
        {"main_category": "All Beauty", "price": 2.5 * item, "store": f"Shop {item % 3}", "categories": ["a", "b"]}
        | {"parent_asin": f"B{item}"}
        for item in ITEMS
    ]
    (folder / "meta_All_Beauty.jsonl").write_text("".join(json.dumps(product) + "\n" for product in products))


def kuairand(folder: Path) -> None:
    """Every second row is a click; every fifth was not played, so it is not an event."""
    rows = [
        shown(user, item, int(2.5e6 * time), f"{number % 2}000000", 0 if number % 5 == 0 else 900)
        for number, (user, item, time) in enumerate(draws())
    ]
    write_csv(folder / "log_standard_4_08_to_4_21_1k.csv", rows, ",".join(KUAIRAND_COLUMNS))
    videos = [
        (item, 1, "NORMAL", "2022-03-25", "Web", 0, 9000, 720, 1280, 5, item % 3, '"12,65"' if item % 2 else 39)
        for item in ITEMS
    ]
    profiles = [(user, "full_active", *[0] * 29) for user in USERS]
    write_csv(folder / "user_features_1k.csv", profiles, ",".join(KUAIRAND_USER_COLUMNS))
    write_csv(folder / "video_features_basic_1k.csv", videos, ",".join(VIDEO_COLUMNS))


def yambda(folder: Path) -> None:
    """The newest event of each user is at 26,000,000 seconds; some listens are short."""
    last = 26_000_000
    rows = [
        (user, last - 5 * int((1 - time) * 40_000), item, 1, "listen", 100 * (number % 4 > 0), 200)
        for number, (user, item, time) in enumerate(draws())
    ]
    pl.DataFrame(rows, schema=YAMBDA_ROWS.schema, orient="row").write_parquet(folder / "multi_event.parquet")


def assist17(folder: Path) -> None:
    """Students have one of two skills, and answer most problems of that skill right, and few others."""
    rows = [
        (user, item, item % 2, order, (user + item + (order % 7 == 0)) % 2)
        for order, (user, item, _) in enumerate(draws())
    ]
    schema = ["student", "problem", "skill", "order", "correct"]
    pl.DataFrame(rows, schema=schema, orient="row").write_parquet(folder / "answers.parquet")


def dev_packages(folder: Path) -> None:
    user, item, time = zip(*draws(), strict=True)
    seconds = [1_500_000_000 + int(1e8 * at) for at in time]
    columns = {"user": user, "item": item, "timestamp": seconds, "collection": [0] * len(user)}
    pl.DataFrame(columns).write_parquet(folder / "events.parquet")


SAMPLES: dict[str, Callable[[Path], None]] = {
    "ml-1m": movielens_dat,
    "ml-1m-half": movielens_dat,
    "ml-latest-small": movielens_csv,
    "ml-100k": movielens_100k,
    "complete-journey": complete_journey,
    "bought-again": complete_journey,
    "amazon-reviews-2023": amazon_reviews,
    "kuairand": kuairand,
    "yambda": yambda,
    "dev-packages": dev_packages,
    "assist17": assist17,
}
"""Writes a sample into an empty folder, by the name of the experiment on the set."""
