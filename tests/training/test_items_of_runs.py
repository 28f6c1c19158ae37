"""What a model may use of a log, and which of its items have rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, START, Served, model_config, small_config, small_frame
from tests.training.conftest import assert_served_as_validated
from tests.training.worlds import feature_frame
from vista.config import DataConfig, ModelConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Architecture, Codec, Decay, InitFreeze, Split, to_dict
from vista.errors import ConfigError, DataError
from vista.log.event_log import EventLog
from vista.log.features import selected
from vista.model.ranking_model import UNKNOWN_ITEM
from vista.model.registry import with_items
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer, Tail
from vista.training.log_schema import frequent_items, schema_and_readers, schema_of
from vista.training.trainer import Trainer, train, train_model
from vista.training.warm_start import drawn_model


def test_what_a_log_offers(event_log: EventLog, order_log: EventLog, impression_log: EventLog) -> None:
    schema = schema_of(event_log, TrainConfig())
    assert (schema.actions, schema.has_time, schema.rating_range) == (["click", "like"], True, (1.0, 5.0))
    assert (schema.tasks, schema.has_retrieval) == ([], True)
    plain = schema_of(order_log, TrainConfig())
    assert (plain.actions, plain.has_time, plain.rating_range) == (["event"], False, None)
    assert schema_of(impression_log, TrainConfig()).tasks == ["click", "like", "long_view"]
    assert schema_of(impression_log, TrainConfig(optim=OptimConfig(task_weight=0))).tasks == []
    assert not schema_of(impression_log, TrainConfig(optim=OptimConfig(next_weight=0))).has_retrieval


def test_decay_by_time_needs_times(order_log: EventLog) -> None:
    config = TrainConfig()
    config.model.decay = Decay.time
    with pytest.raises(ConfigError, match=r"model\.decay=time: .* has no times; set model\.decay=position or none"):
        schema_of(order_log, config)


@pytest.mark.parametrize("architecture", [each for each in Architecture if each.ranks_only])
def test_baselines_that_rank_only_need_labeled_impressions(
    event_log: EventLog, impression_log: EventLog, architecture: Architecture
) -> None:
    config = TrainConfig(model=model_config(architecture, history_limit=200))
    schema = schema_of(impression_log, config)
    assert (schema.tasks, schema.has_retrieval) == (["click", "like", "long_view"], False)
    with pytest.raises(ConfigError, match=rf"model\.architecture={architecture.value}: learns only from .* has none;"):
        schema_of(event_log, config)
    config.optim.task_weight = 0
    with pytest.raises(ConfigError, match=r"from labeled impressions, but optim\.task_weight=0; prepare"):
        schema_of(impression_log, config)


def test_some_head_must_be_trained(event_log: EventLog) -> None:
    with pytest.raises(ConfigError, match=r"optim\.next_weight=0: .* no head would be trained"):
        schema_of(event_log, TrainConfig(optim=OptimConfig(next_weight=0)))


def test_a_decoder_is_only_made_where_it_is_trained(event_log: EventLog) -> None:
    def has_decoder(config: TrainConfig) -> bool:
        made = drawn_model(config, event_log, *schema_and_readers(event_log, config))
        return any(name.startswith("decoder.") for name in made.state_dict())

    assert not has_decoder(TrainConfig())
    trained = OptimConfig(reconstruction_weight=0.1)
    assert has_decoder(TrainConfig(optim=trained))
    assert not has_decoder(TrainConfig(model=ModelConfig(num_seeds=0), optim=trained))


@pytest.mark.parametrize("name", ["next", "loss", "step", "reconstruction"])
def test_a_label_named_like_a_key_of_metrics_is_refused(tmp_path: Path, name: str) -> None:
    events = {"user": [1], "item": [1], "timestamp": [1]}
    log = EventLog.from_frame(
        events, tmp_path / "log", time_unit="s", impressions={**events, name: [1]}, columns=SourceColumns(labels=[name])
    )
    with pytest.raises(ConfigError, match=f"a label cannot be named '{name}'"):
        schema_of(log, TrainConfig())


def test_a_split_before_the_first_event_leaves_nothing_to_train(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, data__validation_from="1990-01-01", data__test_from="1991-01-01")
    config.data.split = Split.time
    with pytest.raises(DataError, match="no item occurs in training"):
        train(config, event_log)


def test_test_labels_before_validation_are_refused(event_log: EventLog, tmp_path: Path) -> None:
    config = small_config(event_log, tmp_path, data__validation_from="2021-01-01", data__test_from="2020-10-01")
    config.data.split = Split.time
    with pytest.raises(ConfigError, match=r"data\.test_from=2020-10-01: is before data\.validation_from=2021-01-01"):
        train(config, event_log)


LEAST = 6
COLUMNS = SourceColumns(action="action", rating="rating")
NEW = 7777
"""An item that no log has."""


def training_counts(frame: dict[str, Any]) -> Counter[int]:
    """Events of each item, without the last two of each user."""
    counts: Counter[int] = Counter()
    for user in np.unique(frame["user"]):
        items = frame["item"][frame["user"] == user].tolist()
        counts.update(items if len(items) < 3 else items[:-2])
    return counts


def frequent(frame: dict[str, Any], least: int = LEAST) -> set[int]:
    return {item for item, count in training_counts(frame).items() if count >= least}


def as_log(frame: dict[str, Any], folder: Path, **more: Any) -> EventLog:
    return EventLog.from_frame(frame, folder, time_unit="ms", columns=COLUMNS, **more)


def ids_of(model: Any) -> set[int]:
    return set(model.items.ids(np.arange(len(model.items))).tolist())


@pytest.fixture(scope="module")
def run(event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, VistaModel]:
    """A run with a threshold, and its model."""
    folder = tmp_path_factory.mktemp("frequent")
    changes = {"model__counter_keys": ["item"], "optim__window_weight": 0.5}
    config = small_config(event_log, folder / "run", data__min_item_events=LEAST, **changes)
    return config, train(config, event_log)


@pytest.fixture(scope="module")
def store(run: tuple[TrainConfig, VistaModel], event_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Summaries of all events."""
    folder = tmp_path_factory.mktemp("frequent-store") / "store"
    refresh(run[1], event_log, folder, options=RefreshOptions(codec=Codec.float32))
    return folder


def test_frequent_items_have_rows(event_log: EventLog, run: tuple[TrainConfig, VistaModel]) -> None:
    config, model = run
    expected = frequent(small_frame())
    assert 0 < len(expected) < event_log.num_items
    assert ids_of(model) == expected and len(model.item_table) == 1 + len(expected)
    assert model.num_trained_items == len(expected)
    assert frequent_items(event_log, replace(config.data, min_item_events=0)) is event_log.items
    loaded = VistaModel.from_pretrained(Path(config.run_dir) / "best")
    assert ids_of(loaded) == expected and loaded.data.min_item_events == LEAST


def test_the_unknown_item_does_not_learn(run: tuple[TrainConfig, VistaModel]) -> None:
    _, model = run
    assert not model.item_table[UNKNOWN_ITEM].any() and model.item_table[1:].any(1).all()


def test_labels_give_no_item_a_row(tmp_path: Path) -> None:
    """Held-out events of other items, new ones too, change not one bit of a model."""
    frame, other = small_frame(), small_frame()
    users = other["user"]
    for user in np.unique(users):
        own = np.flatnonzero(users == user)
        if len(own) > 2:
            other["item"][own[-2:]] = 10_000 + own[-2:]
    models = []
    for name, given in (("one", frame), ("other", other)):
        log = as_log(given, tmp_path / name / "log")
        changes: dict[str, Any] = {"model__embedding_rows": 23, "optim__validate_every": 0, "optim__epochs": 1}
        models.append(train(small_config(log, tmp_path / name / "run", data__min_item_events=1, **changes), log))
    one, two = models
    assert ids_of(one) == ids_of(two) == frequent(frame, 1)
    for (key, weight), changed in zip(one.state_dict().items(), two.state_dict().values(), strict=True):
        assert torch.equal(weight, changed), key


def test_validation_is_what_the_scorer_reaches(
    event_log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path
) -> None:
    assert_served_as_validated(*run, event_log, tmp_path / "store")


def test_serving_takes_other_items_as_unknown(
    event_log: EventLog, run: tuple[TrainConfig, VistaModel], store: Path
) -> None:
    config, _ = run
    known = sorted(frequent(small_frame()))
    rare = sorted(ids_of_log(event_log) - set(known))
    now = np.array([START + 900 * DAY])

    def tail(item: int) -> Tail:
        last = START + 800 * DAY
        return Tail(np.array([known[0], item]), np.array([last, last + DAY]), np.zeros(2, np.uint8), np.array([0, 2]))

    with Scorer.open(Path(config.run_dir) / "best", store) as scorer:
        scores = scorer.score([103], [*rare, NEW], now=now)
        assert (scores == scores[0, -1]).all()
        ranked = scorer.rank(103, top_k=len(known), now=int(now[0])).items
        assert set(np.asarray(ranked).ravel().tolist()) == set(known)
        after = [scorer.score([103], known, tail=tail(item), now=now) for item in (rare[0], NEW, known[1])]
    np.testing.assert_array_equal(after[0], after[1])
    assert not np.array_equal(after[0], after[2])


def ids_of_log(log: EventLog) -> set[int]:
    return set(log.items.ids(np.arange(log.num_items)).tolist())


def test_summaries_take_other_items_as_unknown(
    event_log: EventLog, run: tuple[TrainConfig, VistaModel], store: Path, tmp_path: Path
) -> None:
    """A log in which one unknown id stands for all items without a row has the same summaries and counters."""
    _, model = run
    frame = small_frame()
    frame["item"] = np.where(np.isin(frame["item"], list(frequent(frame))), frame["item"], NEW)
    log = as_log(frame, tmp_path / "log")
    refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32))
    users = event_log.users.ids(np.arange(event_log.num_users))
    known = sorted(frequent(frame))
    with Scorer.open(model, store) as one, Scorer.open(model, tmp_path / "store") as other:
        for user in users.tolist():
            np.testing.assert_array_equal(one.score([user], known), other.score([user], known))


def test_features_of_the_items_with_rows(tmp_path: Path) -> None:
    """A model has the features of its own items; `vista items add` ranks the others by theirs."""
    frame = small_frame()
    items = np.unique(frame["item"])
    log = as_log(frame, tmp_path / "log", items=feature_frame(items))
    config = small_config(log, tmp_path / "run", data__min_item_events=LEAST, optim__learning_rate=2e-2)
    model = train(config, log)
    assert ids_of(model) == frequent(frame) and model.feature_table is not None
    own = model.items.ids(np.arange(len(model.items)))
    of_log = selected(log.item_features, log.items.rows(own))
    assert not model.feature_table.differs(np.arange(1, 1 + len(own)), of_log, model.schema.item_features).any()
    rare = np.setdiff1d(items, own)
    more = with_items(model, rare.tolist(), selected(log.item_features, log.items.rows(rare)))
    refresh(model, log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as before, Scorer.open(more, tmp_path / "store") as after:
        unknown, by_features = before.score([103], rare), after.score([103], rare)
        np.testing.assert_array_equal(before.score([103], own), after.score([103], own))
    assert (unknown == unknown[0, 0]).all() and len(np.unique(by_features)) > 1


def test_a_warm_start_adds_items_that_have_become_frequent(
    event_log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path
) -> None:
    config, base = run
    frame, later = small_frame(), small_frame(seed=1)
    rare = sorted(set(frame["item"].tolist()) - frequent(frame))
    later["user"] = later["user"] + 8
    later["timestamp"] = later["timestamp"] + 500 * DAY
    later["item"] = np.where(np.arange(len(later["item"])) % 3 == 0, rare[0], later["item"])
    later["item"][1:4] = 1, 2, 1  # new, and rare
    log = as_log({name: np.concatenate([frame[name], later[name]]) for name in frame}, tmp_path / "log")
    counted = {name: np.concatenate([frame[name], later[name]]) for name in frame}
    order = np.lexsort((counted["timestamp"], counted["user"]))
    expected = frequent({name: column[order] for name, column in counted.items()})
    assert rare[0] in expected and 1 not in expected and not set(rare) <= expected
    warm = replace(
        config,
        data=replace(config.data, path=str(log.path)),
        optim=replace(config.optim, epochs=1),
        init_from=str(Path(config.run_dir) / "best"),
        init_freeze=InitFreeze.summarizer,
        run_dir=str(tmp_path / "run"),
    )
    model = train(warm, log)
    assert ids_of(model) == ids_of(base) | expected
    new = sorted(expected - ids_of(base))
    assert new and (model.item_rows(new) > len(base.items)).all() and model.item_table[1:].any(1).all()
    assert model.summarizer_id() == base.summarizer_id()


@pytest.mark.parametrize("architecture", [Architecture.hstu, Architecture.sim])
def test_every_kind_of_model_trains_without_rare_items(
    served_tasks: Served, tmp_path: Path, architecture: Architecture
) -> None:
    """Candidates, labels, and negatives too."""
    log = served_tasks.log
    counts = np.sort(np.bincount(log.gather(np.arange(log.num_users), features=False).item))
    config = replace(
        served_tasks.config,
        model=model_config(architecture, **(to_dict(served_tasks.config.model) | {"history_limit": 20})),
        data=replace(served_tasks.config.data, min_item_events=int(counts[len(counts) // 2])),
        optim=replace(served_tasks.config.optim, epochs=1),
        run_dir=str(tmp_path / "run"),
    )
    model = train_model(config, log)
    assert 0 < len(model.items) < log.num_items and not model.item_table[UNKNOWN_ITEM].any()


def test_settings_that_leave_no_item(event_log: EventLog, tmp_path: Path) -> None:
    most = max(training_counts(small_frame()).values())
    config = small_config(event_log, tmp_path / "run", data__min_item_events=most + 1)
    with pytest.raises(
        ConfigError, match=rf"min_item_events={most + 1}: no item of .* the most frequent one has {most}"
    ):
        Trainer(config, event_log)
    assert len(frequent_items(event_log, DataConfig(min_item_events=most))) >= 1
    with pytest.raises(ConfigError, match=r"data\.min_item_events: must be at least 0"):
        DataConfig(min_item_events=-1)
    with pytest.raises(ConfigError, match=r"data\.min_item_events: the items are those of the base"):
        TrainConfig(
            data=DataConfig(split="time", validation_from="2024-01-02", test_from="2024-01-03", min_item_events=2),  # type: ignore[arg-type]
            base="base",
            store="store",
        )
