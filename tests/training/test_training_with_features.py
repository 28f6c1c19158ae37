"""Training, saving, and serving with features of items."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_config, small_frame
from tests.training.test_trainer import assert_same_result
from vista.config import EvaluateConfig, SourceColumns, TrainConfig
from vista.config.choices import Architecture, Codec, ItemStart, Split, Stage
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.splits import split_until, visible_counts
from vista.model.added_items import with_items
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training import run_state, trainer
from vista.training.item_start import training_vectors
from vista.training.log_schema import encoded_features
from vista.training.trainer import train, train_model
from vista.training.validation import Validation

SEQUENCE_MODELS = (Architecture.vista, Architecture.sasrec, Architecture.hstu, Architecture.fuxi_linear)


def feature_frame(items: np.ndarray) -> dict[str, Any]:
    """A table of the items: a category, several categories, a number, and a vector; some are missing."""
    rng = np.random.default_rng(1)
    count = len(items)
    return {
        "item": items,
        "brand": [None if value == 0 else f"brand {value}" for value in rng.integers(0, 5, count)],
        "tags": [[f"tag {tag}" for tag in rng.permutation(6)[: rng.integers(0, 4)]] for _ in items],
        "price": np.where(rng.random(count) < 0.2, np.nan, rng.lognormal(size=count)),
        "text": rng.normal(size=(count, 3)).astype(np.float32).tolist(),
    }


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The small log, with features of its items. The last event of two users is of a new item."""
    frame = small_frame()
    last = np.flatnonzero(np.diff(frame["user"], append=-1))
    frame["item"][last[:2]] = 1000, 2000
    return EventLog.from_frame(
        frame,
        tmp_path_factory.mktemp("features") / "log",
        time_unit="ms",
        columns=SourceColumns(action="action", rating="rating"),
        items=feature_frame(np.unique(frame["item"])),
    )


def feature_config(log: EventLog, run_dir: Path, **changes: Any) -> Any:
    return small_config(log, run_dir, **{"optim__epochs": 2, "optim__learning_rate": 2e-2, **changes})


def changed_table(model: RankingModel) -> None:
    """Give every item the features of the next one."""
    assert model.features is not None and model.features.table is not None
    model.features.table.dense = model.features.table.dense.roll(1, 0)


@pytest.mark.parametrize("architecture", SEQUENCE_MODELS)
def test_every_model_learns_features(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit = 0 if architecture is Architecture.vista else 8
    config = feature_config(
        log, tmp_path / "run", model__architecture=architecture, model__history_limit=limit, optim__epochs=1
    )
    model = train_model(config, log)
    assert [(one.name, one.kind) for one in model.schema.item_features] == [
        ("brand", "category"),
        ("tags", "category"),
        ("price", "number"),
        ("text", "vector"),
    ]
    assert model.features is not None and model.features.dense is not None
    assert model.features.values.abs().sum() > 0 and model.features.dense.abs().sum() > 0
    rows = torch.arange(1 + len(model.items))
    expected = encoded_features(log, model.items, model.schema)
    assert expected is not None and model.features.table is not None
    assert model.features.table.content(len(rows)) == expected.content(len(rows))
    before = model.item_vectors(rows)
    assert not before[0].any()
    torch.testing.assert_close(before, model.id_vectors(rows) + model.features(rows))


def test_without_features_nothing_changes(log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    off = train(feature_config(log, tmp_path / "off", model__use_item_features=False), log)
    monkeypatch.setattr(EventLog, "item_features", None)
    plain = train(feature_config(log, tmp_path / "plain"), log)
    assert off.features is None
    for (name, one), other in zip(off.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_validation_is_what_the_scorer_reaches(log: EventLog, tmp_path: Path) -> None:
    config = feature_config(log, tmp_path / "run")
    model = train(config, log)
    assert isinstance(model, VistaModel)
    refresh(
        model,
        log,
        tmp_path / "store",
        until=split_until(config.data, "validation"),
        options=RefreshOptions(codec=Codec.float32),
    )
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, log, asked).metrics
    measured = Validation(log, model.rows_of(log.items), config)(model)
    assert measured["ndcg@10"] == pytest.approx(served["ndcg@10"], abs=1e-6)
    loaded = VistaModel.from_pretrained(tmp_path / "run" / "best")
    assert loaded.summarizer_id() == model.summarizer_id()
    changed_table(loaded)
    assert loaded.summarizer_id() != model.summarizer_id()
    assert Validation(log, model.rows_of(log.items), config)(loaded) != measured


def test_items_without_training_events_are_their_features(log: EventLog, tmp_path: Path) -> None:
    config = feature_config(log, tmp_path / "run", model__item_start=ItemStart.random)
    model = train(config, log)
    counts = visible_counts(log, split_until(config.data, "train"))
    seen = np.unique(log.gather(np.arange(log.num_users), counts).item)
    unseen = np.setdiff1d(np.arange(log.num_items), seen) + 1
    assert len(unseen) and not model.item_table[torch.from_numpy(unseen)].any()
    assert model.item_table[torch.from_numpy(seen.astype(np.int64) + 1)].any(1).all()


def test_a_run_resumes_bit_identically(log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, killed = run_state.save_checkpoint, []

    def copied(folder: Path, step: int, *rest: Any) -> None:
        save(folder, step, *rest)
        killed.append(shutil.copytree(folder.parent, tmp_path / f"killed-{len(killed)}"))

    changes, whole = {"model__id_dropout": 0.5, "checkpoint_every": 3}, tmp_path / "whole"
    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", copied)
        train(feature_config(log, whole, **changes), log, metrics_every=1)
    assert len(killed) > 2
    for run_dir in (killed[0], killed[-2]):
        train(feature_config(log, run_dir, **changes), log, metrics_every=1)
        assert_same_result(run_dir, whole)


def test_dropped_ids_leave_the_features(log: EventLog, tmp_path: Path) -> None:
    made = trainer.Trainer(feature_config(log, tmp_path, model__id_dropout=0.99), log)
    batch, model = made.source.batch(0, 0), made.model
    assert model.features is not None
    with torch.no_grad():
        for weight in model.features.parameters():
            weight.normal_()
    features = model.features(batch.rows)
    torch.manual_seed(0)
    dropped = training_vectors(model.train(), batch, None)
    assert (dropped == features).all(1).float().mean() > 0.8
    assert torch.equal(training_vectors(model.eval(), batch, None), model.item_vectors(batch.rows))


def test_items_without_events_and_features_are_negatives(tmp_path: Path) -> None:
    frame = small_frame()
    last = np.flatnonzero(np.diff(frame["user"], append=-1))
    frame["item"][last[2:8:2]] = 1000, 2000, 3000
    rows = feature_frame(np.unique(frame["item"]))
    for name in ("brand", "price"):
        rows[name] = list(rows[name])
        rows[name][-1] = None
    rows["tags"][-1], rows["text"][-1] = [], None  # nothing is known of item 3000
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms", items=rows)
    made = trainer.Trainer(feature_config(log, tmp_path, data__num_negatives=100), log)
    count = log.num_items
    assert made.source.batch(0, 0).negatives.item.numel() == count - 2
    known = made.model.rows_with_features()
    assert known is not None and known.tolist() == [False, *[True] * (count - 1), False]
    assert made.source.frequency[-3:].tolist() == [0, 0, 1]


@pytest.fixture(scope="module")
def shown_log(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The log with impressions, with features of its items in a segment of its own."""
    path = tmp_path_factory.mktemp("shown") / "log"
    shutil.copytree(impression_log.path, path)
    items = impression_log.items.ids(range(impression_log.num_items))
    return EventLog.from_frame(None, path, append=True, items=feature_frame(items))


def shown_config(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    times = np.sort(np.asarray(log.impressions.timestamp))  # type: ignore[union-attr]
    split = {
        "data__split": Split.time,
        "data__validation_from": str(times[int(0.6 * len(times))]),
        "data__test_from": str(times[int(0.8 * len(times))]),
    }
    return feature_config(log, run_dir, **split, optim__epochs=1, **changes)


@pytest.mark.parametrize("architecture", [Architecture.din, Architecture.sim, Architecture.twin])
def test_models_that_rank_only_learn_features(shown_log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limits = {"model__history_limit": 8} if architecture is Architecture.din else {"model__search_top_k": 4}
    config = shown_config(shown_log, tmp_path, model__architecture=architecture, **limits)
    model = train_model(config, shown_log)
    assert model.features is not None and model.features.values.any()
    assert len(model.schema.item_features) == 4


@pytest.mark.parametrize("is_extended", [False, True])
def test_downstream_models_keep_the_features_of_their_base(
    shown_log: EventLog, tmp_path: Path, is_extended: bool
) -> None:
    config = shown_config(shown_log, tmp_path / "base", optim__tasks=["click"])
    base = train(config, shown_log)
    cut = int(np.sort(np.asarray(shown_log.impressions.timestamp))[len(shown_log.impressions.timestamp) // 3])  # type: ignore[union-attr]
    refresh(base, shown_log, tmp_path / "store", until=cut)
    if is_extended:
        assert shown_log.item_features is not None
        base = with_items(base, [10**6, 10**6 + 1], shown_log.item_features.select(np.array([3, 5])))
        base.save_pretrained(tmp_path / "base" / "best")
    later = replace(
        config,
        optim=replace(config.optim, tasks=["like"], next_weight=0.0),
        stage=Stage.downstream,
        base=str(tmp_path / "base" / "best"),
        store=str(tmp_path / "store"),
        run_dir=str(tmp_path / "later"),
    )
    model = train(later, shown_log)
    assert model.summarizer_id() == base.summarizer_id() and model.num_trained_items == base.num_trained_items
    rows = torch.arange(1 + len(base.items))
    assert torch.equal(model.item_vectors(rows), base.item_vectors(rows))
