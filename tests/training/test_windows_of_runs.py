"""Runs that train windows, and runs without validation labels: what they learn and are validated on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DAY, START, draw_counter_weights, small_config
from vista.config import EvaluateConfig, TrainConfig
from vista.config.checks import Architecture, Codec, Split, Target
from vista.errors import ConfigError
from vista.evaluation.baseline_evaluation import measure_baseline
from vista.evaluation.counting_baselines import OwnFrequency
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.baselines.history_model import HistoryModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.trainer import Trainer, train
from vista.training.validation import Validation


def losses(run_dir: Path, name: str) -> list[float]:
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [row[name] for row in rows if name in row]


def test_a_run_learns_windows(event_log: EventLog, tmp_path: Path) -> None:
    weights = {"optim__window_weight": 1.0, "optim__next_weight": 0.0}
    model = train(small_config(event_log, tmp_path / "run", **weights, optim__epochs=6), event_log, metrics_every=1)
    assert model.has_retrieval, "the window loss trains it too"
    window = losses(tmp_path / "run", "window")
    assert np.mean(window[-5:]) < 0.95 * np.mean(window[:5])
    assert not losses(tmp_path / "run", "next")


def test_models_that_only_rank_have_no_anchors(impression_log: EventLog, tmp_path: Path) -> None:
    config = small_config(
        impression_log, tmp_path / "run", model__architecture=Architecture.twin, optim__window_weight=1.0
    )
    trainer = Trainer(config, impression_log)
    assert trainer.source.batch(0, 0).anchors is None
    assert not trainer.model.has_retrieval


NUM_USERS, NUM_EVENTS = 15, 120
SHARE = {"data__split": Split.share, "data__validation_share": 0.2, "data__test_share": 0.2}
TIME = {
    "data__split": Split.time,
    "data__validation_from": str(START + 70 * DAY),
    "data__test_from": str(START + 95 * DAY),
}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Users with one event per day, of 8 items of their own or of 30 others."""
    rng, total = np.random.default_rng(0), NUM_USERS * NUM_EVENTS
    user, step = np.divmod(np.arange(total), NUM_EVENTS)
    item = np.where(rng.random(total) < 0.5, user * 2 + rng.integers(0, 8, total), rng.integers(0, 30, total))
    frame = {"user": user, "item": item, "timestamp": START + step * DAY + rng.integers(0, DAY, total)}
    return EventLog.from_frame(frame, tmp_path_factory.mktemp("windows") / "log", time_unit="ms")


def window_config(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    windows = {"optim__next_weight": 0.0, "optim__window_weight": 1.0, "data__horizon_events": 12}
    return small_config(
        log, run_dir, **{**windows, "model__counter_keys": ["item"], "model__num_counters": 5, **changes}
    )


def asked(**changes: Any) -> EvaluateConfig:
    """The question of the configuration above."""
    config = EvaluateConfig(target=Target.window, split="validation", horizon_events=[12], top_k=[10])
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def without_others(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if name.startswith("ndcg@10")}


@pytest.mark.parametrize(
    ("name", "split", "days"),
    [("vista", SHARE, 0), ("vista", TIME, 9), ("hstu", TIME, 0)],
    ids=["share", "days", "hstu"],
)
def test_windows_are_those_of_the_evaluation(
    log: EventLog, tmp_path: Path, name: str, split: dict[str, Any], days: int
) -> None:
    limits = {"model__architecture": Architecture(name), "model__history_limit": 8 if name == "hstu" else 0}
    config = window_config(log, tmp_path / "run", **split, **limits, data__horizon_days=float(days))
    model = Trainer(config, log).model.eval()
    draw_counter_weights(model, statistics=False)
    validation = Validation(log, model.rows_of(log.items), config)
    window = "9-days" if days else "12-events"
    assert validation.metric == validation.ranking_metric == f"ndcg@10/{window}"
    assert validation.better(0.2, 0.1) and not validation.better(0.1, 0.2)

    question = asked(horizon_days=float(days))
    if isinstance(model, HistoryModel):
        expected = evaluate_model(model, log, question).metrics
    else:
        assert isinstance(model, VistaModel)
        until = split_until(config.data, "validation")
        refresh(model, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
        with Scorer.open(model, tmp_path / "store") as scorer:
            expected = evaluate_scorer(scorer, log, question).metrics
    measured = validation(model)
    assert set(measured) == {f"ndcg@10{kind}/{window}" for kind in ("", ":returns", ":new")}
    assert measured == pytest.approx(without_others(expected), abs=1e-3)
    baseline = measure_baseline(OwnFrequency(), log, config.data, question, model.rows_of(log.items) - 1).means()
    assert validation.baselines()[0]["own frequency"] == pytest.approx(without_others(baseline))


def test_without_windows_next_items_are_validated(
    log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With leave-last-out, the validation part has one event per user."""
    config = window_config(log, tmp_path)
    validation = Validation(log, np.arange(1, log.num_items + 1), config)
    assert validation.metric == "ndcg@10"
    assert "validation asks for next items, although only windows are trained: no user has 50 events" in caplog.text
    caplog.clear()
    config.optim.next_weight = 0.1
    for split in ({}, SHARE):
        config = window_config(log, tmp_path, **split, optim__next_weight=0.1)
        assert Validation(log, np.arange(1, log.num_items + 1), config).metric == "ndcg@10"
    assert not caplog.text


def test_all_events_before_the_test_are_trained_on(event_log: EventLog, tmp_path: Path) -> None:
    test_from = str(START + 20 * DAY)
    for split in (
        {"data__split": Split.time, "data__validation_from": test_from, "data__test_from": test_from},
        {"data__split": Split.share, "data__validation_share": 0.0, "data__test_share": 0.2},
    ):
        config = window_config(event_log, tmp_path / "run", **split, optim__validate_every=0)
        source = Trainer(config, event_log).source
        batches = [source.batch(0, index) for index in range(source.num_batches(0))]
        before = visible_counts(event_log, split_until(config.data, "test"))
        assert sum(len(batch.events.item) for batch in batches) == before.sum()
        assert all(batch.anchors is not None for batch in batches)
    model = train(config, event_log)
    assert '"validation"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert refresh(model, event_log, tmp_path / "store", until=split_until(config.data, "test")).num_users
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert evaluate_scorer(scorer, event_log, EvaluateConfig(split="test")).num_cases
        with pytest.raises(ConfigError, match="has no validation case"):
            evaluate_scorer(scorer, event_log, EvaluateConfig(split="validation"))
