"""Training, serving, and growing with features whose values share rows by a hash."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.conftest import DAY, small_config, small_frame
from vista.cli.items_command import run_items_add
from vista.config import EvaluateConfig, ItemsAddConfig, ItemTableConfig, SourceColumns, TrainConfig
from vista.config.choices import Codec, Split
from vista.errors import ConfigError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.hashed_vocabulary import HashedVocabulary
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer, Tail
from vista.training.trainer import train
from vista.training.validation import Validation

ROWS = {"brand": 4, "surface": 5, "device": 6, "region": 7}
"""Of an item, an event, a request, and a user."""
HASHED = [f"{name}:{rows}" for name, rows in ROWS.items()]


def feature_log(path: Path) -> EventLog:
    """The small log, with clicks, and one category for each thing that has features: more values than rows."""
    events, rng = small_frame(), np.random.default_rng(3)
    count, users, items = len(events["user"]), np.unique(events["user"]), np.unique(events["item"])
    shown = {name: events[name] for name in ("user", "item", "timestamp")}
    return EventLog.from_frame(
        events | {"surface": [f"surface {one}" for one in rng.integers(0, 20, count)]},
        path,
        time_unit="ms",
        columns=SourceColumns(action="action", rating="rating", labels=["click"]),
        impressions=shown
        | {"click": rng.integers(0, 2, count), "device": [f"device {one}" for one in rng.integers(0, 20, count)]},
        items={"item": items, "brand": [f"brand {one}" for one in rng.integers(0, 20, len(items))]},
        users={"user": users, "region": [f"region {one}" for one in rng.integers(0, 20, len(users))]},
        categories=["surface"],
        request_categories=["device"],
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return feature_log(tmp_path_factory.mktemp("hashed") / "log")


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    assert log.impressions is not None
    times = np.sort(np.asarray(log.impressions.timestamp))
    split = {
        "data__split": Split.time,
        "data__validation_from": str(times[int(0.6 * len(times))]),
        "data__test_from": str(times[int(0.8 * len(times))]),
        "model__hashed_features": HASHED,
        "optim__epochs": 2,
        "optim__learning_rate": 2e-2,
    }
    return small_config(log, run_dir, **(split | changes))


@pytest.fixture(scope="module")
def run(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainConfig, VistaModel]:
    config = config_of(log, tmp_path_factory.mktemp("run"))
    model = train(config, log)
    assert isinstance(model, VistaModel)
    return config, model


def test_every_kind_of_feature_can_be_hashed(
    log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, model = run
    schema = model.schema
    columns = [*schema.item_features, *schema.event_features, *schema.request_features, *schema.user_features]
    assert {column.name: column.size for column in columns} == ROWS and all(column.hashed for column in columns)
    for encoder, rows in (
        (model.features, 4),
        (model.encoder.features, 5),
        (model.request_encoder, 6),
        (model.user_encoder, 7),
    ):
        assert encoder is not None and len(encoder.values) == 1 + rows and encoder.values[1:].any(1).sum() > 1
    with caplog.at_level(logging.INFO, "vista.training.hash_collisions"):
        train(config_of(log, tmp_path, optim__epochs=1), log)
    features = ["brand of items", "surface of events", "device of impressions", "region of users"]
    messages = [message for message in caplog.messages if message.startswith("feature ")]
    assert [message.split(":")[0] for message in messages] == [f"feature {name}" for name in features]
    card = (Path(config_of(log, tmp_path).run_dir) / "best" / "README.md").read_text()
    for message in messages:
        feature, _, what = message.partition(": ")
        assert f"| hashed {feature} | {what} |" in card


def new_value(name: str, known: str) -> str:
    """A text that training did not see, in the row of one that it saw."""
    rows = HashedVocabulary(ROWS[name])
    return next(text for text in map(str, range(1000)) if rows.rows([text]) == rows.rows([known]))


def test_new_values_are_served_by_their_rows(
    log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path
) -> None:
    """They score as a value of the same row that training saw, and not as a missing one."""
    config, _ = run
    model = Path(config.run_dir) / "best"
    refresh(VistaModel.from_pretrained(model), log, tmp_path / "store")
    now = int(np.max(log.impressions.timestamp))  # type: ignore[union-attr]
    with Scorer.open(model, tmp_path / "store", task="click") as scorer:

        def scores(device: str | None, surface: str | None) -> list[float]:
            tail = Tail([10], [now], [0], [0, 1], {"surface": [surface]})
            scores: list[float] = scorer.score(
                [100], [0], now=now + DAY, tail=tail, request={"device": device}
            ).tolist()
            return scores

        known = scores("device 3", "surface 1")
        assert scores(new_value("device", "device 3"), new_value("surface", "surface 1")) == known
        assert len({*map(str, (known, scores(None, "surface 1"), scores("device 3", None)))}) == 3


def test_validation_is_what_the_scorer_reaches(
    log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path
) -> None:
    config, model = run
    loaded = VistaModel.from_pretrained(Path(config.run_dir) / "best")
    assert loaded.summarizer_id() == model.summarizer_id()
    until = split_until(config.data, "validation")
    refresh(loaded, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    with Scorer.open(Path(config.run_dir) / "best", tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, log, EvaluateConfig(split="validation", progress=False)).metrics
    found = Validation(log, model.rows_of(log.items), config)(loaded)
    assert found["auc/click"] == pytest.approx(served["auc/click"], abs=1e-6)


def test_an_added_item_with_a_new_value_has_a_row(run: tuple[TrainConfig, VistaModel], tmp_path: Path) -> None:
    config, model = run
    shutil.copytree(Path(config.run_dir) / "best", tmp_path / "best")
    pl.DataFrame({"item": [901, 902], "brand": ["never seen", None]}).write_parquet(tmp_path / "new.parquet")
    table = ItemTableConfig(paths=[str(tmp_path / "new.parquet")], item="item")
    added = run_items_add(ItemsAddConfig(model=str(tmp_path / "best"), items=table))
    assert added.num_added == 2 and not added.unseen
    grown = VistaModel.from_pretrained(tmp_path / "best")
    table_of, offsets = grown.feature_table, grown.feature_table.offsets.tolist()  # type: ignore[union-attr]
    assert table_of is not None
    first, second = (table_of.entry[offsets[row] : offsets[row + 1]].tolist() for row in grown.item_rows([901, 902]))
    assert first == [1 + HashedVocabulary(4).rows(["never seen"])[0]] and second == [0]
    assert grown.summarizer_id() == model.summarizer_id()


def test_a_warm_start_keeps_the_rows(log: EventLog, run: tuple[TrainConfig, VistaModel], tmp_path: Path) -> None:
    config, model = run
    warm_config = config_of(log, tmp_path, init_from=str(Path(config.run_dir) / "best"))
    warm = train(replace(warm_config, optim=replace(warm_config.optim, epochs=1)), log)
    assert warm.schema == model.schema
    for hashed, message in (
        ([*HASHED[1:], "brand:5"], r"'brand' is a category of 5 hashed rows, but was a category of 4 hashed rows"),
        (HASHED[1:], r"'brand' is a category, but was a category of 4 hashed rows .*\(model.hashed_features\)"),
    ):
        changed = replace(warm_config, model=replace(warm_config.model, hashed_features=hashed))
        with pytest.raises(ConfigError, match=message):
            train(replace(changed, run_dir=str(tmp_path / "x")), log)


@pytest.mark.parametrize(
    ("hashed", "message"),
    [
        (["brand"], "must list features once each as name:rows"),
        (["brand:0"], "with 1 to 2,147,483,647 rows"),
        (["brand:9999999999"], "got 'brand:9999999999'"),
        ([":5"], "must list features once each"),
        (["brand:5", "brand:6"], "got 'brand:6'"),
        ([5], "got 5"),
        (["colour:5"], r"has no category 'colour'; it has: brand, device, region, surface"),
    ],
)
def test_settings_that_are_refused(log: EventLog, tmp_path: Path, hashed: list[Any], message: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.hashed_features: .*{message}"):
        train(config_of(log, tmp_path, model__hashed_features=hashed), log)
