"""Training, validating, refreshing, and serving with features of users."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from tests.conftest import small_config
from tests.scorer.test_scorer_exactness import same
from vista.cli.store_commands import run_store_get
from vista.config import EvaluateConfig, SourceColumns, StoreGetConfig, TrainConfig
from vista.config.choices import Architecture, Codec, InitFreeze, Split, Stage, TargetAttentionKind
from vista.errors import CheckpointError, ConfigError, StoreError
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures
from vista.log.splits import split_until
from vista.log.user_features import UserFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import HistoryModel
from vista.model.inference import user_feature_vectors
from vista.model.log_users import LogUsers
from vista.model.registry import load_model
from vista.model.row_feature_reader import RowFeatureReader
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, merge, refresh, refresh_incremental
from vista.scorer import Scorer
from vista.store.admin.parquet import export_store, import_store
from vista.store.reader import StoreReader
from vista.store.sharded_reader import ShardedReader
from vista.store.shards import Shard
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation
from vista.training.warm_start import WarmStart

NUM_USERS, NUM_ITEMS = 60, 30
START = 1_700_000_000


def frames() -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Events, impressions, and users of two regions, of whom mostly those in the north click.

    One more user has only impressions, so a store has no record of that user.
    """
    rng = np.random.default_rng(0)
    users = np.arange(NUM_USERS)
    region = np.where(users % 2 == 0, "north", "south")
    times = START + 3600 * np.arange(NUM_USERS * 12)
    user = rng.permutation(np.repeat(users, 12))
    events = {"user": user, "item": rng.integers(0, NUM_ITEMS, len(user)), "timestamp": times}
    shown_user, shown = np.repeat(user, 2), rng.integers(0, NUM_ITEMS, 2 * len(user))
    click = (shown_user % 2 == 0) == (rng.random(len(shown)) < 0.9)
    impressions = {"user": shown_user, "item": shown, "timestamp": np.repeat(times + 60, 2), "click": click.astype(int)}
    for name, more in (("user", [NUM_USERS] * 3), ("item", [1, 2, 3]), ("timestamp", [START + 3600 * 500] * 3)):
        impressions[name] = np.append(impressions[name], more)
    impressions["click"] = np.append(impressions["click"], [1, 0, 1])
    users, region = np.append(users, NUM_USERS), np.append(region, "north")
    age = np.where(rng.random(NUM_USERS + 1) < 0.2, np.nan, rng.integers(18, 80, NUM_USERS + 1)).astype(np.float32)
    return events, impressions, {"user": users, "region": region, "age": age}


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return made_log(tmp_path_factory.mktemp("users") / "log")


def made_log(path: Path, *, users: bool = True) -> EventLog:
    events, impressions, table = frames()
    columns = SourceColumns(labels=["click"])
    given = pl.DataFrame(table) if users else None
    return EventLog.from_frame(events, path, time_unit="s", columns=columns, impressions=impressions, users=given)


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    split = {
        "data__split": Split.time,
        "data__validation_from": str(1000 * (START + 3600 * 450)),
        "data__test_from": str(1000 * (START + 3600 * 600)),
        "data__tokens_per_batch": 128,
        "optim__learning_rate": 2e-2,
    }
    return small_config(log, run_dir, **(split | changes))


@pytest.mark.parametrize("architecture", Architecture)
def test_every_model_learns_features_of_users(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit = 0 if architecture in (Architecture.vista, Architecture.sim, Architecture.twin) else 8
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__epochs": 1}
    model = train_model(config_of(log, tmp_path / "run", **changes), log)
    assert [(one.name, one.kind) for one in model.schema.user_features] == [("region", "category"), ("age", "number")]
    assert model.user_encoder is not None and model.user_encoder.dense is not None
    assert model.user_encoder.values.abs().sum() > 0 and model.user_encoder.dense.abs().sum() > 0
    assert model.user_features is not None and model.user_features.columns == model.schema.user_features
    if isinstance(model, HistoryModel):
        asked = EvaluateConfig(split="validation", progress=False)
        before = evaluate_model(model, log, asked).metrics
        loaded = load_model(tmp_path / "run" / "best")
        assert isinstance(loaded, HistoryModel)
        assert evaluate_model(loaded, log, asked).metrics == before
        with torch.no_grad():
            model.user_encoder.values.mul_(-1)
        assert evaluate_model(model, log, asked).metrics["ne/click"] != before["ne/click"]


@pytest.mark.parametrize("architecture", [Architecture.vista, Architecture.sasrec, Architecture.hstu, Architecture.din])
def test_a_feature_that_decides_clicks_predicts_them(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit, quality = 0 if architecture is Architecture.vista else 8, {}
    for use in (True, False):
        changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__epochs": 8}
        config = config_of(log, tmp_path / str(use), model__use_user_features=use, **changes)
        model = train_model(config, log)
        assert bool(model.schema.user_features) == use
        quality[use] = Validation(log, model.rows_of(log.items), config)(model)["auc/click"]
    assert quality[True] > 0.8 > 0.65 > quality[False]


def test_without_features_nothing_changes(log: EventLog, tmp_path: Path) -> None:
    off = train(config_of(log, tmp_path / "off", model__use_user_features=False), log)
    plain = train(config_of(log, tmp_path / "plain"), made_log(tmp_path / "log", users=False))
    assert off.user_encoder is None and off.user_features is None
    for (name, one), other in zip(off.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def refreshed(log: EventLog, tmp_path: Path, **changes: Any) -> tuple[TrainConfig, VistaModel]:
    """A trained model, whose store covers what validation may see."""
    config = config_of(log, tmp_path / "run", **changes)
    model = train(config, log)
    options = RefreshOptions(codec=Codec.float32)
    refresh(model, log, tmp_path / "store", until=split_until(config.data, "validation"), options=options)
    return config, model


def recoded(log: EventLog) -> EventLog:
    """The same log, with a value more and other codes."""
    changed, features = EventLog.open(log.path), log.user_features
    known = features.values["region"]
    assert known is not None and known.ids([0, 1]).tolist() == ["north", "south"]
    code = features.rows.columns["region"]
    columns = dict(features.rows.columns) | {"region": np.where(code < 0, code, 2 - code).astype(np.int32)}
    values = {name: features.values[name] for name in ("age", "region")}
    values["region"] = Vocabulary.from_ids(["east"]).extended(["south"]).extended(["north"])
    changed.__dict__["user_features"] = UserFeatures(values, RowFeatures(columns))
    return changed


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model__num_seeds": 0},
        {"model__counters": True, "model__mean_token": True},
        {"model__target_attention": TargetAttentionKind.quasi_linear},
    ],
)
def test_serving_predicts_what_validation_predicts(log: EventLog, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Validation reads the log, and the scorer the records. Codes of the log differ from those of the model."""
    config, model = refreshed(log, tmp_path, optim__epochs=2, **changes)
    measured = Validation(log, model.rows_of(log.items), config)(model)
    asked = EvaluateConfig(split="validation", progress=False)
    other = recoded(log)
    assert Validation(other, model.rows_of(log.items), config)(model) == measured
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, log, asked).metrics
        for name, value in measured.items():
            swapped = 0.03 if "auc" in name else 1e-5  # rounding swaps equal scores, and GAUC has few pairs per user
            assert served[name] == pytest.approx(value, abs=swapped), name
    store, until = tmp_path / "other", split_until(config.data, "validation")
    refresh(model, other, store, until=until, options=RefreshOptions(codec=Codec.float32))
    with Scorer.open(tmp_path / "run" / "best", store) as scorer:
        assert evaluate_scorer(scorer, log, asked).metrics == served


def test_training_reads_what_serving_reads(log: EventLog, tmp_path: Path) -> None:
    """User vectors and logits of the windows of a batch equal those of a scorer with the same tail and no summary."""
    config = config_of(log, tmp_path / "run", model__num_seeds=0, data__staleness_share=0.0)
    made = Trainer(config, log)
    model = made.model
    assert isinstance(model, VistaModel) and model.user_encoder is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.eval()
    batch = made.source.batch(0, 0)
    assert batch.user_features is not None
    users = LogUsers(model.user_features, log)
    own = users.encoded(batch.user.numpy())
    assert own is not None and model.user_features is not None
    missing = model.user_features.missing(1)
    is_unknown = (batch.user_features.entry.numpy() == missing.entry).all(1)
    assert 0 < is_unknown.sum() < len(is_unknown) / 2  # some chunks train an unknown user
    np.testing.assert_array_equal(batch.user_features.entry.numpy()[~is_unknown], own.entry[~is_unknown])
    np.testing.assert_array_equal(batch.user_features.dense.numpy()[~is_unknown], own.dense[~is_unknown])
    with torch.no_grad():
        shown = model.shown_vectors(batch.events, model.item_vectors(batch.rows))
        context = model.window_context(batch, shown, model.cut_summaries(batch, shown))
        served = user_feature_vectors(model, own, len(batch.user))
    assert context.user is not None and served is not None
    known = ~is_unknown[batch.windows.chunk.numpy()]
    torch.testing.assert_close(context.user[known], served[batch.windows.chunk][known])


def test_scores_of_users_do_not_depend_on_each_other(log: EventLog, tmp_path: Path) -> None:
    sizes = {"model__dim": 32, "model__num_seeds": 16, "model__tail_len": 16}
    refreshed(log, tmp_path, optim__epochs=1, **sizes)
    users = log.users.ids(np.arange(12))
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        together = scorer.predict(users, np.arange(8))
        vectors = scorer.user_vectors(users)
        for row, user in enumerate(users):
            alone = scorer.predict([user], np.arange(8))
            for task, scores in together.items():
                same(alone[task][0], scores[row])
            same(scorer.user_vectors([user])[0], vectors[row])
            explained = scorer.explain(user, np.arange(8), task="click")
            parts = explained.summary.sum(1) + explained.state + explained.tail.sum(1) + explained.own
            np.testing.assert_allclose(parts + explained.counted + explained.remainder, explained.value, atol=1e-4)
            assert np.abs(explained.remainder - explained.remainder[0]).max() < 1e-3  # it is the bias of the task
        unknown = scorer.score([10**6], np.arange(8))
        assert np.isfinite(unknown).all()
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store", precision="bfloat16") as scorer:
        np.testing.assert_allclose(scorer.predict(users, np.arange(8))["click"], together["click"], atol=0.02)


def test_a_changed_feature_is_refreshed_without_new_events(tmp_path: Path) -> None:
    log = made_log(tmp_path / "log")
    model = train(config_of(log, tmp_path / "run", optim__epochs=2), log)
    best, store = tmp_path / "run" / "best", tmp_path / "store"
    refresh(model, log, store, options=RefreshOptions(codec=Codec.float32))
    users = log.users.ids(np.arange(NUM_USERS))
    with Scorer.open(best, store) as scorer:
        before = scorer.score(users, np.arange(8))
    moved = {"user": [0, 1], "region": ["south", "elsewhere"], "age": [np.nan, 30.0]}  # one value is new to the model
    grown = EventLog.from_frame(None, log.path, append=True, users=moved)
    report = refresh_incremental(model, grown, store)
    assert "user_features" not in grown.__dict__  # Those of all users were not read.
    assert report.num_users == 2 and report.num_events == 0
    with Scorer.open(best, store) as scorer:
        after = scorer.score(users, np.arange(8))
    assert (after[:2] != before[:2]).all()
    np.testing.assert_array_equal(after[2:], before[2:])
    refresh(model, grown, tmp_path / "full", options=RefreshOptions(codec=Codec.float32))
    with Scorer.open(best, tmp_path / "full") as scorer:
        np.testing.assert_array_equal(scorer.score(users, np.arange(8)), after)
    erase_users(log.path, [0])
    assert refresh_incremental(model, EventLog.open(log.path), store).counts["removed"] == 1


def test_a_store_with_other_features_is_refused(tmp_path: Path) -> None:
    """All models have the same summarizer, because their stage 1 starts alike and does not train."""
    log, kept = made_log(tmp_path / "log"), {"optim__epochs": 1}
    model = train(config_of(log, tmp_path / "run", **kept), log)
    plain = copy_without_features(model)
    assert plain.summarizer_id() == model.summarizer_id()
    refresh(plain, log, tmp_path / "plain")
    refresh(model, log, tmp_path / "store")
    with pytest.raises(StoreError, match="records do not hold the user features region, age as the model reads them; "):
        Scorer.open(model, tmp_path / "plain")
    with pytest.raises(StoreError, match="run a full refresh with this model"):
        refresh_incremental(model, log, tmp_path / "plain")
    with pytest.raises(StoreError, match="run a full refresh with this model"):
        refresh_incremental(plain, log, tmp_path / "store")
    with Scorer.open(plain, tmp_path / "store") as scorer:  # what it does not read does not matter
        assert np.isfinite(scorer.score([1, 2], np.arange(8))).all()
    assert model.user_features is not None
    values = dict(model.user_features.values) | {"region": Vocabulary.from_ids(["south", "west"])}
    model.user_features = RowFeatureReader(model.user_features.columns, values)
    with pytest.raises(StoreError, match="do not hold the user features region as the model reads them"):
        Scorer.open(model, tmp_path / "store")


def test_a_log_with_other_features_is_refused(log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = Trainer(config_of(log, tmp_path / "run"), log).model
    assert isinstance(model, VistaModel)
    events, _, table = frames()
    path = tmp_path / "other"
    other = EventLog.from_frame(events, path, time_unit="s", users={"user": table["user"], "region": table["age"]})
    message = r"'region' of users is a number, but a category to .* users\.categories=\[region\], or train a model"
    with pytest.raises(ConfigError, match=message):
        refresh(model, other, tmp_path / "store")
    assert not (tmp_path / "store").exists() and "lacks" not in caplog.text
    refresh(model, made_log(tmp_path / "plain", users=False), tmp_path / "store")
    assert caplog.text.count("plain: lacks the features region, age of users, so") == 1


def copy_without_features(model: VistaModel) -> VistaModel:
    plain = VistaModel(model.config, replace(model.schema, user_features=[]), model.items, model.data).eval()
    weights = {name: one for name, one in model.state_dict().items() if not name.startswith("user_encoder")}
    plain.load_state_dict(weights)
    return plain


def test_stores_of_several_logs_are_merged(tmp_path: Path) -> None:
    log = made_log(tmp_path / "log")
    model = train(config_of(log, tmp_path / "run", optim__epochs=1), log)
    later = {"user": [0, 1], "item": [1, 2], "timestamp": [START + 10**7] * 2}
    moved = {"user": [0, 1], "region": ["south", None], "age": [33.0, np.nan]}
    other = EventLog.from_frame(later, tmp_path / "other", time_unit="s", users=moved)
    parts = [(tmp_path / "a", log), (tmp_path / "b", other)]
    for store, one in parts:
        refresh(model, one, store)
    merge(model, parts, tmp_path / "merged")
    with StoreReader.open(tmp_path / "merged") as reader, StoreReader.open(tmp_path / "a") as first:
        merged, before = reader.get_many(np.arange(4)).features, first.get_many(np.arange(4)).features
    assert merged["region"].tolist() == [1, 1, 0, 1] and before["region"].tolist() == [0, 1, 0, 1]
    assert merged["age"][0] == 33.0
    np.testing.assert_array_equal(merged["age"][1:], before["age"][1:])


def test_a_shorter_tail_and_added_items_keep_the_features(log: EventLog, tmp_path: Path) -> None:
    _, model = refreshed(log, tmp_path, optim__epochs=1)
    users = log.users.ids(np.arange(6))
    shorter = model.with_tail(model.config.tail_len - 1)
    assert shorter.user_features is model.user_features
    with Scorer.open(shorter, tmp_path / "store") as scorer:
        assert np.isfinite(scorer.score(users, np.arange(8))).all()
    loaded = VistaModel.from_pretrained(tmp_path / "run" / "best")
    assert loaded.user_features is not None and loaded.user_features.digests() == model.user_features.digests()  # type: ignore[union-attr]


def test_a_damaged_file_of_values_is_refused(log: EventLog, tmp_path: Path) -> None:
    train(config_of(log, tmp_path / "run", optim__epochs=1), log)
    best = tmp_path / "run" / "best"
    (file,) = best.glob("user_values_0.ids.npy")
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="user_values_0"):
        VistaModel.from_pretrained(best)


def test_downstream_models_read_what_the_store_holds(log: EventLog, tmp_path: Path) -> None:
    early = str(1000 * (START + 3600 * 300))
    base = train(config_of(log, tmp_path / "base", data__validation_from=early, optim__epochs=1), log)
    refresh(base, log, tmp_path / "store", until=early)
    for use in (True, False):
        config = config_of(
            log,
            tmp_path / str(use),
            stage=Stage.downstream,
            base=str(tmp_path / "base" / "best"),
            store=str(tmp_path / "store"),
            model__use_user_features=use,
        )
        model = train(config, log)
        assert isinstance(model, VistaModel) and (model.user_encoder is not None) == use
        assert model.summarizer_id() == base.summarizer_id()
        with Scorer.open(tmp_path / str(use) / "best", tmp_path / "store") as scorer:
            assert np.isfinite(scorer.score([0, 1], np.arange(8))).all()
        if use:
            assert model.user_features is not None and base.user_features is not None
            assert model.user_features.digests() == base.user_features.digests()
            assert model.user_encoder is not None and model.user_encoder.values.abs().sum() > 0


def test_a_warm_start_keeps_values_and_adds_new_ones(log: EventLog, tmp_path: Path) -> None:
    first = train(config_of(log, tmp_path / "first", optim__epochs=1), log)
    grown = made_log(tmp_path / "log")
    moved = {"user": [0], "region": ["east"], "plan": ["gold"]}
    grown = EventLog.from_frame(None, grown.path, append=True, users=moved)
    config = config_of(grown, tmp_path / "next", init_from=str(tmp_path / "first" / "best"))
    warm = WarmStart.open(config, grown)
    made = Trainer(warm.config, grown, warm).model
    assert made.user_features is not None and first.user_encoder is not None and made.user_encoder is not None
    assert list(made.user_features.values) == ["region", "age", "plan"]
    region = made.user_features.values["region"]
    assert region is not None and region.ids([0, 1, 2]).tolist() == ["north", "south", "east"]
    torch.testing.assert_close(made.user_encoder.values[:3], first.user_encoder.values[:3])
    assert not made.user_encoder.values[3].any()


def test_values_of_users_without_visible_events_are_missing(log: EventLog, tmp_path: Path) -> None:
    grown = made_log(tmp_path / "log")
    late = {"user": [10**6], "item": [1], "timestamp": [START + 10**7]}
    table = {"user": [10**6], "region": ["west"], "age": [200.0]}
    grown = EventLog.from_frame(late, grown.path, time_unit="s", users=table, append=True)
    model, before = (Trainer(config_of(one, tmp_path / "run"), one).model for one in (grown, log))
    assert len(grown.user_features.values["region"] or ()) == 3
    assert model.schema.user_features == before.schema.user_features
    assert model.user_features is not None and before.user_features is not None
    assert model.user_features.digests() == before.user_features.digests()


def test_a_frozen_start_keeps_the_values_that_records_name(log: EventLog, tmp_path: Path) -> None:
    """So a store that was written before a new region appeared still serves both models."""
    config = config_of(log, tmp_path / "first", optim__epochs=1)
    train(config, log)
    refresh(load_model(tmp_path / "first" / "best"), log, tmp_path / "store")
    grown = made_log(tmp_path / "log")
    table = {"user": [0, 2], "region": ["west", "west"], "age": [30.0, 31.0]}
    grown = EventLog.from_frame(None, grown.path, users=pl.DataFrame(table), append=True)
    warm = config_of(grown, tmp_path / "second", optim__epochs=1)
    warm = replace(warm, init_from=str(tmp_path / "first" / "best"), init_freeze=InitFreeze.summarizer)
    model = train_model(warm, grown)
    assert grown.user_features.values["region"].ids(range(3)).tolist()[-1] == "west"  # type: ignore[union-attr]
    assert model.user_features is not None and len(model.user_features.values["region"]) == 2  # type: ignore[arg-type]
    with Scorer.open(tmp_path / "second" / "best", tmp_path / "store") as scorer:
        assert np.isfinite(scorer.score([0, 1], [3])).all()


def test_shards_exports_and_copies_hold_features(log: EventLog, tmp_path: Path) -> None:
    model = train(config_of(log, tmp_path / "run", optim__epochs=1), log)
    refresh(model, log, tmp_path / "store")
    for index in range(2):
        refresh(model, log, tmp_path / "shards", shard=Shard(index, 2))
    users = [3, 10**6, 0, 2]
    with StoreReader.open(tmp_path / "store") as one, ShardedReader.open(tmp_path / "shards") as sharded:
        held, same_users = one.get_many(users).features, sharded.get_many(users)
    assert held["region"].tolist() == [1, -1, 0, 0] and np.isnan(held["age"][1])
    assert held["region"].dtype == np.int32 and held["age"].dtype == np.float32
    without = same_users.without(np.array([True, False, False, False])).features
    for name, values in held.items():
        np.testing.assert_array_equal(same_users.features[name], values)
        np.testing.assert_array_equal(without[name][1:], values[1:])
    assert without["region"][0] == -1 and np.isnan(without["age"][0])
    export_store(tmp_path / "store", tmp_path / "out.parquet")
    frame = pl.read_parquet(tmp_path / "out.parquet")
    assert frame.schema["user.region"] == pl.Int32 and frame.schema["user.age"] == pl.Float32
    assert frame.filter(pl.col("user") == 3)["user.region"].to_list() == [1]
    import_store(tmp_path / "out.parquet", tmp_path / "new")
    with Scorer.open(model, tmp_path / "new") as imported, Scorer.open(model, tmp_path / "shards") as sharded_scorer:
        np.testing.assert_array_equal(imported.score(users, np.arange(5)), sharded_scorer.score(users, np.arange(5)))
    text = run_store_get(StoreGetConfig(store=str(tmp_path / "store"), user="3"))
    assert f"features:          region 1, age {held['age'][0]}" in text


def test_a_call_may_pass_features_of_users(log: EventLog, tmp_path: Path) -> None:
    """They replace those of the record, so a user without a record scores as one with an empty history."""
    changes = {"optim__next_weight": 0.5, "model__counters": False}
    model = train(config_of(log, tmp_path / "run", **changes), log)
    assert isinstance(model, VistaModel) and model.user_features is not None
    refresh(model, log, tmp_path / "store", options=RefreshOptions(codec=Codec.float32))
    names, now, unknown = [*model.user_features.values], 1000 * (START + 10**7), 10_000
    known = log.user_features.rows.named(log.user_features.values)
    with Scorer.open(model, tmp_path / "store") as scorer:
        items = scorer.model.items.ids(np.arange(5))
        users = [int(user) for user in list(scorer.store.keys())[:3]]
        own = {name: [column[row] for row in log.users.rows(users)] for name, column in known.items()}
        expected = scorer.predict(users, items, now=now)
        for task, scores in scorer.predict(users, items, now=now, request=own).items():
            same(scores, expected[task])
        one = {"region": own["region"]}  # the other columns stay
        same(scorer.score(users, items, now=now, request=one), expected[scorer.task])
        swapped = {"region": ["south" if region == "north" else "north" for region in own["region"]]}
        for task, scores in scorer.predict(users, items, now=now, request=swapped).items():
            assert (scores != expected[task]).any(1).all(), task

        north, south, missing = (
            scorer.score([unknown], items, now=now, request=request)[0]
            for request in ({"region": "north"}, {"region": "south"}, None)
        )
        assert (north > south + 0.03).all() and (north != missing).all()
        ranking = scorer.rank(unknown, candidates=items, now=now, request={"region": "north"})
        same(ranking.scores, np.sort(north)[::-1])
        told = scorer.explain(unknown, items, now=now, request={"region": "north"})
        np.testing.assert_allclose(1 / (1 + np.exp(-told.value)), north, atol=2e-5)
        assert "region" in names
        for request, message in (
            ({"region": [["north"] * 5]}, "request: 'region' has shape .* one value, or .* it is a feature of users"),
            ({"region": 1.5}, "request: 'region' is a category"),
            ({"rainfall": 1}, "request: this model reads no features of requests"),
        ):
            with pytest.raises(ValueError, match=message):
                scorer.score([unknown], items, now=now, request=request)
