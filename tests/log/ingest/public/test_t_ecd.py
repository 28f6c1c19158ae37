"""T-ECD, on a small sample of the public form: the files of the marketplace as they are, others as code reads them."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load
from tests.log.log_oracle import values_of
from vista.errors import DataError
from vista.log.ingest.sources import detect_kind

DAY, DAY_MS = 1307, 86_400_000
USER = pl.UInt64
EVENTS: dict[str, tuple[list[tuple[Any, ...]], dict[str, Any]]] = {
    "marketplace/events": (
        [(1, 5, "nfmcg_7", "u2i", "view", "android"), (2, 5, "nfmcg_7", None, "like", "ios")],
        {"timestamp": pl.Duration("us"), "user_id": USER, "item_id": pl.String, "subdomain": pl.String}
        | {"action_type": pl.String, "os": pl.String},
    ),
    "retail/events": (
        [(3, 5, "fmcg_1", "main", "added_to_cart", "other"), (4, 9, "fmcg_1", "search", "order", "ios")],
        {"timestamp": pl.Duration("us"), "user_id": USER, "item_id": pl.String, "subdomain": pl.String}
        | {"action_type": pl.String, "os": pl.String},
    ),
    "offers/events": (
        [(5, 5, "offer_2", "click")],
        {"timestamp": pl.Duration("ns"), "user_id": USER, "item_id": pl.String, "action_type": pl.String},
    ),
    "payments/events": (
        [(6, 9, 11, -10.5, "a"), (7, 9, None, 3.0, "b")],
        {"timestamp": pl.Duration("us"), "user_id": USER, "brand_id": pl.Float64, "price": pl.Float32}
        | {"transaction_hash": pl.String},
    ),
    "reviews": (
        [(8, 5, 11, 5, [0.0] * 312)],
        {"timestamp": pl.Duration("us"), "user_id": USER, "brand_id": pl.Int64, "rating": pl.Int64}
        | {"embedding": pl.List(pl.Float32)},
    ),
}
"""Second of the day, user, and the rest of each row, by the folder of a domain's days."""
ITEMS = {
    "marketplace": pl.DataFrame(
        {"item_id": ["nfmcg_7"], "brand_id": [11], "category": ["Home"], "subcategory": [None], "price": [-0.5]}
        | {"embedding": [[1.0, 2.0]]},
        schema_overrides={"subcategory": pl.String, "price": pl.Float32},
    ),
    "retail": pl.DataFrame(
        {"item_id": ["fmcg_1", "fmcg_2"], "brand_id": [12.0, None], "category": ["Food", "Food"]}
        | {"subcategory": ["Milk", "Tea"], "price": [1.5, None], "embedding": [[3.0, 4.0], None]}
    ),
    "offers": pl.DataFrame({"item_id": ["offer_2"], "embedding": [[5.0, 6.0]]}),
}
EXPECTED = [
    (5, "nfmcg_7", 1_000, "view", "marketplace", "u2i", "android"),
    (5, "nfmcg_7", 2_000, "like", "marketplace", None, "ios"),
    (5, "fmcg_1", 3_000, "added_to_cart", "retail", "main", "other"),
    (5, "offer_2", 5_000, "click", "offers", None, None),
    (5, "brand_11", 8_000, "review", "reviews", None, None),
    (9, "fmcg_1", 4_000, "order", "retail", "search", "ios"),
    (9, "brand_11", 6_000, "payment", "payments", None, None),
]


def write(folder: Path) -> Path:
    """The set with the same events on two days."""
    for name, (rows, schema) in EVENTS.items():
        (folder / name).mkdir(parents=True)
        for day in (DAY, DAY + 1):
            times = [timedelta(days=day, seconds=row[0]) for row in rows]
            moved = [(time, *row[1:]) for time, row in zip(times, rows, strict=True)]
            pl.DataFrame(moved, schema=schema, orient="row").write_parquet(folder / name / f"{day:05d}.pq")
    (folder / "payments" / "receipts").mkdir()
    pl.DataFrame({"user_id": [5]}).write_parquet(folder / "payments" / "receipts" / f"{DAY:05d}.pq")
    for domain, items in ITEMS.items():
        items.write_parquet(folder / domain / "items.pq")
    users = {"user_id": [5, 9, 77], "socdem_cluster": [3.0, None, 1.0], "region": [1, 22, None]}
    pl.DataFrame(users).write_parquet(folder / "users.pq")
    pl.DataFrame({"brand_id": [11], "embedding": [[0.0]]}).write_parquet(folder / "brands.pq")
    return folder


def test_events_of_all_domains(tmp_path: Path) -> None:
    folder = write(tmp_path / "small")
    assert detect_kind(folder) == "t-ecd"
    log = load(folder)
    expected = sorted(
        ((user, item, time + day * DAY_MS, *rest) for user, item, time, *rest in EXPECTED for day in (DAY, DAY + 1)),
        key=lambda event: (event[0], event[2]),
    )
    features = values_of(log.gather(np.arange(log.num_users)).features, log.event_features)
    found = [(*event, *more.values()) for event, more in zip(events_of(log), features, strict=True)]
    assert found == expected
    assert user_features_of(log) == {"socdem_cluster": {5: "3"}, "region": {5: "1", 9: "22"}}


def test_items_of_all_domains(tmp_path: Path) -> None:
    assert features_of(load(write(tmp_path / "small"))) == {
        "brand_id": {"nfmcg_7": ["11"], "fmcg_1": ["12"]},
        "category": {"nfmcg_7": ["Home"], "fmcg_1": ["Food"]},
        "subcategory": {"fmcg_1": ["Milk"]},
        "price": {"nfmcg_7": -0.5, "fmcg_1": 1.5},
        "embedding": {"nfmcg_7": [1.0, 2.0], "fmcg_1": [3.0, 4.0], "offer_2": [5.0, 6.0]},
    }


@pytest.mark.parametrize("domain", ["retail", "reviews"])
def test_the_folder_of_one_domain(tmp_path: Path, domain: str) -> None:
    log = load(write(tmp_path / "small") / domain, "t-ecd")
    values = log.event_features["domain"]
    assert values is not None and values.ids([0]).tolist() == [domain] and len(values) == 1
    assert (log.item_features is not None) == (domain == "retail")


def test_times_in_microseconds(tmp_path: Path) -> None:
    folder = write(tmp_path / "small")
    for file in (folder / "retail" / "events").iterdir():
        pl.read_parquet(file).with_columns(pl.col("timestamp").dt.total_microseconds()).write_parquet(file)
    assert (9, "fmcg_1", 4_000 + DAY * DAY_MS, "order") in events_of(load(folder))


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("marketplace/events/01307.pq", "action_type"),
        ("reviews/01308.pq", "brand_id"),
        ("payments/events/01307.pq", "user_id"),
        ("offers/items.pq", "item_id"),
        ("retail/items.pq", "embedding"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, file: str, lost: str) -> None:
    folder = write(tmp_path / "small")
    pl.read_parquet(folder / file).drop(lost).write_parquet(folder / file)
    message = (
        rf"{file}: column '{lost}' is missing, the file has: .*; get the set from https://huggingface\.co/datasets/t-"
    )
    with pytest.raises(DataError, match=message):
        load(folder)


def test_times_of_another_type(tmp_path: Path) -> None:
    folder = write(tmp_path / "small")
    file = folder / "offers" / "events" / "01307.pq"
    pl.read_parquet(file).with_columns(timestamp=pl.lit("1 day")).write_parquet(file)
    with pytest.raises(
        DataError, match=r"01307\.pq: column 'timestamp' has type String, but that of the set is the dur"
    ):
        load(folder)


def test_a_folder_that_is_no_domain(tmp_path: Path) -> None:
    folder = write(tmp_path / "small")
    (folder / "offers").rename(folder / "coupons")
    with pytest.raises(
        DataError, match=r"01307\.pq: is not in the folder of a domain, which is marketplace, retail, off"
    ):
        load(folder / "coupons", "t-ecd")
