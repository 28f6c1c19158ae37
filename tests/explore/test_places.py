"""Which folders the page reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Served
from vista.config import ExploreConfig
from vista.errors import ConfigError
from vista.explore.places import Places


def test_the_demo_is_shown_without_a_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    empty = Places.of(ExploreConfig())
    assert empty.is_demo and (empty.store, empty.other_store) == ("demo/simulation/store", None)
    for name in ("ml-1m", "simulation"):
        (tmp_path / "demo" / name / "vista" / "best").mkdir(parents=True)
    (tmp_path / "demo/simulation/store-test").mkdir()
    places = Places.of(ExploreConfig())
    assert (places.model, places.data) == (Path("demo/simulation/vista/best"), Path("demo/simulation/log"))
    assert places.runs == (Path("demo/simulation/vista"),) and places.other_store == "demo/simulation/store-test"
    (tmp_path / "demo/simulation/vista/best").rmdir()
    assert Places.of(ExploreConfig()).model == Path("demo/ml-1m/vista/best")


def test_the_log_of_the_models_own_run_is_found(served: Served, tmp_path: Path) -> None:
    places = Places.of(ExploreConfig(model=str(served.model_dir), store=str(served.store)))
    assert places.data == served.log.path and places.runs == (served.model_dir.parent,) and not places.is_demo
    named = Places.of(ExploreConfig(model=str(served.model_dir), store=str(served.store), data="elsewhere"))
    assert named.data == Path("elsewhere")
    without = Places.of(ExploreConfig(model=str(tmp_path / "best"), store="store"))
    assert without.data is None
    (tmp_path / "config.yaml").write_text("data: [")
    with pytest.raises(ConfigError, match=r"config.yaml cannot be read .*; name one with data="):
        Places.of(ExploreConfig(model=str(tmp_path / "best"), store="store"))


def test_a_folder_of_runs_stands_for_its_runs(tmp_path: Path) -> None:
    for name in ("b", "a", "no-run"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "metrics.jsonl").touch()
    config = ExploreConfig(model="m", store="s", runs=[str(tmp_path), str(tmp_path / "b"), "missing"])
    assert Places.of(config).runs == (tmp_path / "a", tmp_path / "b", Path("missing"))


def test_a_model_without_a_store_is_refused() -> None:
    with pytest.raises(ConfigError, match="model, store: name both"):
        ExploreConfig(model="runs/mine/best")
