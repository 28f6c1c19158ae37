"""Training, saving, and serving with features of events."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import small_config, small_frame
from tests.training.test_trainer import assert_same_result
from vista.cli.main import main
from vista.config import EvaluateConfig, SourceColumns
from vista.config.choices import Architecture, Codec, Split, Stage
from vista.errors import ConfigError
from vista.evaluation.evaluate import evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures
from vista.log.splits import MIN_EVENTS, split_until, visible_counts
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training import event_features, run_state
from vista.training.event_features import event_reader
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation

SEQUENCE_MODELS = (Architecture.vista, Architecture.sasrec, Architecture.hstu, Architecture.fuxi_linear)


def event_frame(seed: int = 0) -> dict[str, Any]:
    """The small frame, with a category and a number per event; some are missing."""
    frame, rng = small_frame(seed), np.random.default_rng([seed, 9])
    count = len(frame["user"])
    surface = np.array(["", "app", "tv", "web"])[frame["item"] // 10 % 4]  # which tells about the item
    dwell = np.where(rng.random(count) < 0.2, np.nan, rng.lognormal(size=count))
    return frame | {"surface": [name or None for name in surface.tolist()], "dwell": dwell}


def log_of(frame: dict[str, Any], path: Path, *, append: bool = False) -> EventLog:
    return EventLog.from_frame(
        frame,
        path,
        time_unit="ms",
        columns=SourceColumns(action="action", rating="rating"),
        categories=["surface"],
        numbers=["dwell"],
        append=append,
    )


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """The small log, with features of its events."""
    return log_of(event_frame(), tmp_path_factory.mktemp("event-features") / "log")


def feature_config(log: EventLog, run_dir: Path, **changes: Any) -> Any:
    return small_config(log, run_dir, **{"optim__epochs": 2, "optim__learning_rate": 2e-2, **changes})


@pytest.mark.parametrize("architecture", SEQUENCE_MODELS)
def test_every_model_learns_features(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit = 0 if architecture is Architecture.vista else 8
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__epochs": 1}
    model = train_model(feature_config(log, tmp_path / "run", **changes), log)
    assert [(one.name, one.kind) for one in model.schema.event_features] == [
        ("surface", "category"),
        ("dwell", "number"),
    ]
    encoder = model.encoder.features
    assert encoder is not None and encoder.dense is not None
    assert encoder.values.abs().sum() > 0 and encoder.dense.abs().sum() > 0


@pytest.mark.parametrize("architecture", [Architecture.vista, Architecture.sasrec])
def test_a_batch_without_features_is_refused(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit = 0 if architecture is Architecture.vista else 8
    changes = {"model__architecture": architecture, "model__history_limit": limit}
    made = Trainer(feature_config(log, tmp_path / "run", **changes), log)
    batch = made.source.batch(0, 0)
    bare = replace(batch, events=replace(batch.events, entry=None, dense=None))
    with pytest.raises(ValueError, match="has no features of events, which the model reads"):
        made.model.losses(bare, made.model.item_vectors(bare.rows), made.config.optim)


def test_without_features_nothing_changes(log: EventLog, event_log: EventLog, tmp_path: Path) -> None:
    """`event_log` has the same events without features."""
    off = train(feature_config(log, tmp_path / "off", model__use_event_features=False), log)
    plain = train(feature_config(event_log, tmp_path / "plain"), event_log)
    assert off.encoder.features is None and off.event_features is None
    for (name, one), other in zip(off.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def test_numbers_are_measured_on_events_that_training_sees(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = feature_config(log, tmp_path / "run", model__tail_features=["dwell"])
    reader, num_tail = event_reader(log, config)
    assert reader is not None
    columns = reader.columns
    assert [column.name for column in columns] == ["dwell", "surface"] and num_tail == 1
    counts = visible_counts(log, split_until(config.data, "train"))
    dwell = log.gather(np.arange(log.num_users), counts).features.columns["dwell"]
    known = dwell[~np.isnan(dwell)].astype(np.float64)
    assert 0 < len(known) < np.isfinite(log.gather(np.arange(log.num_users)).features.columns["dwell"]).sum()
    assert columns[0].mean == pytest.approx(known.mean()) and columns[0].scale == pytest.approx(known.std())
    monkeypatch.setattr(event_features, "MEASURED_EVENTS", 50)
    step = -(-int(counts.sum()) // 50)
    sample = dwell[::step]
    reader, _ = event_reader(log, config)
    assert reader is not None and reader.columns[0].mean == pytest.approx(np.nanmean(sample.astype(np.float64)))


def test_values_that_only_hidden_events_have_are_missing(tmp_path: Path) -> None:
    frame = event_frame()
    order = np.lexsort((frame["timestamp"], frame["user"]))
    is_last = np.zeros(len(order), np.bool_)
    is_last[order[np.flatnonzero(np.diff(frame["user"][order], append=-1))]] = True
    is_last &= np.bincount(frame["user"])[frame["user"]] >= MIN_EVENTS  # others have no hidden events
    surface = ["car" if last else name for last, name in zip(is_last, frame["surface"], strict=True)]
    log = log_of(frame | {"surface": surface}, tmp_path / "log")
    whole = log.event_features["surface"]
    assert whole is not None and whole.ids(range(4)).tolist() == ["app", "car", "tv", "web"]
    model = train(feature_config(log, tmp_path / "run", optim__epochs=1), log)
    assert model.event_features is not None and model.encoder.features is not None
    known = model.event_features.values["surface"]
    assert known is not None and known.ids(range(len(known))).tolist() == ["app", "tv", "web"]
    assert model.schema.event_features[0].size == 3
    given = RowFeatures({"surface": whole.rows(["car", "web"]).astype(np.int32)})
    assert model.event_recoder(log.event_features)(given, 2).columns["surface"].tolist() == [-1, 2]


def test_columns_that_cannot_be_read_are_refused(log: EventLog, tmp_path: Path) -> None:
    for changes, message in (
        (
            {"model__tail_features": ["device"]},
            r"model.tail_features: 'device' is not a feature .* has: surface, dwell",
        ),
        (
            {"model__tail_features": ["dwell"], "model__use_event_features": False},
            r"model.tail_features: 'dwell' is not a feature of events that the model reads",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            event_reader(log, feature_config(log, tmp_path / "run", **changes))


@pytest.mark.parametrize("tail_features", [None, ["dwell"], []])
def test_validation_is_what_the_scorer_reaches(log: EventLog, tmp_path: Path, tail_features: list[str] | None) -> None:
    config = feature_config(log, tmp_path / "run", model__tail_features=tail_features, optim__epochs=1)
    model = train(config, log)
    assert isinstance(model, VistaModel) and model.encoder.features is not None
    with torch.no_grad():  # so that features matter
        for weight in model.encoder.features.parameters():
            weight.normal_(std=0.3)
    card, line = (tmp_path / "run" / "best" / "README.md").read_text(), "Stage 2 reads features of events: "
    names = "`dwell`" if tail_features else "`surface`, `dwell`"
    assert (f"{line}{names}. Pass those of fresh events (`Tail(features=…)`)." in card) == (tail_features != [])
    assert (line in card) == (tail_features != [])
    model.save_pretrained(tmp_path / "best")
    until = split_until(config.data, "validation")
    refresh(model, log, tmp_path / "store", until=until, options=RefreshOptions(codec=Codec.float32))
    asked = EvaluateConfig(split="validation", top_k=[10], progress=False)
    with Scorer.open(tmp_path / "best", tmp_path / "store") as scorer:
        served = evaluate_scorer(scorer, log, asked).metrics
        columns = scorer.manifest.tail_columns
    assert [column["name"] for column in columns] == (["surface", "dwell"] if tail_features is None else tail_features)
    validation = Validation(log, model.rows_of(log.items), config)
    assert validation(model)["ndcg@10"] == pytest.approx(served["ndcg@10"], abs=1e-6)
    loaded = VistaModel.from_pretrained(tmp_path / "best")
    assert loaded.summarizer_id() == model.summarizer_id()
    assert validation(loaded) == validation(model)
    loaded.event_features = None  # which leaves all features out
    assert validation(loaded) != validation(model)


def test_the_summarizers_id_covers_values_but_not_what_the_tail_reads(log: EventLog, tmp_path: Path) -> None:
    model = train_model(feature_config(log, tmp_path / "run", optim__epochs=1), log)
    assert isinstance(model, VistaModel)
    before = model.summarizer_id()
    object.__setattr__(model.schema, "num_tail_features", 1)
    assert model.summarizer_id() == before
    assert model.event_features is not None
    values = model.event_features.values["surface"]
    assert values is not None
    model.event_features.values["surface"] = type(values).from_ids([f"{name}!" for name in values.ids(range(3))])
    assert model.summarizer_id() != before


def test_downstream_models_keep_the_features_of_their_base(
    log: EventLog, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    times = np.sort(log.gather(np.arange(log.num_users)).timestamp)
    split = {
        "data__split": Split.time,
        "data__validation_from": str(times[int(0.6 * len(times))]),
        "data__test_from": str(times[int(0.8 * len(times))]),
    }
    config = feature_config(log, tmp_path / "base", **split, model__tail_features=["surface"], optim__epochs=1)
    base = train(config, log)
    assert isinstance(base, VistaModel)
    refresh(base, log, tmp_path / "store", until=int(times[int(0.3 * len(times))]))
    later = replace(
        config,
        model=replace(config.model, tail_features=None),
        optim=replace(config.optim, reconstruction_weight=0.0),
        stage=Stage.downstream,
        base=str(tmp_path / "base" / "best"),
        store=str(tmp_path / "store"),
        run_dir=str(tmp_path / "later"),
    )
    model = train(later, log)
    assert isinstance(model, VistaModel)
    assert model.config.tail_features == ["surface"] and model.schema.tail_sizes == {"surface": 3}
    assert model.summarizer_id() == base.summarizer_id()
    with Scorer.open(model, tmp_path / "store") as scorer:  # which holds one column per event of a tail
        assert scorer.score([100, 101], [0, 10], now=int(times[-1])).shape == (2, 2)
    with pytest.raises(ConfigError, match=r"model.tail_features \(\['surface'\] -> \['dwell'\]\)"):
        train(replace(later, model=replace(config.model, tail_features=["dwell"]), run_dir=str(tmp_path / "x")), log)
    capsys.readouterr()
    words = ["store", "get", f"store={tmp_path / 'store'}", "user=115"]
    for more, shown in (([], "0|1|2|-1"), ([f"model={tmp_path / 'base' / 'best'}"], "app|tv|web|None")):
        assert main([*words, *more]) == 0
        head, *events = capsys.readouterr().out.partition("  tail:")[2].splitlines()
        assert "events, oldest first (item, time, action code, surface)" in head
        assert events and all(re.search(rf"  ({shown})$", event) for event in events)


def test_a_run_resumes_bit_identically(log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = feature_config(log, tmp_path / "whole", checkpoint_every=5)
    train(config, log)
    stopped = feature_config(log, tmp_path / "stopped", checkpoint_every=5)
    save = run_state.save_checkpoint

    def save_once(*arguments: Any, **options: Any) -> Path:
        save(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run_state, "save_checkpoint", save_once)
        with pytest.raises(KeyboardInterrupt):
            train(stopped, log)
    train(stopped, log)
    assert_same_result(tmp_path / "whole", tmp_path / "stopped")


def test_a_warm_start_keeps_what_values_mean(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log = log_of(event_frame(), path)
    earlier = train(feature_config(log, tmp_path / "run"), log)
    shutil.copytree(path, tmp_path / "grown")
    more = event_frame(1)
    more["timestamp"] = more["timestamp"] + 10**11
    more["surface"] = ["watch" if name == "tv" else name for name in more["surface"]]
    grown = log_of(more, tmp_path / "grown", append=True)
    config = feature_config(grown, tmp_path / "next", init_from=str(tmp_path / "run" / "best"), optim__epochs=1)
    config.optim.learning_rate = 1e-9
    later = train_model(config, grown)
    assert earlier.event_features is not None and later.event_features is not None
    assert earlier.encoder.features is not None and later.encoder.features is not None
    known, now = earlier.event_features.values["surface"], later.event_features.values["surface"]
    assert known is not None and now is not None
    assert now.ids(range(len(now))).tolist() == [*known.ids(range(len(known))).tolist(), "watch"]
    old, new = earlier.encoder.features.values, later.encoder.features.values
    rows = [0, 1, 2, 3]
    torch.testing.assert_close(new[rows], old[rows], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(new[5:], old[4:], atol=1e-4, rtol=1e-4)
    assert new[4].abs().max() < 1e-4
