"""Simulated users who see lists: their clicks follow the true probabilities, and lists change what they do next."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest

from vista.config import SimulateConfig
from vista.config.checks import WorldName
from vista.simulation.environment import Environment
from vista.simulation.simulate import generate
from vista.simulation.streams import SimulatedLog, split_times


@cache
def world(name: WorldName = WorldName.share, new_items: float = 0.0) -> SimulatedLog:
    return generate(
        SimulateConfig(
            world=name, num_users=70, events_per_user=500, num_items=160, num_topics=16, new_items=new_items, seed=2
        )
    )


def started(name: WorldName = WorldName.share, **options: float) -> Environment:
    environment = Environment(world(name), num_rounds=4, **options)  # type: ignore[arg-type]
    environment.next_round()
    return environment


@pytest.mark.parametrize("name", [name for name in WorldName if name is not WorldName.seasons])
def test_probabilities_are_those_of_the_log(name: WorldName) -> None:
    """Those of impressions without an event between them and the start of the round; `seasons` also reads the time."""
    log = world(name)
    environment = started(name)
    newest = [log.timestamp[log.offsets[user] : log.offsets[user + 1]] for user in range(70)]
    last = np.array([times[times < environment.now].max() for times in newest])
    rows = np.flatnonzero(
        (log.impression_timestamp > last[log.impression_user]) & (log.impression_timestamp < environment.now)
    )
    for row in rows.tolist():
        user, item = log.impression_user[[row]], log.impression_item[[row]].astype(np.int64)
        assert environment.probabilities(user, item)[0, 0] == pytest.approx(log.probability[row, 0], rel=1e-5)
    assert len(rows) > 3


@pytest.mark.parametrize("name", [WorldName.share, WorldName.positions])
def test_clicks_are_as_frequent_as_the_probabilities_say(name: WorldName) -> None:
    first = started(name)
    users, items = first.users(), first.items()
    true = first.probabilities(users, items)
    drawn, expected, spread = np.zeros(5), np.zeros(5), np.zeros(5)
    for seed in range(60):
        lists = np.random.default_rng(seed).integers(0, len(items), (len(users), 5))
        shown = np.take_along_axis(true, lists, 1)
        drawn += started(name, seed=seed).show(users, items[lists], shown).sum(0)
        p = shown * first.examined(5)
        expected, spread = expected + p.sum(0), spread + (p * (1 - p)).sum(0)
    assert (np.abs(drawn - expected) < 4.5 * np.sqrt(spread)).all()
    assert (expected[4] / expected[0] < 0.3) == (name is WorldName.positions)


def test_clicks_become_events_that_raise_the_interest_in_their_topic() -> None:
    log = world()
    shown, silent = started(follow_events=4), started()
    users, items = shown.users(), shown.items()
    topic = log.catalog.topic
    lists = np.tile(items[topic[items] == 3][:6], (len(users), 1))
    clicked = shown.show(users, lists, np.ones(lists.shape, np.float32))  # all that are looked at
    assert clicked.all()
    new, organic = shown.next_round(), silent.next_round()
    added = len(new.user) - len(organic.user)
    assert added == clicked.size * 5
    of_topic = (topic[new.events.item] == 3).sum() - (topic[organic.events.item] == 3).sum()
    assert of_topic == added, "what follows a click is about its topic"
    assert (np.diff(new.events.timestamp)[np.diff(new.user) == 0] >= 0).all()
    assert new.events.timestamp.min() >= shown.round_starts[0] and new.events.timestamp.max() < shown.now
    of_others = np.flatnonzero(topic != 3)
    after, before = shown.probabilities(users, items), silent.probabilities(users, items)
    assert (after[:, topic[items] == 3] > before[:, topic[items] == 3]).all()
    assert after[:, of_others].mean() < before[:, of_others].mean(), "shares of other topics fall"


def test_users_tire_of_a_topic_that_they_are_shown_again_and_again() -> None:
    tired, plain = started(satiation=2.0), started()
    users, items = plain.users(), plain.items()
    of_topic = plain.log.catalog.topic[items] == 3
    shown, others = (np.tile(items[which][:6], (len(users), 1)) for which in (of_topic, ~of_topic))
    for lists, lost in (
        (shown, 1.0),
        (shown, 1.5),
        (others, 0.75),
    ):  # of at most 2: the newest list has half the weight
        for environment in (tired, plain):
            environment.show(users, lists, np.zeros(lists.shape, np.float32))  # without clicks, so events are equal
            environment.next_round()
        p, q = (environment.probabilities(users, items).astype(np.float64) for environment in (tired, plain))
        odds = p * (1 - q) / (q * (1 - p))
        np.testing.assert_allclose(odds[:, of_topic], np.exp(-lost), rtol=1e-4)
        if lists is shown:
            np.testing.assert_allclose(odds[:, ~of_topic], 1, rtol=1e-5)


def test_without_satiation_only_events_matter() -> None:
    """Other lists without clicks give the same probabilities, to the bit."""
    one, other = started(), started()
    users, items = one.users(), one.items()
    for environment, lists in ((one, items[:4]), (other, items[-4:])):
        shown = np.tile(lists, (len(users), 1))
        environment.show(users, shown, np.zeros(shown.shape, np.float32))
        environment.next_round()
    np.testing.assert_array_equal(one.probabilities(users, items), other.probabilities(users, items))


def test_without_clicks_the_log_comes_true() -> None:
    log, environment = world(), Environment(world(), num_rounds=3)
    parts = []
    for _ in range(3):
        parts.append(environment.next_round())
        users = environment.users()
        environment.show(users, np.zeros((len(users), 2), np.int64), np.zeros((len(users), 2), np.float32))
    before_last = log.timestamp < environment.now
    assert sum(len(part.user) for part in parts) == before_last.sum()
    assert (parts[0].events.timestamp < split_times(log.config)[1]).all()
    np.testing.assert_array_equal(parts[0].events.item, log.item[log.timestamp < split_times(log.config)[1]])


def test_new_users_join_later_without_a_history() -> None:
    environment = Environment(world(), num_rounds=4, new_users=0.5)
    environment.next_round()
    known = environment.users()
    assert 20 < len(known) < 50
    for _ in range(3):
        begin, added = environment.now, environment.next_round()
        new = np.setdiff1d(environment.users(), known)
        first = np.array([added.events.timestamp[added.user == user].min() for user in new.tolist()])
        assert len(new) and (first >= begin).all()
        known = environment.users()


def test_new_items_appear_in_later_rounds() -> None:
    environment = Environment(world(new_items=0.9), num_rounds=4)
    numbers = []
    for _ in range(4):
        environment.next_round()
        numbers.append(len(environment.items()))
    assert numbers[0] < numbers[-1] <= 160 and numbers == sorted(numbers)


def test_the_same_seed_gives_the_same_clicks() -> None:
    users = started().users()
    lists, p = np.zeros((len(users), 8), np.int64), np.full((len(users), 8), 0.3, np.float32)
    one, again, other = (started(seed=seed).show(users, lists, p) for seed in (1, 1, 2))
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert abs(one.mean() - 0.3) < 4.5 * math.sqrt(0.21 / one.size)
