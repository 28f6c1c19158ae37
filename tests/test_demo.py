"""The demo and the quality tables run from end to end, on little."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import demo
import quality
from tests.conftest import ratings_folder
from vista.config import SimulateConfig
from vista.errors import ConfigError
from vista.results import read_results

SMALL = ["optim.epochs=1", "optim.warmup_steps=2", "model.dim=16", "progress=false", "num_threads=1"]


@pytest.fixture(autouse=True)
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "DEMO_USERS": 24,
        "DEMO_EVENTS": 200,
        "HISTORY_LENGTHS": (10, 100),
        "NUM_CANDIDATES": 20,
    }.items():
        monkeypatch.setattr(demo, name, value)


def test_on_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = demo.run(None, tmp_path, [*SMALL, "data.tokens_per_batch=400"])
    text = report.read_text()
    assert "auc" in text.lower() and report.with_suffix(".png").stat().st_size > 10_000
    capsys.readouterr()
    assert demo.run(None, tmp_path, [*SMALL, "data.tokens_per_batch=400"]) == report
    assert "generated in" not in capsys.readouterr().out, "a repeated demo uses the log that is there"


def test_on_movielens(tmp_path: Path) -> None:
    data = ratings_folder(tmp_path / "ml-1m")
    report = demo.run(data, tmp_path / "demo", SMALL)
    assert "ndcg@10" in report.read_text() and report.parent == tmp_path / "demo" / "ml-1m"


def test_nothing_that_is_not_the_demos_is_removed(tmp_path: Path) -> None:
    data = ratings_folder(tmp_path / "sets" / "ml-1m")
    with pytest.raises(ConfigError, match=r"--out: the demo would work in .*ml-1m, where the data of --data are"):
        demo.run(data, tmp_path / "sets", SMALL)
    (tmp_path / "out" / "simulation").mkdir(parents=True)
    (tmp_path / "out" / "simulation" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*simulation holds files that are not the demo's"):
        demo.run(None, tmp_path / "out", SMALL)
    assert (data / "ratings.dat").exists() and (tmp_path / "out" / "simulation" / "mine.txt").exists()


def test_a_quality_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All rows of the simulation's table, with small runs; what is there is not run again."""
    rows = {name: replace(row, words=(*row.words, *SMALL)) for name, row in quality.TABLES["simulation"].items()}
    rows["last-200"] = quality.Row(("model.num_seeds=0", "model.tail_len=40", *SMALL))
    rows["vista"] = replace(rows["vista"], tails=(4,))
    monkeypatch.setitem(quality.TABLES, "simulation", rows)
    monkeypatch.setattr(
        quality, "SimulateConfig", lambda out, num_users: SimulateConfig(out=out, num_users=24, events_per_user=200)
    )
    words = ["simulation", "--work", str(tmp_path / "work"), "--results", str(tmp_path / "results"), "--threads", "1"]
    assert quality.main(words) == 0
    table = tmp_path / "results" / "simulation.jsonl"
    found = {row["model"]: row for row in read_results(table)}
    assert list(found) == ["vista", "vista, float32 store", "vista, tail 4", "tail-only", "last-200", "truth"]
    assert found["last-200"]["config"]["model"]["tail_len"] == 40 and found["truth"]["seed"] == 0
    assert all(0 < row["metrics"]["auc/click"] < 1 for row in found.values())
    assert found["truth"]["metrics"]["ne/click"] < min(row["metrics"]["ne/click"] for row in list(found.values())[:5])
    assert found["vista, tail 4"]["metrics"] != found["vista"]["metrics"]
    before = table.read_text()
    assert quality.main(words) == 0 and table.read_text() == before
    assert "path" not in json.dumps(found["vista"]["config"]) and "--only vista" in found["vista"]["command"]
