"""Weights of label events by their rewards: what they are, where they go, and what they must not read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import small_config, small_frame
from vista.config import OptimConfig, SourceColumns, TrainConfig
from vista.errors import ConfigError
from vista.examples.batch_source import BatchSource, ModelReads
from vista.examples.rewards import MOST_WEIGHT, PRIOR_EVENTS, EventRewards
from vista.log.event_log import EventLog
from vista.log.splits import parse_until, visible_counts

COLUMNS = SourceColumns(action="action", rating="rating")


def log_of(path: Path, **changes: Any) -> EventLog:
    frame = small_frame()
    rng = np.random.default_rng(3)
    frame["watched"] = np.where(rng.random(len(frame["user"])) < 0.2, np.nan, rng.exponential(30, len(frame["user"])))
    frame["page"] = np.where(frame["item"] > 200, "home", "search")
    frame |= changes
    return EventLog.from_frame(frame, path, time_unit="ms", columns=COLUMNS, numbers=["watched"], categories=["page"])


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    return log_of(tmp_path_factory.mktemp("rewards") / "log")


def all_weights(log: EventLog, optim: OptimConfig, counts: np.ndarray) -> np.ndarray:
    """Weights of the visible events, end to end."""
    events = log.gather(np.arange(log.num_users), counts)
    return EventRewards(log, counts, optim).weights(events.owner, events)


@pytest.mark.parametrize("temperature", [0.2, 1.0])
@pytest.mark.parametrize("reward", ["rating", "watched", "like"])
def test_weights_equal_their_formula(log: EventLog, reward: str, temperature: float) -> None:
    events = log.gather(np.arange(log.num_users), log.lengths)
    value = {
        "rating": events.rating,
        "watched": events.features.columns["watched"],
        "like": (events.action == log.actions.index("like")).astype(float),
    }[reward]
    assert value is not None
    value, known = np.asarray(value, np.float64), np.isfinite(value)
    advantage = np.zeros(len(value))
    for user in range(log.num_users):
        own = (events.owner == user) & known
        baseline = (value[own].sum() + PRIOR_EVENTS * value[known].mean()) / (own.sum() + PRIOR_EVENTS)
        advantage[own] = value[own] - baseline
    spread = np.sqrt((advantage[known] ** 2).mean())
    expected = np.minimum(np.exp(advantage / spread / temperature), MOST_WEIGHT)
    weights = all_weights(log, OptimConfig(reward=reward, reward_temperature=temperature), log.lengths)
    np.testing.assert_allclose(weights, expected / expected.mean(), rtol=1e-5)
    if temperature < 1:
        assert (expected == MOST_WEIGHT).any()
    assert np.unique(weights[~known]).size <= 1  # an unknown reward has the weight of the baseline


def test_weights_have_the_mean_1_and_grow_with_the_reward(log: EventLog) -> None:
    events = log.gather(np.arange(log.num_users), log.lengths)
    weights = all_weights(log, OptimConfig(reward="rating"), log.lengths)
    assert abs(weights.mean() - 1) < 1e-5 and weights.min() > 0
    assert events.rating is not None
    for user in range(log.num_users):
        own = events.owner == user
        order = np.argsort(events.rating[own], kind="stable")
        assert (np.diff(weights[own][order]) >= 0).all()


def test_rewards_after_the_training_part_change_nothing(log: EventLog, tmp_path: Path) -> None:
    counts = visible_counts(log, parse_until("leave-last-2-out"))
    assert (counts < log.lengths).any()
    frame = small_frame()
    user = frame["user"] - 100
    place = np.arange(len(user)) - np.searchsorted(user, user)
    other = log_of(tmp_path / "log", rating=np.where(place < counts[user], frame["rating"], np.float32(1000)))
    optim = OptimConfig(reward="rating")
    assert np.array_equal(all_weights(log, optim, counts), all_weights(other, optim, counts))
    assert not np.array_equal(all_weights(log, optim, log.lengths), all_weights(other, optim, log.lengths))


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("click_rate", r"neither rating, nor a number or an action .* has: rating, watched, click, like$"),
        ("page", "neither rating"),
    ],
)
def test_unknown_rewards_are_refused(log: EventLog, tmp_path: Path, reward: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^optim.reward={reward}: .*{message}"):
        source_of(small_config(log, tmp_path, optim__reward=reward), log)


@pytest.mark.parametrize(
    ("value", "message"), [(3.0, "is 3 in all training events"), (np.nan, "no training event of .* has a value")]
)
def test_rewards_that_tell_nothing_are_refused(tmp_path: Path, value: float, message: str) -> None:
    log = log_of(tmp_path / "log", watched=np.full(len(small_frame()["user"]), value))
    with pytest.raises(ConfigError, match=f"^optim.reward=watched: {message}"):
        EventRewards(log, log.lengths, OptimConfig(reward="watched"))


def source_of(config: TrainConfig, log: EventLog) -> BatchSource:
    return BatchSource(log, ModelReads(1 + np.arange(log.num_items)), config)


def test_labels_of_batches_have_the_weights_of_their_events(log: EventLog, tmp_path: Path) -> None:
    """If a user has an item several times, the label may have any of their weights."""
    config = small_config(log, tmp_path, optim__reward="rating", optim__window_weight=0.5)
    source = source_of(config, log)
    events = log.gather(np.arange(log.num_users), source.counts)
    weights = EventRewards(log, source.counts, config.optim).weights(events.owner, events)
    expected: dict[tuple[int, int], list[float]] = {}
    for owner, item, weight in zip(events.owner.tolist(), events.item.tolist(), weights, strict=True):
        expected.setdefault((owner, item + 1), []).append(float(weight))
    num_labels = num_asked = 0
    for index in range(source.num_batches(0)):
        batch = source.batch(0, index)
        anchors, labels = batch.anchors, batch.labels
        assert anchors is not None and anchors.weight is not None and labels.weight is not None
        user = batch.user[batch.windows.chunk].numpy()
        for label, weight, owner in (
            (labels.item, labels.weight, user),
            (anchors.item, anchors.weight, user[anchors.window.numpy()]),
        ):
            row, column = np.nonzero(label.numpy() >= 0)
            for r, c in zip(row, column, strict=True):
                item = int(batch.rows[label[r, c]])
                assert float(weight[r, c]) in expected[int(owner[r]), item]
        num_labels += int((labels.item >= 0).sum())
        num_asked += int((anchors.item >= 0).sum())
    assert num_labels == source.counts.sum() and num_asked > 0


def test_a_reward_changes_nothing_else_of_batches(log: EventLog, tmp_path: Path) -> None:
    config = small_config(log, tmp_path, optim__window_weight=0.5)
    rewarded = replace(config, optim=replace(config.optim, reward="rating"))
    plain, weighted = (source_of(each, log).batch(0, 0).tensors() for each in (config, rewarded))
    assert weighted.keys() - plain.keys() == {"labels.weight", "anchors.weight", "anchors.next_weight"}
    assert all(np.array_equal(plain[name], weighted[name]) for name in plain)
