"""Tables whose rows are shared by a hash: features, and item IDs."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.training.worlds import (
    END,
    HOUR,
    NEW_ITEM,
    NUM_USERS,
    PARTS,
    begun,
    feature_config,
    feature_frame,
    frames,
    log_of,
)
from vista.cli.item_commands import run_items_add
from vista.config import ItemsAddConfig, ItemTableConfig, TrainConfig
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.log.features import selected
from vista.model.features import HashedVocabulary
from vista.model.registry import with_items
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.training.log_schema import HashCollisions
from vista.training.trainer import train

ROWS = {"brand": 4, "surface": 5, "device": 6, "region": 7}
"""Of an item, an event, a request, and a user."""
HASHED = [f"{name}:{rows}" for name, rows in ROWS.items()]
HASHED_ITEMS = {"model__embedding_rows": 24}
Run = tuple[TrainConfig, VistaModel]


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """More regions than rows."""
    tables = frames()
    tables["users"]["region"] = [f"region {user % 20}" for user in tables["users"]["user"]]
    return log_of(tables, tmp_path_factory.mktemp("hashed") / "log")


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    return feature_config(log, run_dir, **{"model__hashed_features": HASHED, "optim__epochs": 2, **changes})


@pytest.fixture(scope="module")
def run(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with hashed features, and its model."""
    config = config_of(log, tmp_path_factory.mktemp("run"))
    return config, train(config, log)


@pytest.fixture(scope="module")
def item_run(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with hashed item IDs, and its model."""
    config = feature_config(log, tmp_path_factory.mktemp("item-run"), **HASHED_ITEMS)
    return config, train(config, log)


def test_every_kind_of_feature_can_be_hashed(run: Run) -> None:
    config, model = run
    columns = [column for part in PARTS.values() for column in getattr(model.schema, part.schema)]
    assert {column.name: column.size for column in columns if column.hashed} == ROWS
    for name in ("events", "impressions", "users"):
        part = PARTS[name]
        assert part.encoder(model).values[1 : 1 + ROWS[part.names[0]]].any(1).sum() > 1, name
    assert model.features is not None and model.features.values[1:5].any(1).sum() > 1
    features = ["brand of items", "surface of events", "device of impressions", "region of users"]
    lines = [line.partition("feature ")[2] for line in (Path(config.run_dir) / "train.log").read_text().splitlines()]
    messages = [line for line in lines if ": " in line and " of " in line]
    assert [message.split(":")[0] for message in messages] == features
    card = (Path(config.run_dir) / "best" / "README.md").read_text()
    for message in messages:
        feature, _, what = message.partition(": ")
        assert f"| hashed feature {feature} | {what} |" in card


def new_value(name: str, known: str) -> str:
    """A text that training did not see, in the row of one that it saw."""
    rows = HashedVocabulary(ROWS[name])
    return next(text for text in map(str, range(1000)) if rows.rows([text]) == rows.rows([known]))


def test_new_values_are_served_by_their_rows(log: EventLog, run: Run, tmp_path: Path) -> None:
    """They score as a value of the same row that training saw, and not as a missing one."""
    best = Path(run[0].run_dir) / "best"
    refresh(VistaModel.from_pretrained(best), log, tmp_path / "store")
    with Scorer.open(best, tmp_path / "store", task="click") as scorer:

        def scores(device: str | None, surface: str | None) -> list[float]:
            tail = Tail([10], [END], [0], [0, 1], {"surface": [surface]})
            return scorer.score([3], [0], now=END + HOUR, tail=tail, request={"device": device}).tolist()  # type: ignore[no-any-return]

        known = scores("tv", "app")
        assert scores(new_value("device", "tv"), new_value("surface", "app")) == known
        assert len({*map(str, (known, scores(None, "app"), scores("tv", None)))}) == 3


def test_an_added_item_with_a_new_value_has_a_row(run: Run, tmp_path: Path) -> None:
    config, model = run
    shutil.copytree(Path(config.run_dir) / "best", tmp_path / "best")
    new = feature_frame(np.array([901, 902])) | {"brand": ["never seen", None]}
    pl.DataFrame(new).write_parquet(tmp_path / "new.parquet")
    table = ItemTableConfig(paths=[str(tmp_path / "new.parquet")], item="item")
    added = run_items_add(ItemsAddConfig(model=str(tmp_path / "best"), items=table))
    assert added.num_added == 2 and not added.unseen
    grown = VistaModel.from_pretrained(tmp_path / "best")
    assert grown.feature_table is not None
    offsets = grown.feature_table.offsets.tolist()
    first, second = (grown.feature_table.entry[offsets[row]].item() for row in grown.item_rows([901, 902]))
    assert first == 1 + HashedVocabulary(4).rows(["never seen"])[0] and second == 0
    assert grown.summarizer_id() == model.summarizer_id()


def test_a_warm_start_keeps_the_rows(log: EventLog, run: Run, tmp_path: Path) -> None:
    config, model = run
    warm_config = config_of(log, tmp_path, init_from=str(Path(config.run_dir) / "best"), optim__epochs=1)
    assert train(warm_config, log).schema == model.schema
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


def test_items_without_training_events_are_their_features(log: EventLog, item_run: Run) -> None:
    _, model = item_run
    rows = torch.arange(1 + len(model.items))
    silent = int(model.item_rows([NEW_ITEM])[0])
    assert model.id_mask is not None and torch.nonzero(model.id_mask == 0).flatten().tolist() == [silent]
    with torch.no_grad():
        ids, vectors = model.id_vectors(rows), model.item_vectors(rows)
        assert not ids[[0, silent]].any() and ids[1:].any(1).sum() == len(model.items) - 1
        assert model.features is not None and vectors[silent].any()
        torch.testing.assert_close(vectors, ids + model.features(rows))
    assert model.encoder.features is not None and model.encoder.features.values.any(), "features of events train too"


def test_added_items_are_their_features(log: EventLog, item_run: Run) -> None:
    _, model = item_run
    grown = with_items(model, [1001, 1002], selected(log.item_features, np.array([3, 7])))
    old, new = torch.arange(1 + len(model.items)), torch.from_numpy(grown.item_rows([1001, 1002]))
    with torch.no_grad():
        assert torch.equal(grown.item_vectors(old), model.item_vectors(old))
        assert not grown.id_vectors(new).any() and grown.item_vectors(new).any(1).all()
    assert grown.item_table.shape == model.item_table.shape and grown.summarizer_id() == model.summarizer_id()


def test_models_keep_which_items_have_an_id(item_run: Run) -> None:
    config, model = item_run
    loaded = VistaModel.from_pretrained(Path(config.run_dir) / "best")
    assert loaded.id_mask is not None and torch.equal(loaded.id_mask, model.id_mask)
    loaded.id_mask.fill_(1.0)
    assert loaded.summarizer_id() != model.summarizer_id()


def test_a_warm_start_gives_items_with_events_an_id(log: EventLog, item_run: Run, tmp_path: Path) -> None:
    config, base = item_run
    path, trained_item, hidden_item = shutil.copytree(log.path, tmp_path / "log"), 1000, 2000
    later = {"user": [NUM_USERS + 5] * 20, "item": [NEW_ITEM, trained_item, *range(15), 3, 4, hidden_item]}
    later["timestamp"] = [END + HOUR * hour for hour in range(20)]
    rows = feature_frame(np.array([trained_item, hidden_item]))
    grown = EventLog.from_frame(later, path, time_unit="ms", items=rows, append=True)
    data = replace(config.data, path=str(path), validation_from=str(END + HOUR * 18), test_from=str(END + HOUR * 19))
    best = str(Path(config.run_dir) / "best")
    _, made = begun(replace(config, data=data, init_from=best, run_dir=str(tmp_path / "run")), grown)
    model, new = made.model, [NEW_ITEM, trained_item, hidden_item]
    assert base.id_mask is not None and model.id_mask is not None
    known = np.arange(30)
    with torch.no_grad():
        vectors = (one.id_vectors(torch.from_numpy(one.item_rows(known))) for one in (model, base))
        assert torch.equal(*vectors)
    assert model.id_mask[model.item_rows(new)].tolist() == [1, 1, 1], "until events are counted"
    trained = train(made.config, grown)
    assert trained.id_mask is not None
    assert trained.id_mask[trained.item_rows(new)].tolist() == [1, 1, 0]


def test_counts_by_hand() -> None:
    """Values 0 and 1 share row 3. Value 3 would share row 1 with value 2, but does not occur."""
    rows, uses = np.array([[3], [3], [1], [1]]), np.array([5, 2, 3, 0])
    assert HashCollisions.of("color", rows, uses, 4) == HashCollisions("color", 4, 3, 2 / 3, 0.7)


def test_a_value_that_has_one_row_to_itself_does_not_collide() -> None:
    """Values 0 and 1 agree in one row. Value 2 reads row 2 twice, alone; value 3 reads rows of others only."""
    rows, uses = np.array([[0, 1], [0, 3], [2, 2], [1, 3]]), np.array([1, 1, 1, 1])
    assert HashCollisions.of("items", rows, uses, 5) == HashCollisions("items", 5, 4, 0.75, 0.75)
    rows[1, 1] = 4
    assert HashCollisions.of("items", rows, uses, 5) == HashCollisions("items", 5, 4, 0.25, 0.25)


def test_without_values() -> None:
    none = HashCollisions.of("color", np.zeros((2, 1), np.int64), np.zeros(2, np.int64), 4)
    assert none == HashCollisions("color", 4, 0, 0.0, 0.0)
