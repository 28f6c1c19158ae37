"""What a warm start refuses."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, small_frame
from tests.training.warm_logs import COLUMNS, FROZEN, Run, features, warm_config
from vista.config.choices import Architecture, ItemStart, Split, Stage
from vista.errors import CheckpointError, ConfigError, LeakageError
from vista.log.event_log import EventLog
from vista.training.checkpoint import latest_checkpoint
from vista.training.trainer import train


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__dim": 8}, r"these differ: model\.dim \(16 -> 8\); set model\.dim=16"),
        ({"model__num_seeds": 2, "model__tail_len": 5}, r"model\.num_seeds \(3 -> 2\), model\.tail_len \(6 -> 5\)"),
        ({"model__use_item_features": False}, r"set model\.use_item_features=true"),
    ],
)
def test_another_shape(
    feature_log: EventLog,
    earlier: Run,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    with pytest.raises(ConfigError, match=message):
        train(warm_config(earlier[0], feature_log, tmp_path / "run", **changes), feature_log)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stage": Stage.downstream, "base": "a", "store": "b", "data__split": Split.time},
            "^init_from: stage=down",
        ),
        ({"init_from": None, **FROZEN}, "^init_freeze: only applies with init_from"),
        ({"model__architecture": Architecture.hstu, "model__history_limit": 8, **FROZEN}, "a baseline has no summ"),
        ({"model__embedding_rows": 8, **FROZEN}, "items share the rows of a hashed table"),
        (
            {"model__item_start": ItemStart.user_factors, "optim__table_rate": 0.0},
            "^model.item_start: user_factors",
        ),
    ],
)
def test_settings_that_contradict_each_other(
    feature_log: EventLog,
    earlier: Run,
    tmp_path: Path,
    changes: dict[str, Any],
    message: str,
) -> None:
    config = warm_config(earlier[0], feature_log, tmp_path, **changes)
    with pytest.raises(ConfigError, match=message):
        replace(config)


def test_a_model_of_user_factors(event_log: EventLog, tmp_path: Path) -> None:
    factors = {"model__item_start": ItemStart.user_factors, "optim__table_rate": 0.0, "optim__epochs": 1}
    config = small_config(event_log, tmp_path / "first", **factors)
    train(config, event_log)
    config = small_config(event_log, tmp_path / "second", init_from=str(tmp_path / "first" / "best"))
    with pytest.raises(ConfigError, match="its item vectors are user factors"):
        train(config, event_log)


def test_a_log_that_lacks_a_feature(feature_log: EventLog, event_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the model reads the feature 'brand', which the log lacks; append a table"):
        train(warm_config(earlier[0], event_log, tmp_path / "run"), event_log)
    frame = small_frame()
    table = features(np.unique(frame["item"]))
    table["text"] = [row[:2] for row in table["text"]]
    path = tmp_path / "log"
    short = EventLog.from_frame(frame, path, time_unit="ms", columns=COLUMNS, items=table)
    with pytest.raises(ConfigError, match=r"the feature 'text' is a vector of 2, but was a vector of 3"):
        train(warm_config(earlier[0], short, tmp_path / "run"), short)


def test_a_log_of_other_ids_or_without_times(order_log: EventLog, event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(order_log, tmp_path / "first", optim__epochs=1)
    train(config, order_log)
    with pytest.raises(ConfigError, match=r"its item ids are str, but those of .* are int"):
        train(warm_config(config, event_log, tmp_path / "second"), event_log)
    frame = small_frame()
    named = {"user": frame["user"], "item": [f"i{item}" for item in frame["item"]], "timestamp": frame["timestamp"]}
    timed = EventLog.from_frame(named, tmp_path / "log", time_unit="ms")
    with pytest.raises(ConfigError, match=r"has times, but the log of init_from=.* has no times"):
        train(warm_config(config, timed, tmp_path / "second"), timed)


def test_new_actions_of_a_frozen_summarizer(reordered_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"the actions of .* are \['like', 'buy', 'click'\], but summaries know"):
        train(warm_config(earlier[0], reordered_log, tmp_path, **FROZEN), reordered_log)


def test_a_model_in_the_run_folder(feature_log: EventLog, earlier: Run) -> None:
    with pytest.raises(ConfigError, match="holds the model of init_from, which this run would replace"):
        train(warm_config(earlier[0], feature_log, Path(earlier[0].run_dir)), feature_log)


def test_a_damaged_checkpoint(feature_log: EventLog, earlier: Run, tmp_path: Path) -> None:
    shutil.copytree(earlier[0].run_dir, tmp_path / "first")
    newest = latest_checkpoint(tmp_path / "first" / "checkpoints")
    assert newest is not None
    (newest / "tensors.safetensors").write_bytes(b"")
    config = warm_config(earlier[0], feature_log, tmp_path / "second", init_from=str(tmp_path / "first" / "best"))
    with pytest.raises(CheckpointError, match="holds 0 bytes instead of"):
        train(config, feature_log)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (
            {"validation_from": "2020-10-01", "test_from": "2020-10-20"},
            "trained on events until leave-last-two-out",
        ),
        (
            {"validation_share": 0.1, "test_share": 0.1},
            "but this run holds out what comes after leave-last-20-percent",
        ),
    ],
)
def test_a_model_that_may_know_the_labels(
    feature_log: EventLog,
    earlier: Run,
    tmp_path: Path,
    split: dict[str, Any],
    message: str,
) -> None:
    kind = Split.time if "test_from" in split else Split.share
    config = warm_config(earlier[0], feature_log, tmp_path)
    with pytest.raises(LeakageError, match=message):
        train(replace(config, data=replace(config.data, split=kind, **split)), feature_log)


def test_a_model_of_later_labels(event_log: EventLog, tmp_path: Path) -> None:
    def dated(day: int) -> dict[str, Any]:
        return {"split": Split.time, "validation_from": f"2020-10-{day}", "test_from": "2020-10-25"}

    config = small_config(event_log, tmp_path / "first", optim__epochs=1)
    config = replace(config, data=replace(config.data, **dated(10)))
    train(config, event_log)
    warm = warm_config(config, event_log, tmp_path / "second")
    train(replace(warm, data=replace(warm.data, **dated(12))), event_log)
    with pytest.raises(LeakageError, match=r"was trained on events until \d+, but this run holds out"):
        train(
            replace(
                warm,
                data=replace(warm.data, **dated(10) | {"validation_from": "2020-10-09"}),
                run_dir=str(tmp_path / "third"),
            ),
            event_log,
        )
