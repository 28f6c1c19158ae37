"""The recipes for Spark and Feast in docs/guides/ray-spark-feast.md."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from tests.docs.page import blocks_of
from vista.refresh import refresh
from vista.store import StoreReader
from vista.store.sharded_reader import open_store

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "ray-spark-feast.md"
CODE = [block for block in blocks_of(PAGE) if block.language == "python"]


def block_with(text: str) -> str:
    (found,) = (block.code for block in CODE if text in block.code)
    return found


@pytest.fixture
def shop(tmp_path: Path, grow: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The page's working directory, with its log, model, and store."""
    monkeypatch.chdir(tmp_path)
    model = grow.model()
    model.save_pretrained(tmp_path / "runs" / "shop" / "best")
    log = grow.append(tmp_path / "data" / "shop", grow.events({user: 1 + user % 5 for user in range(20)}))
    refresh(model, log, tmp_path / "stores" / "shop")
    return SimpleNamespace(log=log, folder=tmp_path)


def check_shards(shop: SimpleNamespace) -> None:
    with open_store("stores/spark") as sharded, StoreReader.open("stores/shop") as whole:
        assert sorted(sharded.keys()) == sorted(whole.keys()) == list(range(20))


def test_the_function_of_the_spark_recipe_refreshes_all_shards(shop: SimpleNamespace) -> None:
    page: dict[str, Any] = {"__name__": "__main__"}
    exec(block_with("def refresh_shards"), page)
    frames = [pd.DataFrame({"id": [0, 1]}), pd.DataFrame({"id": [2, 3]})]
    done = pd.concat(page["refresh_shards"](frames))
    assert done["id"].tolist() == [0, 1, 2, 3]
    assert done["users"].sum() == 20 and done["events"].sum() == shop.log.num_events
    check_shards(shop)


def test_the_spark_recipe(shop: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyspark")
    page: dict[str, Any] = {"__name__": "__main__"}
    exec(block_with("def refresh_shards"), page)
    exec(block_with("mapInPandas"), page)
    assert capsys.readouterr().out.split()[-2:] == ["20", str(shop.log.num_events)]
    check_shards(shop)


def test_the_feast_recipe(shop: SimpleNamespace) -> None:
    pytest.importorskip("feast")
    page: dict[str, Any] = {"__name__": "__main__"}
    exec(block_with("StoreReader.open"), page)
    exec(block_with("FeatureView("), page)
    with StoreReader.open("stores/shop") as store:
        batch = store.get_many([3])
    assert page["answer"]["summary"] == [pytest.approx(batch.summary[0].ravel().tolist())]
    assert page["answer"]["event_count"] == batch.event_count.tolist()
