"""Lines say by which commits and machines a model was trained, whoever measures it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import row_origin
from row_origin import Trained, train_noted
from tests.conftest import small_config
from vista.data.event_log import EventLog

MACHINE: dict[str, Any] = {"cpu": "First CPU", "gpu": None, "cores": 2, "threads": 1, "torch": "2.13.0"}


def test_who_trained_and_who_measures(event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def now(commit: str, cpu: str) -> None:
        monkeypatch.setattr(row_origin, "commit", lambda: commit)
        monkeypatch.setattr(row_origin, "hardware", lambda: MACHINE | {"cpu": cpu})

    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    now("aaa", "First CPU")
    train_noted(config, event_log, tmp_path)
    fields = Trained.read(tmp_path).fields()
    assert fields["commit"] == "aaa" and fields["hardware"] == MACHINE | {"precision": "float32"}
    assert fields["seconds"] > 0 and Trained.read(tmp_path).validation.keys() == {"hr@10", "ndcg@10"}
    now("bbb", "Second CPU")
    train_noted(config, event_log, tmp_path)  # it is done: nobody trains
    fields = Trained.read(tmp_path).fields()
    assert fields["commit"] == "bbb (trained at aaa)" and fields["hardware"]["cpu"] == "First CPU"
    assert fields["hardware"]["elsewhere"] == ["Second CPU, 2 cores, torch 2.13.0"]


def test_a_run_that_was_stopped_names_both(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vista.training import trainer

    whole, steps = trainer._Trainer._step, []

    def stopped(self: Any, *arguments: Any) -> Any:
        steps.append(1)
        if len(steps) == 12:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    config = small_config(event_log, tmp_path / "run", optim__epochs=4, checkpoint_every=1)
    monkeypatch.setattr(trainer, "METRICS_EVERY", 1)
    monkeypatch.setattr(trainer._Trainer, "_step", stopped)
    monkeypatch.setattr(row_origin, "commit", lambda: "aaa")
    with pytest.raises(KeyboardInterrupt):
        train_noted(config, event_log, tmp_path)
    monkeypatch.setattr(row_origin, "commit", lambda: "bbb")
    train_noted(config, event_log, tmp_path)
    assert [origin["commit"] for origin in Trained.read(tmp_path).origins] == ["aaa", "bbb"]
    assert Trained.read(tmp_path).fields()["commit"] == "bbb (trained at aaa, bbb)"
    assert Trained(2.0).fields().keys() == {"commit", "hardware", "seconds"}
