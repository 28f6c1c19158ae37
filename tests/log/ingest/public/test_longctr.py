"""MicroVideo and KuaiVideo, on small samples of the form that LongCTR gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.log.conftest import PARSER
from tests.log.feature_tables import features_of
from tests.log.ingest.set_logs import events_of, load
from vista.config import PrepareConfig, SourceConfig
from vista.errors import DataError
from vista.evaluation.cases import impression_cases
from vista.log.ingest.prepare import prepare
from vista.log.ingest.sources import detect_kind
from vista.log.until import parse_time

VALID, TEST = parse_time("1980-01-01"), parse_time("1990-01-01")
SEQUENCES = [[], [11, 12, 13, 14], [12, 13], [14]]
"""By user_index."""
PARTS = {
    "train": [(1, 12, 0, 1.0), (1, 15, 1, 0.0), (1, 13, 2, 1.0), (2, 12, 0, 1.0)],
    "valid": [(1, 14, 3, 1.0), (3, 14, 0, 1.0)],
    "test": [(1, 15, 4, 0.0), (2, 15, 1, 0.0), (2, 11, 2, 0.0)],
}
"""user_index, item_index, seq_len, is_click."""


def write(folder: Path, name: str = "MicroVideo1.7M_x2") -> Path:
    folder.mkdir()
    sequences = pl.Series("full_item_seq", SEQUENCES, dtype=pl.List(pl.Int32))
    pl.DataFrame({"user_index": pl.Series(range(4), dtype=pl.Int32), "full_item_seq": sequences}).write_parquet(
        folder / "user_info.parquet"
    )
    for part, rows in PARTS.items():
        schema = {"user_index": pl.Int32, "item_index": pl.Int32, "seq_len": pl.Int32, "is_click": pl.Float32}
        frame = pl.DataFrame(rows, schema=schema, orient="row")
        frame.with_columns(user_id=pl.col("user_index") + 1).write_parquet(folder / f"{part}.parquet")
    index = [0, *range(11, 16)]
    items = {
        "item_index": pl.Series(index, dtype=pl.Int32),
        "item_id": pl.Series([0, 1, 2, 1, 1, 1], dtype=pl.Int32),
        "cate_id": pl.Series([0, 3, 3, 4, 5, 5], dtype=pl.Int32),
        "image_emb_dim64": pl.Series(np.outer(index, np.ones(64)).tolist(), dtype=pl.List(pl.Float32)),
    }
    if name == "KuaiVideo_x2":
        del items["cate_id"]
    pl.DataFrame(items).write_parquet(folder / "item_info.parquet")
    return folder


@pytest.mark.parametrize("name", ["MicroVideo1.7M_x2", "KuaiVideo_x2"])
def test_sequences_impressions_and_items(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path / "data", name)
    assert detect_kind(folder) == "longctr"
    log = load(folder)
    assert events_of(log) == [
        (1, 11, 0, "event"),
        (1, 12, 1_000, "event"),
        (1, 13, 2_000, "event"),
        (1, 14, VALID + 3_000, "event"),
        (2, 12, 0, "event"),
        (2, 13, TEST + 1_000, "event"),
        (3, 14, VALID, "event"),
    ]
    features = features_of(log)
    assert features.pop("image_emb_dim64") == {item: [item] * 64 for item in range(11, 16)}
    assert features == (
        {} if name == "KuaiVideo_x2" else {"cate_id": {11: ["3"], 12: ["3"], 13: ["4"], 14: ["5"], 15: ["5"]}}
    )
    shown = log.impressions
    assert shown is not None and shown.tasks == ["is_click"] and shown.num_impressions == 9


def test_parts_are_those_of_the_files_and_show_the_items_that_come_before(tmp_path: Path) -> None:
    log = load(write(tmp_path / "data"))
    for part, begin, end in (("train", 0, VALID), ("valid", VALID, TEST), ("test", TEST, None)):
        cases = impression_cases(log, begin, end)
        users, items = log.users.ids(cases.user).tolist(), log.items.ids(cases.item).tolist()
        found = zip(users, items, cases.seen.tolist(), cases.label[:, 0].tolist(), strict=True)
        assert list(found) == PARTS[part]


def test_a_file_of_sequences_has_its_impressions_beside_it(tmp_path: Path) -> None:
    log = load(write(tmp_path / "data") / "user_info.parquet", "longctr")
    assert log.impressions is not None and log.impressions.num_impressions == 9


def test_impressions_in_a_file_of_another_name(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    other = (folder / "test.parquet").rename(folder / "late.parquet")
    source = SourceConfig(kind="longctr", paths=[str(folder)])
    shown = SourceConfig(kind="longctr", paths=[str(other)])
    settings = PrepareConfig(out=str(tmp_path / "log"), events=source, impressions=shown, progress=False)
    with pytest.raises(
        DataError, match=r"late\.parquet: is not named after a part, train, valid, test; name the folder"
    ):
        prepare(settings, parser=PARSER)


def test_parts_that_are_not_in_the_order_of_time(tmp_path: Path) -> None:
    folder = write(tmp_path / "data")
    (folder / "valid.parquet").rename(folder / "other.parquet")
    (folder / "train.parquet").rename(folder / "valid.parquet")
    (folder / "other.parquet").rename(folder / "train.parquet")
    message = r"valid\.parquet: user_index 1 has an impression after 0 items, but one in train\.parquet after 3: the pa"
    with pytest.raises(DataError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("file", "lost"),
    [
        ("user_info.parquet", "full_item_seq"),
        ("train.parquet", "is_click"),
        ("test.parquet", "seq_len"),
        ("item_info.parquet", "item_index"),
    ],
)
def test_a_missing_column_is_named(tmp_path: Path, file: str, lost: str) -> None:
    folder = write(tmp_path / "data")
    pl.read_parquet(folder / file).drop(lost).write_parquet(folder / file)
    message = rf"{file}: column '{lost}' is missing, the file has: .*; get the set from https://huggingface\.co/reczoo"
    with pytest.raises(DataError, match=message):
        load(folder)
