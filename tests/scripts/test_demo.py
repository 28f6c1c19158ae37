"""The demo runs from end to end on a small log."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from scripts import demo
from tests.conftest import ratings_folder
from vista.config import ExploreConfig, ModelConfig, TrainConfig
from vista.errors import ConfigError
from vista.explore.workspace import DEMO, Places, Workspace

SMALL = ["optim.epochs=1", "optim.warmup_steps=2", "model.dim=16", "num_threads=1"]
SIZES = demo.DemoSizes(num_users=24, events_per_user=200, history_lengths=(10, 100), num_candidates=20)


@pytest.mark.research
def test_on_the_simulation(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    report = demo.run(None, DEMO, [*SMALL, "data.tokens_per_batch=400"], SIZES)
    text = report.path.read_text()
    baselines = ["pooled-vector baseline", "counter baseline", "pooled label vectors", "oracle", "own frequency"]
    assert [shown for shown in [*baselines, "without-summary", "load average"] if shown not in text] == []
    better, added, fresh = report.verdict
    assert (
        better.startswith("Better than simple baselines? AUC of click on test 0.") and "without-summary? AUC" in added
    )
    assert "The store is refreshed every 7 days" in fresh
    assert {"Quality by history length", "Quality by user activity"} <= set(report.findings)
    capsys.readouterr()
    assert demo.run(None, DEMO, [*SMALL, "data.tokens_per_batch=400"], SIZES).path == report.path
    assert "generated in" not in capsys.readouterr().out, "a repeated demo reuses the log"
    opened = Workspace.open(Places.of(ExploreConfig()))
    assert opened.problems == {} and opened.scorer is not None and opened.log is not None
    opened.scorer.close()
    assert opened.places.other_store == str(DEMO / "simulation" / "store-test")


@pytest.mark.research
def test_on_movielens(tmp_path: Path) -> None:
    data = ratings_folder(tmp_path / "ml-1m")
    report = demo.run(data, tmp_path / "demo", SMALL, SIZES)
    assert "ndcg@10" in report.path.read_text() and report.path.parent == tmp_path / "demo" / "ml-1m"


@pytest.mark.research
def test_on_events_of_a_file(tmp_path: Path) -> None:
    ratings = np.random.default_rng(0).integers(0, 12, (400, 2))
    lines = [f"user-{user},{item},{1_700_000_000 + 600 * row}" for row, (user, item) in enumerate(ratings)]
    data = tmp_path / "events.csv"
    data.write_text("\n".join(["user,item,timestamp", *lines]) + "\n")
    report = demo.run(data, tmp_path / "demo", SMALL, SIZES)
    assert report.path.parent == tmp_path / "demo" / "events"
    assert "ndcg@10 of the next item on test 0." in report.verdict[0]


def test_files_of_others_are_not_removed(tmp_path: Path) -> None:
    data = ratings_folder(tmp_path / "sets" / "ml-1m")
    with pytest.raises(ConfigError, match=r"--out: .*ml-1m overlaps with the folder of --data"):
        demo.run(data, tmp_path / "sets", SMALL, SIZES)
    (tmp_path / "out" / "simulation").mkdir(parents=True)
    (tmp_path / "out" / "simulation" / "mine.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"--out: .*simulation holds files that are not the demo's"):
        demo.run(None, tmp_path / "out", SMALL, SIZES)
    assert (data / "ratings.dat").exists() and (tmp_path / "out" / "simulation" / "mine.txt").exists()


def test_another_configuration_starts_from_nothing(tmp_path: Path) -> None:
    """The difference may come from an override, a default, or a file of conf/."""
    folder = tmp_path / "simulation"
    demo._clear_if_other(folder, None, TrainConfig(), SIZES)
    (folder / "log").mkdir()
    demo._clear_if_other(folder, None, TrainConfig(), SIZES)
    assert (folder / "log").exists()
    demo._clear_if_other(folder, None, TrainConfig(model=ModelConfig(dropout=0.25)), SIZES)
    assert not (folder / "log").exists()
