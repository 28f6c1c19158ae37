"""Long commands say on stderr how far they are, also in a pipe, and nothing with progress=false."""

from __future__ import annotations

import csv
import logging
import re
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import Served, small_config, small_frame
from vista import progress_bar
from vista.cli.main import main
from vista.config.config_keys import to_yaml
from vista.log.event_log import EventLog
from vista.training.run_clock import RunClock
from vista.training.trainer import train

OF = r"\d+ of \d+ \w+ \(\d+%\), +\S+, \S+ left"
Said = Callable[..., str]


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Said:
    """Runs a command whose bars do not wait; returns its stderr."""
    for name in ("PLAIN_DELAY_S", "LINE_SECONDS"):
        monkeypatch.setattr(progress_bar, name, 0.0)

    def run(*words: object) -> str:
        capsys.readouterr()
        assert main([str(word) for word in words]) == 0
        return capsys.readouterr().err

    return run


def test_an_import_counts_users(served: Served, tmp_path: Path, said: Said) -> None:
    said("store", "export", f"store={served.store}", f"out={tmp_path / 'a.parquet'}")
    err = said("store", "import", f"store={tmp_path / 'new'}", f"file={tmp_path / 'a.parquet'}")
    assert re.search(rf"^import: {OF}", err, re.M), err


def test_a_deletion_counts_events(tmp_path: Path, said: Said) -> None:
    frame = small_frame()
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    with (tmp_path / "gone.csv").open("w", newline="") as file:
        names = ("user", "item", "timestamp")
        csv.writer(file).writerows([names, *list(zip(*(frame[name] for name in names), strict=True))[:9]])
    err = said("log", "forget", f"data={log.path}", f"events={tmp_path / 'gone.csv'}", "time_unit=ms")
    assert re.search(r"^read events: ", err, re.M) and re.search(r"^match events: \S+ of 9\.00 event", err, re.M)


def test_added_items_show_the_time(tmp_path: Path, said: Said) -> None:
    items = sorted(set(small_frame()["item"].tolist()))
    prices = {"item": items, "price": [float(item) for item in items]}
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=prices)
    train(small_config(log, tmp_path / "run", optim__epochs=1), log)
    (tmp_path / "new.csv").write_text("item,price\n5000,1.5\n")
    err = said("items", "add", f"model={tmp_path / 'run' / 'best'}", f"items.paths=[{tmp_path / 'new.csv'}]")
    assert all(re.search(rf"^{step}: ", err, re.M) for step in ("read items", "extend the model")), err


@pytest.mark.skipif(find_spec("faiss") is None, reason="needs faiss")
def test_an_index_counts_items(served: Served, tmp_path: Path, said: Said) -> None:
    err = said("index", f"model={served.model_dir}", f"out={tmp_path / 'index'}", "kind=ivfpq")
    assert re.search(r"^train the index: ", err, re.M)
    assert re.search(r"^index: \S+ of 40\.0 item \(100%\)", err, re.M), err


def test_a_sweep_counts_trials(
    event_log: EventLog, tmp_path: Path, said: Said, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.yaml").write_text(to_yaml(small_config(event_log, tmp_path / "unused", optim__epochs=1)))
    words = ("sweep", f"folder={tmp_path / 'sweep'}", f"train_file={tmp_path / 'train.yaml'}", "seed=1,2")
    caplog.set_level(logging.INFO)
    said(*words)
    assert "trial 1 of 2: seed=1" in caplog.text
    assert re.search(r"trial 2 of 2, about \d\d:\d\d left: seed=2", caplog.text)
    assert not re.search(r"^epoch", said(*words), re.M), "finished trials are not trained again"


def test_training_says_what_is_left_of_the_run(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("PLAIN_DELAY_S", "LINE_SECONDS"):
        monkeypatch.setattr(progress_bar, name, 0.0)
    with progress_bar.progress_shown():
        train(small_config(event_log, tmp_path / "run", progress=True), event_log, metrics_every=1)
    err = capsys.readouterr().err
    assert re.search(r"^epoch 2/2: .* left, loss=\S+, run=\d+:\d\d left", err, re.M), err


def test_baselines_are_named_while_they_are_fitted(served: Served, tmp_path: Path, said: Said) -> None:
    words = ("evaluate", f"model={served.model_dir}", f"store={served.test_store}", f"data={served.log.path}")
    err = said(*words, "baselines=true", f"out={tmp_path / 'a.json'}")
    assert re.search(rf"^baselines: {OF}, popularity$", err, re.M), err
    assert "baselines:" not in said(*words, "baselines=true", "progress=false")


def test_the_time_left_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, now = RunClock(), iter([100.0, 100.0, 130.0, 160.0])
    monkeypatch.setattr("time.monotonic", lambda: next(now))
    assert clock.left(0.0) == {} and clock.left(0.25) == {}
    assert clock.left(0.5) == {"run": "01:00 left"} and clock.left(1.0) == {"run": "00:00 left"}
