"""The recipes for Spark and Feast in docs/guides/refresh-every-night.md, whose code runs as the page shows it.

`make test-recipes` installs both packages in an environment of its own and runs the tests marked `recipes`.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.docs.page import blocks_of
from tests.refresh.conftest import contents
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store import StoreReader
from vista.store.layout import Shard
from vista.store.reader import open_store

ROOT = Path(__file__).parents[2]
CODE = [
    block
    for block in blocks_of(ROOT / "docs" / "guides" / "refresh-every-night.md")
    if block.language == "python" and "RayEngine" not in block.code
]
USERS = list(range(60))


def need(package: str, *programs: str) -> None:
    """Skip a test without the package and the programs; continuous integration installs them."""
    missing = [name for name in programs if shutil.which(name) is None]
    if find_spec(package) is None:
        missing.append(package)
    if missing and "CI" not in os.environ:
        pytest.skip(f"needs {' and '.join(missing)}; see `make test-recipes`")


def run(page: dict[str, Any], *texts: str) -> None:
    """Run the blocks of the page that contain these texts, one block per text."""
    for text in texts:
        (code,) = (block.code for block in CODE if text in block.code)
        exec(code, page)


@pytest.fixture
def page(tmp_path, monkeypatch):
    """Names of the page's code after its first block, in a folder that also has the store of the Ray recipe."""
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    run(names, 'EventLog.from_frame(frame, "data/ray"')
    refresh(names["model"], names["log"], "stores/ray")
    return names


def check_shards(page: dict[str, Any]) -> None:
    """Each shard is byte for byte that of a local refresh, and together they are the whole store."""
    for index in range(page["NUM_SHARDS"]):
        shard = Shard(index, page["NUM_SHARDS"])
        refresh(page["model"], page["log"], "stores/local", shard=shard, created_at=page["STARTED_MS"])
        assert contents(shard.path("stores/spark")) == contents(shard.path("stores/local"))
    with open_store("stores/spark") as sharded, StoreReader.open("stores/ray") as whole:
        assert sorted(sharded.keys()) == sorted(whole.keys()) == USERS
        np.testing.assert_allclose(sharded.get_many(USERS).summary, whole.get_many(USERS).summary, atol=2e-2)


@pytest.mark.nightly
def test_the_function_of_the_spark_recipe_refreshes_all_shards(page):
    import pandas as pd

    run(page, "def refresh_shards")
    frames = [pd.DataFrame({"id": [0, 1]}), pd.DataFrame({"id": [2, 3]})]
    done = pd.concat(page["refresh_shards"](frames))
    assert done["id"].tolist() == [0, 1, 2, 3]
    assert done["users"].sum() == len(USERS) and done["events"].sum() == page["log"].num_events
    check_shards(page)


@pytest.fixture
def local_spark(monkeypatch):
    """Spark on the loopback address, with this interpreter and checkout in its tasks."""
    need("pyspark", "java")
    monkeypatch.setenv("SPARK_LOCAL_IP", "127.0.0.1")
    monkeypatch.setenv("PYSPARK_PYTHON", sys.executable)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'kernels'}")
    yield
    from pyspark import SparkContext

    if SparkContext._gateway is not None:
        SparkContext._gateway.shutdown()


@pytest.mark.recipes
@pytest.mark.timeout(900)
def test_the_spark_recipe(local_spark, page, capsys):
    run(page, "def refresh_shards", "mapInPandas")
    assert capsys.readouterr().out.split()[-2:] == ["60", "1200"]
    check_shards(page)


@pytest.mark.recipes
def test_the_feast_recipe(page, monkeypatch):
    need("feast")
    run(page, "StoreReader.open", "FeatureView(")
    with Scorer.open("runs/ray/best", "stores/ray") as scorer:
        stored = scorer.store.get_many(USERS)
        assert page["online"].tobytes() == stored.summary[3:5].tobytes()
        assert page["answer"]["event_count"] == stored.event_count[3:5].tolist()
        answer = page["features"].get_online_features(
            features=["user_summary:summary"], entity_rows=[{"user": user} for user in [*USERS, 999]]
        )
        *served, unknown = answer.to_dict()["summary"]
        assert unknown is None
        expected = scorer.score(USERS, [1, 2, 3])
        summary = np.array(served, np.float32).reshape(stored.summary.shape)
        for scale in (1, 0):  # Without summaries, scores differ.
            changed = dataclasses.replace(stored, summary=scale * summary)
            monkeypatch.setattr(StoreReader, "get_many", lambda self, users, changed=changed: changed)
            assert (scorer.score(USERS, [1, 2, 3]).tobytes() == expected.tobytes()) == (scale == 1)
