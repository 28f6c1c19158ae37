"""A gap before the labels: what happens in it changes neither training nor evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config
from tests.evaluation.conftest import evaluated
from vista.config import EvaluateConfig, SourceColumns
from vista.config.checks import Split, Target
from vista.errors import ConfigError, LeakageError
from vista.evaluation.evaluate import evaluate_scorer
from vista.evaluation.protocol import measure_next_items, window_metric
from vista.log.event_log import EventLog
from vista.log.splits import part_counts, split_until
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.log_schema import schema_of
from vista.training.trainer import train

HOUR = 3_600_000
START = 444_444 * HOUR
VALIDATION, TEST, GAP_HOURS = START + 30 * HOUR, START + 40 * HOUR, 3
NUM_ITEMS = 12


def gap_log(path: Path, shift: int, **more: Any) -> EventLog:
    """Users with an event per hour; `shift` changes the items of the events in the gaps, and no other."""
    hours = np.arange(50)
    in_gap = ((hours >= 27) & (hours < 30)) | ((hours >= 37) & (hours < 40))
    frames = [
        (np.full(50, user), (user * hours + 3 * (hours // 7) + shift * in_gap) % NUM_ITEMS, START + hours * HOUR)
        for user in range(1, 9)
    ]
    user, item, time = (np.concatenate(column) for column in zip(*frames, strict=True))
    return EventLog.from_frame({"user": user, "item": item, "timestamp": time}, path, time_unit="ms", **more)


def gap_config(log: EventLog, run_dir: Path, gap_hours: int = GAP_HOURS) -> Any:
    config = small_config(log, run_dir)
    split = {"split": Split.time, "validation_from": str(VALIDATION), "test_from": str(TEST)}
    return replace(config, data=replace(config.data, **split, gap_minutes=60.0 * gap_hours))


def measured(folder: Path, shift: int, gap_hours: int) -> dict[str, float]:
    """Metrics of a trained model, of next items and of windows, in validation and test."""
    log = gap_log(folder / "log", shift)
    model = train(gap_config(log, folder / "run", gap_hours), log)
    metrics = {}
    for part in ("validation", "test"):
        refresh(model, log, folder / part, until=str(split_until(model.data, part)))
        with Scorer.open(model, folder / part) as scorer:
            for target in Target:
                config = EvaluateConfig(split=part, target=target, horizon_events=[4], min_seen=1, min_after=1)
                result = evaluate_scorer(scorer, log, replace(config, top_k=[3]))
                metrics |= {f"{part}/{name}": value for name, value in result.metrics.items()}
    return metrics


@pytest.mark.parametrize("gap_hours", [GAP_HOURS, 0])
def test_the_items_of_the_gap_change_nothing(tmp_path: Path, gap_hours: int) -> None:
    plain, other = (measured(tmp_path / f"{shift}", shift, gap_hours) for shift in (0, 5))
    assert {"validation/hr@3", "test/hr@3", f"test/{window_metric('recall@3', '4 events')}"} <= set(plain)
    assert (str(plain) == str(other)) == (gap_hours > 0)  # NaN is not equal to itself


@pytest.mark.parametrize(("part", "hour"), [("validation", 30), ("test", 40)])
def test_the_label_is_the_first_event_after_the_gap(tmp_path: Path, part: str, hour: int) -> None:
    log = gap_log(tmp_path / "log", 0)
    asked = []

    def score(cases: Any) -> np.ndarray:
        asked.append(cases)
        return np.zeros((len(cases), NUM_ITEMS))

    config, data = EvaluateConfig(split=part), replace(gap_config(log, tmp_path).data, exclude_seen=False)
    measure_next_items(log, data, np.arange(NUM_ITEMS), config, score)
    (cases,) = asked
    assert cases.seen.tolist() == [hour - GAP_HOURS] * 8
    assert cases.now.tolist() == [START + hour * HOUR] * 8
    assert cases.item.tolist() == [log.slice(row).item[hour] for row in range(8)]


def test_validation_stops_before_the_gap_of_the_test(tmp_path: Path) -> None:
    log = gap_log(tmp_path / "log", 0)
    seen, first, end = part_counts(log, gap_config(log, tmp_path).data, "validation")
    assert (seen[0], first[0], end[0]) == (27, 30, 37)


def test_a_store_that_covers_the_gap_is_refused(tmp_path: Path) -> None:
    log = gap_log(tmp_path / "log", 0)
    model = train(gap_config(log, tmp_path / "run"), log)
    refresh(model, log, tmp_path / "store", until=str(TEST))
    message = rf"labels of this model begin after until={TEST - GAP_HOURS * HOUR}"
    with pytest.raises(LeakageError, match=message):
        evaluated(model, tmp_path / "store", log)


def test_impressions_are_refused(tmp_path: Path) -> None:
    shown = {"user": [1, 2], "item": [1, 2], "timestamp": [START + HOUR] * 2, "click": [0, 1]}
    log = gap_log(tmp_path / "log", 0, impressions=shown, columns=SourceColumns(labels=["click"]))
    config = gap_config(log, tmp_path)
    with pytest.raises(
        ConfigError, match=r"data\.gap_minutes=180: impressions would be scored with events from the gap"
    ):
        schema_of(log, config)
    assert schema_of(log, replace(config, optim=replace(config.optim, task_weight=0.0))).tasks == []
