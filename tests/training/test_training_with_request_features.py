"""Training, validating, and serving with features of requests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, small_config, small_frame
from vista.config import EvaluateConfig, SourceColumns, TrainConfig
from vista.config.choices import Architecture, Codec, InitFreeze, Split, Stage
from vista.errors import ConfigError
from vista.evaluation.cases import ImpressionCases, impression_cases, request_starts
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.evaluation.raw_history import RawHistoryAnswers
from vista.log.event_log import EventLog
from vista.log.splits import split_until
from vista.model.baselines.history_model import HistoryModel
from vista.model.inference import request_feature_vectors
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.training.log_schema import schema_and_readers, schema_of
from vista.training.request_features import request_reader
from vista.training.trainer import Trainer, train, train_model
from vista.training.validation import Validation
from vista.training.warm_start import WarmStart

Frames = tuple[dict[str, Any], dict[str, Any]]
"""Columns of events, and of impressions."""
TASKS = ["click", "like", "long_view"]


@pytest.fixture(scope="module")
def frames(impression_log: EventLog) -> Frames:
    """The simulated log, with features of requests that differ between the impressions of one time. Some are missing.

    Three quarters of the clicks are those on a phone.
    """
    log, table = impression_log, impression_log.impressions
    assert table is not None
    events = log.gather(np.arange(log.num_users))
    rng, count = np.random.default_rng(4), table.num_impressions
    device = rng.choice(["desktop", "phone", "tv", ""], count)
    hour = np.where(rng.random(count) < 0.2, np.nan, rng.integers(0, 24, count))
    labels = {task: np.asarray(table.label)[:, index] for index, task in enumerate(table.tasks)}
    labels["click"] = np.where(rng.random(count) < 0.75, device == "phone", labels["click"]).astype(np.uint8)
    happened = {
        "user": log.users.ids(np.repeat(np.arange(log.num_users), events.lengths)),
        "item": log.items.ids(events.item),
        "timestamp": np.asarray(events.timestamp),
        "action": np.array(log.actions)[events.action],
    }
    shown = {
        "user": log.users.ids(np.repeat(np.arange(log.num_users), np.diff(table.offsets))),
        "item": log.items.ids(table.item),
        "timestamp": np.asarray(table.timestamp),
        "device": [value or None for value in device.tolist()],
        "hour": hour,
    }
    return happened, shown | labels


def log_of(frames: Frames, path: Path, **changes: Any) -> EventLog:
    """A log of these frames.

    Args:
        changes: other columns of impressions; None leaves a feature of requests out.
    """
    events, shown = frames
    shown = {name: column for name, column in (shown | changes).items() if column is not None}
    features = [name for name in ("device", "hour") if name in shown]
    return EventLog.from_frame(
        events,
        path,
        time_unit="ms",
        columns=SourceColumns(action="action", labels=TASKS),
        impressions=shown,
        request_categories=[name for name in features if isinstance(shown[name], list)],
        request_numbers=[name for name in features if not isinstance(shown[name], list)],
    )


@pytest.fixture(scope="module")
def log(frames: Frames, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(frames, tmp_path_factory.mktemp("requests") / "log")


def config_of(log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run that is split by time, at 60 % and 80 % of the impressions."""
    assert log.impressions is not None
    times = np.sort(np.asarray(log.impressions.timestamp))
    split = {
        "data__split": Split.time,
        "data__validation_from": str(times[int(0.6 * len(times))]),
        "data__test_from": str(times[int(0.8 * len(times))]),
        "data__tokens_per_batch": 256,
        "optim__learning_rate": 2e-2,
    }
    return small_config(log, run_dir, **(split | changes))


def only(cases: ImpressionCases, n: int) -> ImpressionCases:
    """One of the impressions, with no other of its request."""
    each = ("user", "seen", "item", "timestamp", "label", "mask")
    probability = None if cases.probability is None else cases.probability[n : n + 1]
    features = cases.features.select(slice(n, n + 1))
    parts = {name: getattr(cases, name)[n : n + 1] for name in each}
    return replace(cases, **parts, probability=probability, features=features)


@pytest.mark.parametrize("architecture", Architecture)
def test_every_model_learns_features_of_requests(log: EventLog, tmp_path: Path, architecture: Architecture) -> None:
    limit = 0 if architecture in (Architecture.vista, Architecture.sim, Architecture.twin) else 8
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__epochs": 1}
    config = config_of(log, tmp_path / "run", **changes)
    model = train_model(config, log)
    assert [(one.name, one.kind) for one in model.schema.request_features] == [
        ("device", "category"),
        ("hour", "number"),
    ]
    assert model.request_encoder is not None and model.request_encoder.dense is not None
    assert model.request_encoder.values.abs().sum() > 0 and model.request_encoder.dense.abs().sum() > 0
    assert model.request_features is not None and model.request_features.columns == model.schema.request_features
    if isinstance(model, HistoryModel):
        asked = EvaluateConfig(split="validation", progress=False)
        before = evaluate_model(model, log, asked).metrics
        loaded = load_model(tmp_path / "run" / "best")
        assert isinstance(loaded, HistoryModel)
        assert evaluate_model(loaded, log, asked).metrics == before
        rows = model.rows_of(log.items)
        cases, answers = impression_cases(log, 0, None), RawHistoryAnswers(model, log, rows, events_per_batch=300)
        together = answers.probabilities(cases)
        for n in range(0, len(cases.user), 37):
            np.testing.assert_allclose(answers.probabilities(only(cases, n))[0], together[n], atol=1e-6)
        with torch.no_grad():
            model.request_encoder.values.mul_(-1)
        assert evaluate_model(model, log, asked).metrics["ne/click"] != before["ne/click"]


def test_a_feature_that_decides_clicks_predicts_them(log: EventLog, tmp_path: Path) -> None:
    quality = {}
    for use in (True, False):
        config = config_of(log, tmp_path / str(use), model__use_request_features=use, optim__epochs=5)
        model = train(config, log)
        assert bool(model.schema.request_features) == use
        quality[use] = Validation(log, model.rows_of(log.items), config)(model)["auc/click"]
        card = (tmp_path / str(use) / "best" / "README.md").read_text()
        assert ("Labeled tasks read features of requests: `device`, `hour`. Pass them (`request`)." in card) == use
    assert quality[True] > 0.75 > 0.65 > quality[False]


def test_without_features_nothing_changes(log: EventLog, frames: Frames, tmp_path: Path) -> None:
    off = train(config_of(log, tmp_path / "off", model__use_request_features=False), log)
    other = log_of(frames, tmp_path / "log", device=None, hour=None)
    plain = train(config_of(other, tmp_path / "plain"), other)
    assert off.request_encoder is None and off.request_features is None
    for (name, one), weight in zip(off.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(one, weight), name


def test_serving_predicts_what_validation_predicts(
    log: EventLog, frames: Frames, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Validation reads the log, and the scorer gets values by name, also if the log's codes are not the model's."""
    config = config_of(log, tmp_path / "run")
    model = train(config, log)
    options = RefreshOptions(codec=Codec.float32)
    refresh(model, log, tmp_path / "store", until=split_until(config.data, "validation"), options=options)
    asked = EvaluateConfig(split="validation", progress=False)
    shown = frames[1]
    is_early = shown["timestamp"] < int(str(config.data.validation_from))
    devices = ["app" if early else name for early, name in zip(is_early, shown["device"], strict=True)]
    grown = log_of(frames, tmp_path / "grown", device=devices)
    values = grown.request_features["device"]
    assert values is not None and values.ids(np.arange(4)).tolist() == ["app", "desktop", "phone", "tv"]
    measured = Validation(log, model.rows_of(log.items), config)(model)
    assert {"auc/click", "ne/click"} <= measured.keys()
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        for one in (log, grown):
            served = evaluate_scorer(scorer, one, asked).metrics
            again = Validation(one, model.rows_of(log.items), config)(model)
            for name, value in measured.items():
                assert served[name] == pytest.approx(value, abs=1e-6), name
                assert again[name] == value, name
        silent = log_of(frames, tmp_path / "silent", device=None, hour=None)
        assert evaluate_scorer(scorer, silent, asked).metrics["ne/click"] > measured["ne/click"]
        assert "silent: lacks the features device, hour of impressions, so the model" in caplog.text
        texts = log_of(frames, tmp_path / "texts", hour=["noon"] * len(devices))
        message = r"'hour' of impressions is a category, but a number to .* impressions\.numbers=\[hour\], or train"
        with pytest.raises(ConfigError, match=message):
            evaluate_scorer(scorer, texts, asked)


def test_numbers_are_measured_on_the_impressions_of_training(log: EventLog, frames: Frames, tmp_path: Path) -> None:
    config, shown = config_of(log, tmp_path / "run"), frames[1]
    hidden = shown["timestamp"] >= int(str(config.data.validation_from))
    assert 0 < hidden.sum() < len(hidden)
    expected = schema_of(log, config).request_features
    for name, changed in (("hidden", hidden), ("seen", ~hidden)):
        other = log_of(frames, tmp_path / name, hour=np.where(changed, 1000, shown["hour"]))
        assert (schema_of(other, config).request_features == expected) == (name == "hidden")


def test_values_that_only_hidden_impressions_have_are_missing(log: EventLog, frames: Frames, tmp_path: Path) -> None:
    config, shown = config_of(log, tmp_path / "run"), frames[1]
    hidden = shown["timestamp"] >= int(str(config.data.validation_from))
    devices = ["app" if late else name for late, name in zip(hidden, shown["device"], strict=True)]
    other = log_of(frames, tmp_path / "other", device=devices)
    whole, reader = other.request_features["device"], request_reader(other, config, None)
    assert whole is not None and len(whole) == 4 and reader is not None
    known = reader.values["device"]
    assert known is not None and known.ids(range(len(known))).tolist() == ["desktop", "phone", "tv"]
    assert Trainer(config, other).model.schema.request_features == reader.columns


def test_what_a_user_was_shown_at_one_time_is_one_request(log: EventLog) -> None:
    cases = impression_cases(log, 0, None)
    keys = list(zip(cases.user.tolist(), cases.timestamp.tolist(), strict=True))
    starts = request_starts(cases)
    assert starts.tolist() == [n for n, key in enumerate(keys) if n == 0 or key != keys[n - 1]]
    device = cases.features.columns["device"]
    assert (device[starts[starts < len(device) - 1]] != device[starts[starts < len(device) - 1] + 1]).any()


def test_downstream_models_have_their_own(log: EventLog, tmp_path: Path) -> None:
    """The base was trained without features of requests; models of both kinds are served by one store."""
    assert log.impressions is not None
    times = np.sort(np.asarray(log.impressions.timestamp))
    early = str(times[int(0.3 * len(times))])
    base = train(config_of(log, tmp_path / "base", data__validation_from=early, model__use_request_features=False), log)
    refresh(base, log, tmp_path / "store", until=early)
    config = config_of(
        log,
        tmp_path / "run",
        stage=Stage.downstream,
        base=str(tmp_path / "base" / "best"),
        store=str(tmp_path / "store"),
    )
    model = train(config, log)
    assert isinstance(model, VistaModel) and model.request_encoder is not None
    assert model.request_encoder.values.abs().sum() > 0
    assert model.summarizer_id() == base.summarizer_id()
    since = int(early)
    recent, all_of_them = (schema_of(log, config, begin).request_features for begin in (since, None))
    assert model.schema.request_features == recent != all_of_them
    user = log.users.ids([0])
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store") as scorer:
        phone, tv = (scorer.score(user, [1, 2], request={"device": each}) for each in ("phone", "tv"))
        assert np.abs(phone - tv).max() > 1e-4


def test_a_run_without_tasks_reads_none(log: EventLog, tmp_path: Path) -> None:
    made = Trainer(config_of(log, tmp_path, optim__task_weight=0.0), log)
    assert made.model.schema.request_features == [] and made.source.batch(0, 0).impressions.entry is None


def impressions_of(frame: dict[str, Any], devices: list[str], **more: Any) -> dict[str, Any]:
    """An impression at the time of each event, with features of its request."""
    rng, count = np.random.default_rng(5), len(frame["user"])
    hour = np.where(rng.random(count) < 0.2, np.nan, rng.integers(0, 24, count))
    shown = {name: frame[name] for name in ("user", "item", "timestamp")}
    return shown | {"click": rng.integers(0, 2, count), "device": rng.choice(devices, count), "hour": hour} | more


@pytest.mark.parametrize("freeze", InitFreeze)
def test_a_warm_start_matches_values_by_name(tmp_path: Path, freeze: InitFreeze) -> None:
    """The grown log has a new value, in front of the known ones, and a new column."""
    columns = SourceColumns(action="action", rating="rating", labels=["click"])
    options: dict[str, Any] = {"time_unit": "ms", "columns": columns, "request_numbers": ["hour"]}
    frame = small_frame()
    shown = impressions_of(frame, ["phone", "tv"])
    log = EventLog.from_frame(frame, tmp_path / "log", impressions=shown, request_categories=["device"], **options)
    base = train(small_config(log, tmp_path / "base", optim__epochs=1), log)
    later = small_frame(seed=1) | {"user": frame["user"] + 8, "timestamp": frame["timestamp"] + 500 * DAY}
    shown = impressions_of(later, ["desktop", "tv"], app=["web"] * len(later["user"]))
    log = EventLog.from_frame(
        later, tmp_path / "log", impressions=shown, request_categories=["device", "app"], append=True, **options
    )
    config = small_config(
        log, tmp_path / "run", optim__epochs=1, init_from=str(tmp_path / "base" / "best"), init_freeze=freeze
    )
    warm = WarmStart.open(config, log)
    made = warm.model(*schema_and_readers(log, warm.config))
    for before, after in ((base, made), (base, train(config, log))):
        assert [column.name for column in after.schema.request_features] == ["device", "hour", "app"]
        assert after.schema.request_features[1] == before.schema.request_features[1]
        assert after.request_features is not None and before.request_features is not None
        device = after.request_features.values["device"]
        assert device is not None and device.ids(np.arange(3)).tolist() == ["phone", "tv", "desktop"]
    request = {"device": ["phone", "tv", None], "hour": [1.0, 20.0, None]}
    vectors = [
        request_feature_vectors(one, one.request_features.encode(one.request_features.parse(request, 3), 3), 3)
        for one in (base, made)
        if one.request_features is not None
    ]
    torch.testing.assert_close(vectors[0], vectors[1])
    assert vectors[0] is not None and vectors[0].abs().sum() > 0
    assert made.summarizer_id() == base.summarizer_id() or freeze is InitFreeze.none
