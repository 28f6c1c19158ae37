"""The worlds of the simulation: what decides their clicks, and that neither recent events nor a mean can tell it."""

from __future__ import annotations

import datetime
import itertools
import math
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vista.config import SimulateConfig
from vista.config.checks import WorldName
from vista.errors import ConfigError
from vista.simulation.simulate import generate, oracle_metrics, simulate
from vista.simulation.streams import SimulatedLog, period, split_times
from vista.simulation.worlds import WORLDS, ClickWorld, PositionsWorld

ALL = tuple(WorldName)
SHARES = (WorldName.share, WorldName.positions)
"""Worlds with the histories and the formula of `share`."""
CLICK_WORLDS = tuple(name for name in ALL if name not in SHARES)


@cache
def small(name: WorldName) -> SimulatedLog:
    return generate(SimulateConfig(world=name, num_users=10, events_per_user=2500, impressions_per_user=50, seed=3))


@cache
def standard(name: WorldName) -> SimulatedLog:
    """Histories of the length for which the worlds are made."""
    return generate(SimulateConfig(world=name, num_users=300 if name in SHARES else 60))


def features(log: SimulatedLog, window: int | None, chosen: np.ndarray) -> np.ndarray:
    """What a predictor reads, row by row: signals and hints, or the regressors of `share`."""
    world = WORLDS[log.config.world]
    if isinstance(world, ClickWorld):
        return world.signals(log.catalog, log.item, log.timestamp, log.queries(chosen, window))
    return world.window_features(log, window, chosen)


def columns(log: SimulatedLog) -> dict[str, np.ndarray]:
    return {field.name: getattr(log, field.name) for field in fields(log) if field.name not in ("config", "catalog")}


# Each formula sees a user's events in order, as (item, topic, time), with the candidate's item and topic and the time.
Event = tuple[int, int, int]
DAY = 86_400_000


def returns(events: list[Event], item: int, topic: int, now: int) -> float:
    places = [place for place, event in enumerate(events) if event[0] == item]
    due = 0.0
    if len(places) > 1:
        gaps = [after - before for before, after in itertools.pairwise(places)]
        ratio = math.log((len(events) - places[-1]) / (sum(gaps) / len(gaps)))
        due = math.exp(-(ratio**2) / 0.18)
    return -3 + 1.5 * math.log(1 + len(places)) / math.log(9) + 3.5 * due


def sequence(events: list[Event], item: int, topic: int, now: int) -> float:
    items = [event[0] for event in events]
    earlier = [place for place in range(len(items) - 1) if items[place] == items[-1]]
    return -2.5 + 4.5 * bool(earlier and items[earlier[-1] + 1] == item)


def conjunction(events: list[Event], item: int, topic: int, now: int) -> float:
    topics = [event[1] for event in events]
    partner = topic + 1 if topic % 2 == 0 else topic - 1
    return -2.5 + 4.5 * min(topics.count(topic), topics.count(partner), 100) / 100


def mixed(events: list[Event], item: int, topic: int, now: int) -> float:
    if topic:
        return conjunction(events, item, topic, now)
    places = [place for place, event in enumerate(events) if event[0] == item]
    recency = math.exp(-(len(events) - 1 - places[-1]) / 50) if places else 0
    return -3.5 + math.log(1 + len(places)) / math.log(9) + 3.5 * recency


def seasons(events: list[Event], item: int, topic: int, now: int) -> float:
    spans = [(now - years * 365 * DAY, now - years * 365 * DAY + 28 * DAY) for years in range(1, 4)]
    season = [event[1] for event in events for low, high in spans if low <= event[2] < high]
    today = datetime.datetime.fromtimestamp(now / 1000, datetime.UTC).weekday()
    weekday = [
        event[1]
        for event in events
        if datetime.datetime.fromtimestamp(event[2] / 1000, datetime.UTC).weekday() == today
    ]
    seasonal = min(season.count(topic) / (len(season) + 5) / 0.4, 1)
    return -3 + 4.5 * seasonal + min(weekday.count(topic) / (len(weekday) + 5) / 0.1, 1)


def drift(events: list[Event], item: int, topic: int, now: int) -> float:
    taste, total = 0, 0
    for _, event_topic, _ in events:
        if event_topic == 0:
            taste = -taste
        elif event_topic == topic:
            taste, total = taste + 1, total + 1
    return -0.5 + 4 * taste / (total + 20)


FORMULAS: dict[WorldName, Callable[[list[Event], int, int, int], float]] = {
    WorldName.mixed: mixed,
    WorldName.returns: returns,
    WorldName.sequence: sequence,
    WorldName.conjunction: conjunction,
    WorldName.seasons: seasons,
    WorldName.drift: drift,
}


class TestProbabilities:
    @pytest.mark.parametrize("name", CLICK_WORLDS)
    def test_they_follow_the_documented_formula(self, name: WorldName) -> None:
        log = small(name)
        signal = []
        for row in range(0, len(log.impression_item), 3):
            user, now, item = log.impression_user[row], log.impression_timestamp[row], log.impression_item[row]
            own = slice(log.offsets[user], log.offsets[user + 1])
            events = zip(
                log.item[own].tolist(),
                log.catalog.topic[log.item[own]].tolist(),
                log.timestamp[own].tolist(),
                strict=True,
            )
            earlier = [event for event in events if event[2] < now]
            logit = FORMULAS[name](earlier, int(item), int(log.catalog.topic[item]), int(now))
            assert log.probability[row, 0] == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-5)
            signal.append(logit)
        assert len(set(signal)) > 1 and max(signal) - min(signal) > 3, "the sample contains strong signals"

    @pytest.mark.parametrize("name", ALL)
    def test_labels_are_drawn_from_them(self, name: WorldName) -> None:
        log = standard(name)
        num_tasks = len(WORLDS[name].tasks)
        assert log.label.shape == log.probability.shape == (300 * log.config.num_users, num_tasks)
        clicked = log.label[:, 0] == 1
        assert set(np.unique(log.label[:, 0])) == {0, 1}
        assert (log.label[~clicked, 1:] == -1).all() and (log.label[clicked, 1:] >= 0).all()
        for task, low in itertools.product(range(num_tasks), (0.0, 0.2, 0.4, 0.6, 0.8)):
            p = log.probability[:, task] * (WORLDS[name].examined(log.place) if task == 0 else 1)
            cell = (log.label[:, task] >= 0) & (p >= low) & (p < low + 0.2)
            spread = np.sqrt((p[cell] * (1 - p[cell])).sum())
            assert abs(log.label[cell, task].sum() - p[cell].sum()) < 5 * max(spread, 1)

    @pytest.mark.parametrize("name", ALL)
    def test_later_events_change_nothing(self, name: WorldName) -> None:
        """Other items and other times after the median of each user's requests."""
        log, rng = small(name), np.random.default_rng(0)
        middle = np.array([np.median(log.impression_position[log.impression_user == user]) for user in range(10)])
        chosen = log.impression_position <= middle[log.impression_user]
        position = np.arange(log.num_events) - np.repeat(log.offsets[:-1], np.diff(log.offsets))
        later = position >= np.repeat(middle, np.diff(log.offsets))
        item = np.where(later, rng.integers(0, len(log.catalog.topic), log.num_events), log.item).astype(np.int32)
        changed = replace(log, item=item, timestamp=log.timestamp + 400 * DAY * later)
        for window in (None, 300):
            np.testing.assert_array_equal(features(changed, window, chosen), features(log, window, chosen))
        assert not np.array_equal(features(changed, None, ~chosen), features(log, None, ~chosen))

    @pytest.mark.parametrize("name", ALL)
    def test_a_window_does_not_depend_on_earlier_events(self, name: WorldName) -> None:
        """Other items before the window of each user's last request."""
        log, rng = small(name), np.random.default_rng(0)
        newest = np.array([log.impression_position[log.impression_user == user].max() for user in range(10)])
        chosen = log.impression_position == newest[log.impression_user]
        position = np.arange(log.num_events) - np.repeat(log.offsets[:-1], np.diff(log.offsets))
        older = position < np.repeat(newest - 700, np.diff(log.offsets))
        item = np.where(older, rng.integers(0, len(log.catalog.topic), log.num_events), log.item).astype(np.int32)
        changed = replace(log, item=item)
        np.testing.assert_array_equal(features(changed, 700, chosen), features(log, 700, chosen))
        assert not np.array_equal(features(changed, None, chosen), features(log, None, chosen))

    @pytest.mark.parametrize("name", ALL)
    def test_a_batch_equals_its_users_one_at_a_time(self, name: WorldName) -> None:
        log = small(name)
        everything = np.ones(len(log.impression_item), bool)
        for window in (None, 700):
            together = features(log, window, everything)
            for user in range(10):
                own, events = log.impression_user == user, slice(log.offsets[user], log.offsets[user + 1])
                alone = replace(
                    log,
                    item=log.item[events],
                    timestamp=log.timestamp[events],
                    offsets=np.array([0, events.stop - events.start]),
                    impression_item=log.impression_item[own],
                    impression_timestamp=log.impression_timestamp[own],
                    impression_position=log.impression_position[own],
                    impression_user=np.zeros(own.sum(), np.int64),
                )
                np.testing.assert_array_equal(features(alone, window, np.ones(own.sum(), bool)), together[own])


class TestPositions:
    def test_each_place_is_clicked_as_often_as_users_look_at_it(self) -> None:
        log = standard(WorldName.positions)
        late = log.impression_timestamp >= split_times(log.config)[1]
        assert (log.place[late] == 0).all() and set(np.unique(log.place)) == {0, 1, 2, 3}
        for place, looks in enumerate(PositionsWorld.examination):
            own = ~late & (log.place == place)
            p = log.probability[own, 0] * looks
            assert abs(log.label[own, 0].sum() - p.sum()) < 4 * math.sqrt((p * (1 - p)).sum())
        rate = [log.label[~late & (log.place == place), 0].mean() for place in range(4)]
        assert rate[0] > 1.8 * rate[1] > 2.5 * rate[3]

    def test_a_list_has_each_place_once_and_popular_items_first(self) -> None:
        log = standard(WorldName.positions)
        early = log.impression_timestamp < split_times(log.config)[1]
        request = np.stack([log.impression_user, log.impression_timestamp])[:, early].T
        _, of_list, size = np.unique(request, axis=0, return_inverse=True, return_counts=True)
        place = np.zeros((len(size), 4), int)
        np.add.at(place, (of_list, log.place[early]), 1)
        assert (place.max() == 1) and np.array_equal(place.sum(1), size)
        popularity = np.bincount(log.item, minlength=log.config.num_items)[log.impression_item]
        means = [popularity[early & (log.place == place)].mean() for place in range(4)]
        assert means == sorted(means, reverse=True) and means[0] > 1.5 * means[3]

    def test_files_have_the_columns_of_lists(self, tmp_path: Path) -> None:
        pl = pytest.importorskip("polars")
        simulate(replace(small(WorldName.positions).config, out=str(tmp_path)))
        shown = pl.read_parquet(tmp_path / "impressions.parquet")
        assert shown.columns[-2:] == ["position", "propensity"]
        looks = dict(enumerate(PositionsWorld.examination, 1))
        assert shown["propensity"].to_list() == [looks[place] for place in shown["position"]]


class TestLogs:
    @pytest.mark.parametrize("name", ALL)
    def test_the_same_seed_gives_the_same_bytes_with_any_number_of_threads(self, name: WorldName) -> None:
        config = SimulateConfig(world=name, num_users=12, events_per_user=600, impressions_per_user=20)
        one, again, three, other = (
            columns(generate(changed, chunk_events=2000))
            for changed in (config, config, replace(config, num_threads=3), replace(config, seed=2))
        )
        for key, values in one.items():
            assert values.tobytes() == again[key].tobytes() == three[key].tobytes(), key
        assert not np.array_equal(one["item"], other["item"])

    @pytest.mark.parametrize("name", ALL)
    def test_positions_count_the_events_strictly_before(self, name: WorldName) -> None:
        log = small(name)
        for user in range(10):
            own = log.impression_user == user
            times = log.timestamp[log.offsets[user] : log.offsets[user + 1]]
            assert (np.diff(times) > 0).all() and (np.diff(log.impression_timestamp[own]) >= 0).all()
            positions = np.searchsorted(times, log.impression_timestamp[own], side="left")
            np.testing.assert_array_equal(positions, log.impression_position[own])
            assert positions.min() >= 1 and not np.isin(log.impression_timestamp[own], times).any()

    @pytest.mark.parametrize("name", ALL)
    @pytest.mark.parametrize(
        "changes",
        [
            {"num_users": 3, "events_per_user": 1},
            {"num_users": 2, "events_per_user": 300, "days": 1.5},
            {"num_users": 2, "events_per_user": 3000, "num_items": 6, "num_topics": 5, "max_interests": 1},
            {"num_users": 1, "events_per_user": 9000, "days": 2000.0},
            {"num_users": 1, "events_per_user": 30_000, "session_events": 1, "days": 1.1},
            {"num_topics": 2, "max_interests": 1, "num_items": 2, "events_per_user": 900, "num_users": 12},
        ],
    )
    def test_unusual_sizes(self, name: WorldName, changes: dict[str, int]) -> None:
        if name not in SHARES and changes.get("num_topics", 32) < 8:
            changes = changes | {"num_topics": 16, "num_items": 16}
        config = SimulateConfig(world=name, impressions_per_user=7, **changes)
        log, (begin, end) = generate(config), period(config)
        assert len(log.impression_item) == 7 * config.num_users
        assert log.item.min() >= 0 and log.item.max() < config.num_items
        user = np.repeat(np.arange(config.num_users), np.diff(log.offsets))
        assert (np.diff(log.timestamp)[np.diff(user) == 0] > 0).all() and log.timestamp.dtype == np.int64
        assert begin < log.timestamp.min() and log.timestamp.max() <= end
        assert log.impression_timestamp.min() > begin and log.impression_timestamp.max() <= end
        assert ((log.probability > 0) & (log.probability < 1)).all()

    @pytest.mark.parametrize("name", CLICK_WORLDS)
    def test_too_few_topics_are_refused(self, name: WorldName) -> None:
        least = {WorldName.conjunction: 14, WorldName.mixed: 16}.get(name, 8)
        SimulateConfig(world=name, num_topics=least)
        with pytest.raises(ConfigError, match=rf"num_topics: must be at least {least} with world={name.value}"):
            SimulateConfig(world=name, num_topics=least - 1)

    def test_a_world_with_clicks_alone_writes_no_other_labels(self, tmp_path: Path) -> None:
        pl = pytest.importorskip("polars")
        report = simulate(replace(small(WorldName.drift).config, out=str(tmp_path), reference=True))
        assert {row.task for row in report.reference} == {"click"}
        shown = pl.read_parquet(tmp_path / "impressions.parquet")
        assert shown.columns == ["user", "item", "timestamp", "click", "click_probability", "decisive_age"]
        assert '"world": "drift"' in (tmp_path / "simulation.json").read_text()


@pytest.mark.research
class TestCalibration:
    """What a summary must hold: neither the last 2,000 events nor pooled vectors come close to the oracle.

    `mixed` is for the short histories of the demo, and has candidates whose newest events are enough.
    """

    @pytest.mark.parametrize("name", [name for name in CLICK_WORLDS if name != WorldName.mixed])
    def test_the_oracle_is_ahead_of_the_last_2000_and_of_pooled_vectors(self, name: WorldName) -> None:
        auc = {row.predictor: row.auc for row in oracle_metrics(standard(name))}
        assert auc["oracle"] - auc["last 2000"] > 0.05
        assert auc["oracle"] - auc["pooled"] > 0.05
        assert auc["whole history"] == pytest.approx(auc["oracle"], abs=0.01)
        assert auc["last 32"] < auc["last 200"] + 0.02 < auc["last 2000"]
