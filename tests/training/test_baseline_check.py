"""Counting baselines at the start of a run, and the comparison of its model with them at the end."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config
from vista.config import EvaluateConfig
from vista.evaluation.baseline_evaluation import measure_baseline
from vista.evaluation.baselines import sparse_rows
from vista.evaluation.baselines.transitions import Transitions
from vista.log.event_log import EventLog
from vista.training.baseline_check import compare_with_baselines
from vista.training.progress import Progress
from vista.training.trainer import train
from vista.training.validation import Validation


def test_a_run_measures_the_baselines_once(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(event_log, tmp_path / "run", optim__epochs=1)
    train(config, event_log)
    text = (tmp_path / "run" / "train.log").read_text()
    assert text.count("counting baselines") == 1 and "transitions 0." in text
    monkeypatch.setattr(Validation, "baselines", lambda self: pytest.fail("measured again"))
    train(config, event_log)  # resumes, and has nothing left to do


@pytest.mark.parametrize("exclude_seen", [True, False])
def test_validation_measures_baselines_as_evaluation_does(
    event_log: EventLog, tmp_path: Path, exclude_seen: bool
) -> None:
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=exclude_seen)
    rows = np.arange(1, event_log.num_items + 1)
    measured = Validation(event_log, rows, config).baselines()
    assert ("own frequency" in measured) != exclude_seen, "returns are ranked only if seen items are"
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    expected = measure_baseline(Transitions(), event_log, config.data, asked, rows - 1).means()
    assert measured["transitions"] == pytest.approx(expected)


def test_in_a_large_log_item_neighbors_count_some_users(
    event_log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(event_log, tmp_path / "run", data__exclude_seen=False)
    validation = Validation(event_log, np.arange(1, event_log.num_items + 1), config)
    whole = validation.baselines()
    monkeypatch.setattr(sparse_rows, "MOST_EVENTS", 10)
    with caplog.at_level(logging.INFO):
        some = validation.baselines()
    assert {name for name in whole if whole[name] != some[name]} == {"item neighbors"} and some.keys() == whole.keys()
    assert len([line for line in caplog.messages if line.startswith("pairs of items are counted among")]) == 1


def decided_by(metric: str) -> Any:
    """A validation that chooses models by `metric`, and ranks by NDCG@10."""
    return SimpleNamespace(metric=metric, ranking_metric="ndcg@10")


@pytest.mark.parametrize("counts", [False, True])
@pytest.mark.parametrize(("reached", "warns"), [(0.29, True), (0.3, False), (0.31, False)])
def test_a_model_below_a_baseline_is_reported(
    reached: float, warns: bool, counts: bool, caplog: pytest.LogCaptureFixture
) -> None:
    progress = Progress(
        best=0.7,  # NE: the second validation is the best, though its NDCG@10 is not
        history=[{"ne/click": 0.9, "ndcg@10": 0.5}, {"ne/click": 0.7, "ndcg@10": reached}],
        baselines={"popularity": {"ndcg@10": 0.1}, "own frequency": {"ndcg@10": 0.3}},
    )
    with caplog.at_level(logging.WARNING):
        compare_with_baselines(progress, decided_by("ne/click"), counts=counts)
    assert [record.message.split(":")[0] for record in caplog.records] == (
        ["ndcg@10 0.2900 is below that of a counting baseline (own frequency"] if warns else []
    )
    assert not warns or ("counter_days" in caplog.text) == counts


def test_without_validations_nothing_is_compared(caplog: pytest.LogCaptureFixture) -> None:
    compare_with_baselines(Progress(baselines={"popularity": {"ndcg@10": 0.1}}), decided_by("ndcg@10"), counts=False)
    compare_with_baselines(Progress(best=0.5, history=[{"ndcg@10": 0.05}]), decided_by("ndcg@10"), counts=False)
    assert not caplog.records
