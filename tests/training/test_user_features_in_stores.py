"""Features of users in records: what scorers, refreshes, merges, shards, and exports do with them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.scorer.test_scorer_exactness import same
from tests.training.worlds import END, HOUR, NEW_USER, NUM_USERS, feature_config, frames, log_of
from vista.cli.store_commands import run_store_get
from vista.config import StoreGetConfig
from vista.config.checks import Codec
from vista.errors import StoreError
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.features import row_features
from vista.log.vocabulary import Vocabulary
from vista.model.features import RowFeatureReader
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, merge, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store.layout import Shard
from vista.store.parquet import export_store, import_store
from vista.store.reader import ShardedReader, StoreReader
from vista.training.trainer import train

EXACT = RefreshOptions(codec=Codec.float32)
ITEMS = np.arange(8)


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(frames(), tmp_path_factory.mktemp("users") / "log")


@pytest.fixture(scope="module")
def best(log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model that reads features of users and items only."""
    folder = tmp_path_factory.mktemp("run")
    sizes = {"model__dim": 32, "model__num_seeds": 16, "model__tail_len": 16}  # whose products do not depend on others
    unread = {"model__ignore": ["event_features", "request_features"]}
    train(feature_config(log, folder, optim__epochs=4, **unread, **sizes), log)
    return folder / "best"


@pytest.fixture
def model(best: Path) -> VistaModel:
    return VistaModel.from_pretrained(best)


@pytest.fixture(scope="module")
def store(log: EventLog, best: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("store") / "store"
    refresh(VistaModel.from_pretrained(best), log, folder, options=EXACT)
    return folder


def copied(log: EventLog, to: Path) -> EventLog:
    return EventLog.open(shutil.copytree(log.path, to))


def test_a_changed_feature_is_refreshed_without_new_events(
    log: EventLog, best: Path, model: VistaModel, store: Path, tmp_path: Path
) -> None:
    users, own = log.users.ids(np.arange(NUM_USERS)), Path(shutil.copytree(store, tmp_path / "store"))
    with Scorer.open(best, own) as scorer:
        before = scorer.score(users, ITEMS)
    moved = {"user": users[:2], "region": ["elsewhere", "elsewhere"], "age": [np.nan, 30.0]}  # new to the model
    grown = EventLog.from_frame(None, copied(log, tmp_path / "log").path, append=True, users=moved)
    report = refresh_incremental(model, grown, own)
    assert "user_features" not in grown.__dict__  # Those of all users were not read.
    assert report.num_users == 2 and report.num_events == 0
    with Scorer.open(best, own) as scorer:
        after = scorer.score(users, ITEMS)
    assert (after[:2] != before[:2]).all()
    np.testing.assert_array_equal(after[2:], before[2:])
    refresh(model, grown, tmp_path / "full", options=EXACT)
    with Scorer.open(best, tmp_path / "full") as scorer:
        np.testing.assert_array_equal(scorer.score(users, ITEMS), after)
    erase_users(grown.path, [int(users[0])])
    assert refresh_incremental(model, EventLog.open(grown.path), own).counts["removed"] == 1


def test_a_store_with_other_features_is_refused(log: EventLog, model: VistaModel, store: Path, tmp_path: Path) -> None:
    """The models have the same summarizer, so only the features tell."""
    plain = VistaModel(model.config, replace(model.schema, user_features=[]), model.items, model.data).eval()
    plain.load_state_dict({name: one for name, one in model.state_dict().items() if "user_encoder" not in name})
    plain.set_item_features(model.feature_table)
    assert plain.summarizer_id() == model.summarizer_id()
    refresh(plain, log, tmp_path / "plain")
    with pytest.raises(StoreError, match="records do not hold the user features region, age as the model reads them; "):
        Scorer.open(model, tmp_path / "plain")
    with pytest.raises(StoreError, match="run a full refresh with this model"):
        refresh_incremental(model, log, tmp_path / "plain")
    with pytest.raises(StoreError, match="run a full refresh with this model"):
        refresh_incremental(plain, log, store)
    with Scorer.open(plain, store) as scorer:  # what it does not read does not matter
        assert np.isfinite(scorer.score([1, 2], ITEMS)).all()
    assert model.user_features is not None
    values = dict(model.user_features.values) | {"region": Vocabulary.from_ids(["south", "west"])}
    model.user_features = RowFeatureReader(model.user_features.columns, values)
    with pytest.raises(StoreError, match="do not hold the user features region as the model reads them"):
        Scorer.open(model, store)


def test_stores_of_several_logs_are_merged(log: EventLog, model: VistaModel, store: Path, tmp_path: Path) -> None:
    later = {"user": [0, 1], "item": [1, 2], "timestamp": [END] * 2}
    moved = {"user": [0, 1], "region": ["south", None], "age": [33.0, np.nan]}
    other = EventLog.from_frame(later, tmp_path / "other", time_unit="ms", users=moved)
    refresh(model, other, tmp_path / "b", options=EXACT)
    merge(model, [(store, log), (tmp_path / "b", other)], tmp_path / "merged")
    with StoreReader.open(tmp_path / "merged") as reader, StoreReader.open(store) as first:
        merged, before = reader.get_many(np.arange(4)).features, first.get_many(np.arange(4)).features
    assert merged["region"].tolist() == [1, 1, 0, 1] and before["region"].tolist() == [0, 1, 0, 1]
    assert merged["age"][0] == 33.0
    np.testing.assert_array_equal(merged["age"][1:], before["age"][1:])


def test_shards_exports_and_copies_hold_features(log: EventLog, model: VistaModel, store: Path, tmp_path: Path) -> None:
    for index in range(2):
        refresh(model, log, tmp_path / "shards", shard=Shard(index, 2), options=EXACT)
    users = [3, 10**6, 0, 2]
    with StoreReader.open(store) as one, ShardedReader(tmp_path / "shards") as sharded:
        held, same_users = one.get_many(users).features, sharded.get_many(users)
    assert held["region"].tolist() == [1, -1, 0, 0] and np.isnan(held["age"][1])
    assert held["region"].dtype == np.int32 and held["age"].dtype == np.float32
    without = same_users.without(np.array([True, False, False, False])).features
    for name, values in held.items():
        np.testing.assert_array_equal(same_users.features[name], values)
        np.testing.assert_array_equal(without[name][1:], values[1:])
    assert without["region"][0] == -1 and np.isnan(without["age"][0])
    export_store(store, tmp_path / "out.parquet")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema["user.region"] == pl.Int32 and frame.schema["user.age"] == pl.Float32
    assert frame.filter(pl.col("user") == 3)["user.region"].to_list() == [1]
    import_store(tmp_path / "out.parquet", tmp_path / "new")
    with Scorer.open(model, tmp_path / "new") as imported, Scorer.open(model, tmp_path / "shards") as sharded_scorer:
        np.testing.assert_array_equal(imported.score(users, ITEMS), sharded_scorer.score(users, ITEMS))
    text = run_store_get(StoreGetConfig(store=str(store), user="3"))
    assert f"features:          region 1, age {held['age'][0]}" in text


def test_a_call_may_pass_features_of_users(log: EventLog, best: Path, store: Path) -> None:
    """They replace those of the record, so a user without a record scores as one with an empty history."""
    rows, values = row_features(log.user_features)
    now, known = END + HOUR, rows.named(values)
    with Scorer.open(best, store) as scorer:
        users = [int(user) for user in list(scorer.store.keys())[:3]]
        own = {name: [column[row] for row in log.users.rows(users)] for name, column in known.items()}
        expected = scorer.predict(users, ITEMS, now=now)
        for task, scores in scorer.predict(users, ITEMS, now=now, request=own).items():
            same(scores, expected[task])
        one = {"region": own["region"]}  # the other columns stay
        same(scorer.score(users, ITEMS, now=now, request=one), expected[scorer.task])
        swapped = {"region": ["south" if region == "north" else "north" for region in own["region"]]}
        for task, scores in scorer.predict(users, ITEMS, now=now, request=swapped).items():
            assert (scores != expected[task]).any(1).all(), task
        north, south, missing = (
            scorer.score([NEW_USER], ITEMS, now=now, request=request)[0]
            for request in ({"region": "north"}, {"region": "south"}, None)
        )
        assert (north > south + 0.03).all() and (north != missing).all()
        ranking = scorer.rank(NEW_USER, candidates=ITEMS, now=now, request={"region": "north"})
        same(ranking.scores, np.sort(north)[::-1])
        told = scorer.explain(NEW_USER, ITEMS, now=now, request={"region": "north"})
        np.testing.assert_allclose(1 / (1 + np.exp(-told.value)), north, atol=2e-5)
        for request, message in (
            ({"region": [["north"] * len(ITEMS)]}, "request: 'region' has shape .* one value, or .* feature of users"),
            ({"region": 1.5}, "request: 'region' is a category"),
            ({"rainfall": 1}, "request: this model reads no features of requests"),
        ):
            with pytest.raises(ValueError, match=message):
                scorer.score([NEW_USER], ITEMS, now=now, request=request)
