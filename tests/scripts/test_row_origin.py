"""A row of results names the commits and machines that trained the model, whoever measures it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments import row_origin
from scripts.experiments.row_origin import RowOrigin, train_noted
from tests.conftest import Served, small_config
from vista.config import ModelConfig
from vista.config.choices import Architecture
from vista.log.event_log import EventLog

pytestmark = pytest.mark.research
MACHINE: dict[str, Any] = {"cpu": "First CPU", "gpu": None, "cores": 2, "threads": 1, "torch": "2.13.0"}


@pytest.mark.parametrize(("profile", "precision"), [("float32", "float32"), ("bfloat16", "bfloat16")])
def test_who_trained_and_who_measures(
    profile: str,
    precision: str,
    event_log: EventLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    force_processor: Callable[[str], None],
) -> None:
    force_processor(profile)

    def now(commit: str, cpu: str) -> None:
        monkeypatch.setattr(row_origin, "source_commit", lambda: commit)
        monkeypatch.setattr(row_origin, "hardware", lambda: MACHINE | {"cpu": cpu})

    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    now("aaa", "First CPU")
    train_noted(config, event_log, tmp_path)
    fields = RowOrigin.read({"test": tmp_path}).fields()
    assert fields["commit"] == "aaa" and fields["hardware"] == MACHINE | {"precision": precision}
    assert fields["seconds"] > 0 and RowOrigin.read({"test": tmp_path}).validation.keys() == {"hr@10", "ndcg@10"}
    ((seconds, value),) = RowOrigin.read({"test": tmp_path}).curve
    assert 0 < seconds <= fields["seconds"] + 0.1
    assert value == RowOrigin.read({"test": tmp_path}).validation["ndcg@10"]
    assert RowOrigin.read({"validation": tmp_path, "test": tmp_path}).curve == ()  # two models
    now("bbb", "Second CPU")
    train_noted(config, event_log, tmp_path)  # the run is done: nothing is trained
    fields = RowOrigin.read({"test": tmp_path}).fields()
    assert fields["commit"] == "bbb (trained at aaa)" and fields["hardware"]["cpu"] == "First CPU"
    assert fields["hardware"]["elsewhere"] == ["Second CPU, 2 cores, torch 2.13.0"]


def test_a_ranking_run_keeps_the_epoch_of_least_entropy(
    impression_log: EventLog, served_tasks: Served, tmp_path: Path
) -> None:
    model = ModelConfig(architecture=Architecture.din, dim=16, num_heads=2, history_limit=9)
    config = small_config(impression_log, tmp_path / "run", model=model, data=served_tasks.config.data, optim__epochs=2)
    train_noted(config, impression_log, tmp_path)
    kept = RowOrigin.read({"test": tmp_path}).validation
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    entropies = [row["validation"]["ne/click"] for row in rows if "validation" in row]
    assert len(entropies) == 2 and kept["ne/click"] == min(entropies) and "ndcg@10" not in kept


def test_a_killed_run_is_named_and_resumes(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the kill cut off its last line of metrics, or the run is older than the file of origins."""
    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 20, "epoch": 0}\n{"step": 4')
    monkeypatch.setattr(row_origin, "source_commit", lambda: "aaa")
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(row_origin, "train_model", lambda config, log: sys.exit(137))
        train_noted(config, event_log, tmp_path)
    monkeypatch.setattr(row_origin, "source_commit", lambda: "bbb")
    train_noted(config, event_log, tmp_path)
    assert [origin["commit"] for origin in RowOrigin.read({"test": tmp_path}).origins] == ["aaa", "bbb"]
    (tmp_path / "origins.jsonl").unlink()
    assert RowOrigin.read({"test": tmp_path}).origins == ()


def test_an_interrupted_run_names_both_commits(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vista.training import trainer

    whole, steps = trainer.Trainer._step, []

    def stopped(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    config = small_config(event_log, tmp_path / "run", optim__epochs=4, checkpoint_every=1)
    monkeypatch.setattr(trainer.Trainer, "_step", stopped)
    monkeypatch.setattr(row_origin, "source_commit", lambda: "aaa")
    with pytest.raises(KeyboardInterrupt):
        train_noted(config, event_log, tmp_path)
    monkeypatch.setattr(row_origin, "source_commit", lambda: "bbb")
    train_noted(config, event_log, tmp_path)
    assert [origin["commit"] for origin in RowOrigin.read({"test": tmp_path}).origins] == ["aaa", "bbb"]
    assert RowOrigin.read({"test": tmp_path}).fields()["commit"] == "bbb (trained at aaa, bbb)"
    assert RowOrigin(2.0).fields().keys() == {"commit", "hardware", "seconds"}
