"""A model for the test is trained on all events before the test labels, without validation labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import DAY, START, small_config
from vista.config import EvaluateConfig, TrainConfig
from vista.config.choices import Split
from vista.errors import ConfigError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import Trainer, train

TEST_FROM = str(START + 20 * DAY)
SPLITS: dict[str, dict[str, Any]] = {
    "share": {"data__split": Split.share, "data__validation_share": 0.0, "data__test_share": 0.2},
    "time": {"data__split": Split.time, "data__validation_from": TEST_FROM, "data__test_from": TEST_FROM},
}
WINDOWS = {"optim__next_weight": 0.0, "optim__window_weight": 1.0, "model__counters": True, "data__horizon_events": 5}


def config_of(log: EventLog, run_dir: Path, split: str, **changes: Any) -> TrainConfig:
    return small_config(log, run_dir, **SPLITS[split], **WINDOWS, optim__validate_every=0, **changes)


@pytest.mark.parametrize("split", SPLITS)
def test_all_events_before_the_test_are_trained_on(event_log: EventLog, tmp_path: Path, split: str) -> None:
    config = config_of(event_log, tmp_path / "run", split)
    source = Trainer(config, event_log).source
    batches = [source.batch(0, index) for index in range(source.num_batches(0))]
    before = visible_counts(event_log, split_until(config.data, "test"))
    assert sum(len(batch.events.item) for batch in batches) == before.sum()
    assert all(batch.anchors is not None for batch in batches)
    model = train(config, event_log)
    assert '"validation"' not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert refresh(model, event_log, tmp_path / "store", until=split_until(config.data, "test")).num_users
    with Scorer.open(model, tmp_path / "store") as scorer:
        assert evaluate_scorer(scorer, event_log, EvaluateConfig(split="test", progress=False)).num_cases
        with pytest.raises(ConfigError, match="has no validation case"):
            evaluate_scorer(scorer, event_log, EvaluateConfig(split="validation", progress=False))


def test_a_validation_without_labels_is_left_out_with_a_warning(
    event_log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(event_log, tmp_path / "run", "share", optim__epochs=1)
    config.optim.validate_every = 1
    train(config, event_log)
    assert "has no case to validate on: the last model will be exported" in caplog.text
