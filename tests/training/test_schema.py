"""What a model may use of a log, and logs and splits with nothing to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import small_config
from vista.config import ModelConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.choices import Architecture, Decay, Split
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.training.log_schema import rating_range, schema_of
from vista.training.trainer import train


class TestSchema:
    def test_what_a_log_offers(self, event_log: EventLog, order_log: EventLog, impression_log: EventLog) -> None:
        schema = schema_of(event_log, TrainConfig())
        assert (schema.actions, schema.has_time, schema.rating_range) == (["click", "like"], True, (1.0, 5.0))
        assert (schema.tasks, schema.has_retrieval) == ([], True)
        plain = schema_of(order_log, TrainConfig())
        assert (plain.actions, plain.has_time, plain.rating_range) == (["event"], False, None)
        assert schema_of(impression_log, TrainConfig()).tasks == ["click", "like", "long_view"]
        assert schema_of(impression_log, TrainConfig(optim=OptimConfig(task_weight=0))).tasks == []
        assert not schema_of(impression_log, TrainConfig(optim=OptimConfig(next_weight=0))).has_retrieval

    def test_ratings_are_read_in_blocks(self, event_log: EventLog, monkeypatch: pytest.MonkeyPatch) -> None:
        whole, read = EventLog.gather, []

        def gather(log: EventLog, users: np.ndarray, *rest: np.ndarray, features: bool = True) -> Histories:
            read.append(len(users))
            return whole(log, users, *rest, features=features)

        monkeypatch.setattr(EventLog, "gather", gather)
        ratings = [event_log.slice(user).rating for user in range(event_log.num_users)]
        read.clear()
        low, high = min(each.min() for each in ratings if len(each)), max(each.max() for each in ratings if len(each))
        assert rating_range(event_log, events_per_batch=30) == (low, high)
        assert sum(read) == event_log.num_users and len(read) > 3

    def test_decay_by_time_needs_times(self, order_log: EventLog) -> None:
        config = TrainConfig()
        config.model.decay = Decay.time
        with pytest.raises(ConfigError, match=r"model\.decay=time: .* has no times; set model\.decay=position or none"):
            schema_of(order_log, config)

    @pytest.mark.parametrize("architecture", [each for each in Architecture if each.ranks_only])
    def test_baselines_that_rank_only_need_labeled_impressions(
        self, event_log: EventLog, impression_log: EventLog, architecture: Architecture
    ) -> None:
        config = TrainConfig(model=ModelConfig(architecture=architecture, history_limit=200))
        schema = schema_of(impression_log, config)
        assert (schema.tasks, schema.has_retrieval) == (["click", "like", "long_view"], False)
        with pytest.raises(
            ConfigError, match=rf"model\.architecture={architecture.value}: learns only from .* has none;"
        ):
            schema_of(event_log, config)
        config.optim.task_weight = 0
        with pytest.raises(ConfigError, match=r"from labeled impressions, but optim\.task_weight=0; prepare"):
            schema_of(impression_log, config)

    def test_some_head_must_be_trained(self, event_log: EventLog) -> None:
        with pytest.raises(ConfigError, match=r"optim\.next_weight=0: .* no head would be trained"):
            schema_of(event_log, TrainConfig(optim=OptimConfig(next_weight=0)))

    @pytest.mark.parametrize("name", ["next", "loss", "step", "reconstruction"])
    def test_a_label_named_like_a_key_of_metrics_is_refused(self, tmp_path: Path, name: str) -> None:
        events = {"user": [1], "item": [1], "timestamp": [1]}
        log = EventLog.from_frame(
            events,
            tmp_path / "log",
            time_unit="s",
            impressions={**events, name: [1]},
            columns=SourceColumns(labels=[name]),
        )
        with pytest.raises(ConfigError, match=f"a label cannot be named '{name}'"):
            schema_of(log, TrainConfig())

    def test_a_split_before_the_first_event_leaves_nothing_to_train(self, event_log: EventLog, tmp_path: Path) -> None:
        config = small_config(event_log, tmp_path, data__validation_from="1990-01-01", data__test_from="1991-01-01")
        config.data.split = Split.time
        with pytest.raises(DataError, match="no item occurs in training"):
            train(config, event_log)

    def test_test_labels_before_validation_are_refused(self, event_log: EventLog, tmp_path: Path) -> None:
        config = small_config(event_log, tmp_path, data__validation_from="2021-01-01", data__test_from="2020-10-01")
        config.data.split = Split.time
        with pytest.raises(
            ConfigError, match=r"data\.test_from=2020-10-01: is before data\.validation_from=2021-01-01"
        ):
            train(config, event_log)
