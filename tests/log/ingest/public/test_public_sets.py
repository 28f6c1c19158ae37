"""Public data sets of videos, films, and music, on small samples of their forms. Public data sets of shops, on
small samples of their forms: Amazon Reviews 2023 and Complete Journey."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER, write_csv
from tests.log.feature_tables import features_of, user_features_of
from tests.log.ingest.set_logs import events_of, load, load_real
from tests.log.log_oracle import values_of
from vista.config import PrepareConfig, SourceConfig
from vista.errors import DataError
from vista.evaluation.cases import impression_cases
from vista.log.event_log import EventLog
from vista.log.features import described
from vista.log.ingest.prepare import prepare
from vista.log.ingest.sources import detect_kind
from vista.log.splits import parse_time

MOVIELENS_RATINGS = {
    "ml-1m": ("ratings.dat", "1::1::5::978300760\n1::260::4::978300761\n2::9::3::978300762\n"),
    "ml-100k": ("u.data", "1\t1\t5\t978300760\n1\t260\t4\t978300761\n2\t9\t3\t978300762\n"),
    "ml-latest-small": (
        "ratings.csv",
        "userId,movieId,rating,timestamp\r\n1,1,5.0,978300760\r\n1,260,4.0,978300761\r\n2,9,3.5,978300762\r\n",
    ),
}
MOVIES = {
    "ml-1m": (
        "movies.dat",
        "1::Toy Story (1995)::Animation|Children's\n260::Star Wars: Épisode IV (1977)::Sci-Fi\n"
        "999::Never rated (1999)::War\n",
    ),
    "ml-100k": (
        "u.item",
        "1|Toy Story (1995)|01-Jan-1995||http://us.imdb.com/M/title-exact?Toy%20Story%20(1995)|"
        "0|0|0|1|1|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n"
        "260|Épisode IV (1977)|01-Jan-1977||http://x|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|1|0|0|0\n"
        "9|unknown||||1|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0|0\n",
    ),
    "ml-latest-small": (
        "movies.csv",
        'movieId,title,genres\r\n1,Toy Story (1995),Animation|Children\'s\r\n260,"Épisode, IV (1977)",Sci-Fi\r\n'
        "9,Café (2000),(no genres listed)\r\n",
    ),
}
MOVIELENS_USERS = {
    "ml-1m": ("users.dat", "1::F::1::10::48067\n2::M::56::16::70072\n9::M::25::15::55117-2401\n"),
    "ml-100k": ("u.user", "1|24|F|technician|85711\n2|53|M|other|V3N4P\n9|23|M|writer|32067\n"),
}


def write_movielens(folder: Path, kind: str) -> Path:
    """The files of a set; those with genres in Latin-1, but movies.csv in UTF-8."""
    folder.mkdir()
    (name, ratings), (items, movies) = MOVIELENS_RATINGS[kind], MOVIES[kind]
    (folder / name).write_text(ratings, newline="")
    (folder / items).write_text(movies, newline="", encoding="utf-8" if items == "movies.csv" else "latin-1")
    return folder


@pytest.mark.parametrize("kind", MOVIELENS_RATINGS)
def test_genres_and_ratings_without_them(tmp_path: Path, kind: str) -> None:
    folder = write_movielens(tmp_path / "set", kind)
    log = load(folder)
    assert events_of(log)[1] == (1, 260, 978300761000, "event")
    assert features_of(log) == {"genres": {1: ["Animation", "Children's"], 260: ["Sci-Fi"]}}
    (folder / MOVIES[kind][0]).unlink()
    assert load(folder.rename(tmp_path / "alone"), kind).item_features == {}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("ml-1m", {"gender": {1: "F", 2: "M"}, "age": {1: "1", 2: "56"}, "occupation": {1: "10", 2: "16"}}),
        ("ml-100k", {"gender": {1: "F", 2: "M"}, "occupation": {1: "technician", 2: "other"}, "age": {1: 24, 2: 53}}),
    ],
)
def test_users(tmp_path: Path, kind: str, expected: Any) -> None:
    folder = write_movielens(tmp_path / "set", kind)
    name, users = MOVIELENS_USERS[kind]
    (folder / name).write_text(users)
    assert user_features_of(load(folder)) == expected


FLAGS = ("is_click", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "long_view")
KUAIRAND_COLUMNS = (
    *("user_id", "video_id", "date", "hourmin", "time_ms", *FLAGS, "play_time_ms", "duration_ms"),
    *("profile_stay_time", "comment_stay_time", "is_profile_enter", "is_rand", "tab"),
)
VIDEO_COLUMNS = (
    *("video_id", "author_id", "video_type", "upload_dt", "upload_type", "visible_status", "video_duration"),
    *("server_width", "server_height", "music_id", "music_type", "tag"),
)
KUAIRAND_USER_COLUMNS = (
    *("user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"),
    *("follow_user_num", "follow_user_num_range", "fans_user_num", "fans_user_num_range"),
    *("friend_user_num", "friend_user_num_range", "register_days", "register_days_range"),
    *(f"onehot_feat{number}" for number in range(18)),
)
KUAIRAND_NAMES = {
    "pure": ("log_standard_4_08_to_4_21_pure.csv", "log_standard_4_22_to_5_08_pure.csv"),
    "27k": ("log_standard_4_08_to_4_21_27k_part1.csv", "log_standard_4_08_to_4_21_27k_part2.csv"),
}
KUAIRAND_TIME = 1649400000000


def shown(user: int, video: int, seconds: int, flags: str, play_time_ms: int) -> tuple[int, ...]:
    """A row of the log; `flags` has one digit per name of FLAGS."""
    time = KUAIRAND_TIME + 1000 * seconds
    return (user, video, 20220408, 1400, time, *map(int, flags), play_time_ms, 9000, 0, 0, 0, 0, video % 3)


EARLIER = [
    shown(7, 10, 1, "1000001", 9000),  # long view
    shown(7, 11, 2, "0000000", 0),  # not played
    shown(7, 12, 3, "0000000", 500),
    shown(7, 13, 4, "1000010", 800),  # hated
    shown(9, 10, 5, "1110101", 9000),  # followed
]
LATER = [shown(9, 12, 60, "1100000", 4000), shown(9, 11, 61, "1000000", 100)]
VIDEOS = [
    (10, 1, "NORMAL", "2022-03-25", "ShortImport", 0, 9000, 720, 1280, 5, 9, '"12,65"'),
    (11, 2, "AD", "2022-03-26", "LongImport", 0, "", 1080, 1920, 6, "", 39),
    (99, 2, "NORMAL", "2022-03-26", "Web", 0, 1.0, 1080, 1920, 6, 4, ""),
]
PROFILES = [
    (7, "full_active", 0, 0, 1, 52, "(50,100]", 0, "0", 3, "[1,5)", 107, "61-90", 0, *[1] * 16, ""),
    (8, "UNKNOWN", 0, 0, 0, 5, "(0,10]", 1, "[1,10)", 0, "0", 8, "8-14", 1, *[0] * 16, 2.0),
]


def write_kuairand(folder: Path, names: tuple[str, str]) -> Path:
    folder.mkdir()
    size = "27k" if "27k" in names[0] else "pure"
    for name, rows in zip(names, (EARLIER, LATER), strict=True):
        write_csv(folder / name, rows, ",".join(KUAIRAND_COLUMNS))
    write_csv(folder / f"log_random_4_22_to_5_08_{size}.csv", LATER, ",".join(KUAIRAND_COLUMNS))
    write_csv(folder / f"video_features_basic_{size}.csv", VIDEOS, ",".join(VIDEO_COLUMNS))
    profiles = [[f'"{value}"' if "," in str(value) else value for value in row] for row in PROFILES]
    write_csv(folder / f"user_features_{size}.csv", profiles, ",".join(KUAIRAND_USER_COLUMNS))
    return folder


@pytest.mark.parametrize("size", KUAIRAND_NAMES)
def test_events_impressions_and_videos(tmp_path: Path, size: str) -> None:
    folder = write_kuairand(tmp_path / "data", KUAIRAND_NAMES[size])
    assert detect_kind(folder) == "kuairand"
    log = load(folder)
    assert events_of(log) == [
        (7, 10, KUAIRAND_TIME + 1000, "long_view"),
        (7, 12, KUAIRAND_TIME + 3000, "view"),
        (9, 10, KUAIRAND_TIME + 5000, "follow"),
        (9, 12, KUAIRAND_TIME + 60_000, "like"),
        (9, 11, KUAIRAND_TIME + 61_000, "click"),
    ]
    shown = log.impressions
    assert shown is not None and shown.tasks == list(FLAGS)
    assert shown.offsets.tolist() == [0, 4, 7] and shown.mask.all()
    assert log.items.ids(shown.item).tolist() == [10, 11, 12, 13, 10, 12, 11]
    assert ["".join(map(str, labels)) for labels in shown.label.tolist()] == [
        *("1000001", "0000000", "0000000", "1000010"),
        *("1110101", "1100000", "1000000"),
    ]
    assert features_of(log) == {
        "video_type": {10: ["NORMAL"], 11: ["AD"]},
        "upload_type": {10: ["ShortImport"], 11: ["LongImport"]},
        "music_type": {10: ["9"]},
        "tag": {10: ["12", "65"], 11: ["39"]},
        "video_duration": {10: 9000},
        "server_width": {10: 720, 11: 1080},
        "server_height": {10: 1280, 11: 1920},
    }
    assert values_of(shown.features, log.request_features) == [
        {"tab": str(video % 3)} for video in (10, 11, 12, 13, 10, 12, 11)
    ]
    numbers = ("follow_user_num", "fans_user_num", "friend_user_num", "register_days")
    assert (
        user_features_of(log)
        == {
            name: {} if value == "" else {7: float(value) if name in numbers else str(value)}  # type: ignore[arg-type]
            for name, value in zip(KUAIRAND_USER_COLUMNS[1:], PROFILES[0][1:], strict=True)
        }
    )


ANSWERS = pl.DataFrame(
    [(3, 70, 8, 5, 1), (3, 71, 8, 0, 0), (3, 70, 9, 9, 0), (1, 71, 7, 0, 1)],
    schema=["student", "problem", "skill", "order", "correct"],
    orient="row",
)


def test_answers_are_impressions_and_events(tmp_path: Path) -> None:
    """In the order of the column, spread evenly over 300 days."""
    folder = tmp_path / "data"
    folder.mkdir()
    ANSWERS.write_parquet(folder / "answers.parquet")
    assert detect_kind(folder) == "assist17"
    log = load(folder)
    day = 86_400_000
    answers = [(71, 50 * day, "wrong"), (70, 150 * day, "right"), (70, 250 * day, "wrong")]
    assert events_of(log) == [(1, 71, 150 * day, "right"), *((3, *answer) for answer in answers)]
    assert features_of(log) == {"skill": {70: ["8"], 71: ["8"]}}
    shown = impression_cases(log, 0, None)
    assert shown.tasks == ["correct"] and shown.label[:, 0].tolist() == [1, 0, 1, 0] and shown.mask.all()
    assert shown.timestamp.tolist() == [day * at - 1000 for at in (150, 50, 150, 250)]
    assert shown.seen.tolist() == [0, 0, 1, 2]
    ANSWERS.with_columns(correct=pl.lit(None, pl.Int8)).write_parquet(folder / "answers.parquet")
    with pytest.raises(DataError, match="row 1, column 'correct': the value is missing"):
        load(folder.rename(tmp_path / "other"))


@pytest.mark.data
def test_the_split_of_assist17(tmp_path: Path) -> None:
    log = load_real("assist17", tmp_path / "log")
    assert (log.num_users, log.num_items, log.num_events) == (1705, 3162, 941_502)
    assert len(impression_cases(log, parse_time("1970-09-13"), None).user) == 141_175


VALID_FROM, TEST_FROM = parse_time("1980-01-01"), parse_time("1990-01-01")
YAMBDA_TYPES = ("listen", "dislike", "like", "undislike", "unlike")
YAMBDA_ROWS = pl.DataFrame(
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
        "event_type": pl.Enum(YAMBDA_TYPES),
        "played_ratio_pct": pl.UInt16,
        "track_length_seconds": pl.UInt32,
    },
    orient="row",
)
YAMBDA_EVENTS = [
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
    tables = {f"{kind}s": YAMBDA_ROWS.filter(pl.col("event_type") == kind).drop("event_type") for kind in YAMBDA_TYPES}
    tables = {
        name: table if name == "listens" else table.drop("played_ratio_pct", "track_length_seconds")
        for name, table in tables.items()
        if len(table)
    }
    if files == "multi_event":
        tables |= {"multi_event": YAMBDA_ROWS}  # the other files are there too, and ignored
    for name, table in tables.items():
        (table if form == "flat" else sequential(table)).write_parquet(folder / f"{name}.parquet")
    assert detect_kind(folder) == "yambda"
    events = SourceConfig(kind="auto", paths=[str(folder)], categories=["is_organic"], numbers=["played_ratio_pct"])
    report = prepare(PrepareConfig(out=str(folder / "log"), events=events), parser=PARSER)
    assert report.warnings == []  # its times are seconds since the first event, not since 1970
    log = EventLog.open(folder / "log")
    assert (log.num_users, log.num_events) == (2, len(YAMBDA_EVENTS))
    if files == "multi_event":
        assert events_of(log) == YAMBDA_EVENTS
    assert set(events_of(log)) == set(YAMBDA_EVENTS)
    features = values_of(log.gather(np.arange(2)).features, log.event_features)
    found = {event: tuple(row.values()) for event, row in zip(events_of(log), features, strict=True)}
    of_rows = [(str(row["is_organic"]), row["played_ratio_pct"]) for row in YAMBDA_ROWS.rows(named=True)]
    assert found == dict(zip(YAMBDA_EVENTS, of_rows, strict=True))


@pytest.mark.parametrize(("kind", "file", "lost"), [("assist17", "answers", "skill"), ("yambda", "listens", "uid")])
def test_a_missing_column_of_parquet_is_named(tmp_path: Path, kind: str, file: str, lost: str) -> None:
    folder, path = tmp_path / "set", tmp_path / "set" / f"{file}.parquet"
    folder.mkdir()
    (ANSWERS if kind == "assist17" else YAMBDA_ROWS).write_parquet(path)
    pl.read_parquet(path).drop(lost).write_parquet(path)
    message = rf"{file}\.parquet: column '{lost}' is missing, the file has: .*; get the set from https://"
    with pytest.raises(DataError, match=message):
        load(folder, kind)


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
