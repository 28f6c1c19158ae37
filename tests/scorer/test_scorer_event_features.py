"""Features of the events in tails: those that records hold, and those that callers pass."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.refresh.conftest import HOUR, START, append, events, model
from tests.scorer.test_scorer_exactness import same
from vista.config.choices import Codec
from vista.errors import StoreError
from vista.evaluation.scorer_answers import ScorerAnswers
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer, Tail

USERS = [1, 2, 3, 4]
ITEMS = list(range(0, 300, 10))
NOW = START + 900 * HOUR


def refreshed(made: VistaModel, log: EventLog, path: Path) -> Path:
    refresh(made, log, path, options=RefreshOptions(codec=Codec.float32))
    return path


def tail_of(log: EventLog, since: int, users: list[int] = USERS) -> Tail:
    """The events of users from `since` on, as a caller knows them."""
    rows = log.users.rows(users)
    history = log.gather(rows)
    first = [int(np.searchsorted(history.slice(row).timestamp, since)) for row in range(len(users))]
    fresh = history.select(np.array(first), history.lengths)
    features = fresh.features.named(log.event_features)
    return Tail(log.items.ids(fresh.item), fresh.timestamp, fresh.action, fresh.offsets, features)


@pytest.fixture
def log(tmp_path: Path) -> EventLog:
    return append(tmp_path / "log", events({1: 12, 2: 3, 3: 8, 4: 5}))


@pytest.mark.parametrize("num_tail_features", [0, 1, 2])
def test_fresh_events_are_read_as_stored_ones(tmp_path: Path, log: EventLog, num_tail_features: int) -> None:
    """Without summaries, a score depends only on the tail, which holds the fresh events once they are refreshed."""
    made = model(num_seeds=0, num_tail_features=num_tail_features, dim=32, tail_len=16)
    old = refreshed(made, log, tmp_path / "old")
    later = START + 500 * HOUR
    log = append(tmp_path / "log", events({1: 2, 2: 4, 4: 9}, later))
    tail = tail_of(log, later)
    assert set(tail.features["surface"].tolist()) > {None, "tv"} and np.isnan(tail.features["dwell"]).any()
    with Scorer.open(made, refreshed(made, log, tmp_path / "new")) as scorer:
        expected = scorer.score(USERS, ITEMS, now=NOW)
    with Scorer.open(made, old) as scorer:
        found = scorer.score(USERS, ITEMS, tail=tail, now=NOW)
        np.testing.assert_array_equal(found, expected)
        for row, user in enumerate(USERS):  # and one user at a time
            own = scorer.score([user], ITEMS, tail=tail_of(log, later, [user]), now=NOW)
            same(own[0], expected[row])
        without = Tail(tail.items, tail.times, tail.actions, tail.offsets)
        changes = (scorer.score(USERS, ITEMS, tail=without, now=NOW) != expected).any(1).tolist()
        assert changes == ([False] * 4 if num_tail_features == 0 else [True, True, False, True])
        # Evaluation passes the events after each record like a caller.
        counts = log.lengths[log.users.rows(USERS)]
        given = ScorerAnswers(scorer, log, requests_per_batch=9)._fresh_tail(log.users.rows(USERS), counts, None)
        assert given is not None and list(given.features) == ["surface", "dwell"]
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=given, now=NOW), expected)


def test_a_stored_event_keeps_its_features(tmp_path: Path, log: EventLog) -> None:
    made = model(num_tail_features=2)
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:
        again = tail_of(log, START)
        count = len(again.items)
        other = Tail(again.items, again.times, again.actions, again.offsets, {"surface": ["web"] * count})
        expected = scorer.score(USERS, ITEMS, now=NOW)
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=other, now=NOW), expected)


def fresh_event(**features: Any) -> Tail:
    return Tail(np.array([10]), np.array([NOW - HOUR]), np.zeros(1, int), np.array([0, 1]), features)


def test_what_a_value_changes(tmp_path: Path, log: EventLog) -> None:
    made = model(num_tail_features=1)  # stage 2 reads the surface only
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:

        def scores(**features: Any) -> Any:
            return scorer.score([1], ITEMS, tail=fresh_event(**features), now=NOW)

        missing = scores()
        for same in ({"surface": [None]}, {"surface": ["radio"]}, {"surface": np.array(["tv"])}, {"dwell": [3.0]}):
            np.testing.assert_array_equal(scores(**same), missing)
        app = scores(surface=["app"])
        assert (app != missing).any() and (scores(surface=["web"]) != app).any()
        np.testing.assert_array_equal(scores(surface=np.array(["app"]), dwell=torch.tensor([2.0])), app)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        ({"device": ["tv"]}, ValueError, r"tail\.features: 'device' is not one of this model's features"),
        ({"surface": ["app", "web"]}, ValueError, r"tail\.features: 'surface' has 2 values, but 1 are needed"),
        ({"surface": "app"}, ValueError, r"tail\.features: 'surface' must be a list of values, or one-dimensional"),
        ({"surface": [[1]]}, ValueError, r"tail\.features: 'surface' is a category"),
        ({"dwell": [float("inf")]}, ValueError, r"tail\.features: 'dwell': value number 0 is infinite"),
        ({"dwell": ["long"]}, ValueError, r"tail\.features: 'dwell' needs numbers"),
    ],
)
def test_features_that_are_refused(
    tmp_path: Path, log: EventLog, features: dict[str, Any], error: type[Exception], message: str
) -> None:
    made = model(num_tail_features=1)
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:
        with pytest.raises(error, match=message):
            scorer.score([1], ITEMS, tail=fresh_event(**features), now=NOW)
        broken = Tail(np.array([10]), np.array([NOW]), np.zeros(1, int), np.array([0, 1]), [("surface", ["app"])])  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"tail\.features: must be a mapping of names to values, got a list"):
            scorer.score([1], ITEMS, tail=broken, now=NOW)


def test_a_model_without_features_refuses_them(tmp_path: Path, log: EventLog) -> None:
    made = model()
    with Scorer.open(made, refreshed(made, log, tmp_path / "store")) as scorer:
        assert scorer.store.get_many([1]).tail.features == {}
        with pytest.raises(ValueError, match=r"tail\.features: 'surface' is not a feature that this model reads"):
            scorer.score([1], ITEMS, tail=fresh_event(surface=["app"]), now=NOW)


def test_a_store_must_hold_what_the_model_reads(tmp_path: Path, log: EventLog) -> None:
    one, two = model(num_tail_features=1), model(num_tail_features=2)
    assert one.summarizer_id() == two.summarizer_id()
    fewer, more = refreshed(one, log, tmp_path / "fewer"), refreshed(two, log, tmp_path / "more")
    with pytest.raises(StoreError, match=r"its tails do not hold the event features dwell as the model reads them"):
        Scorer.open(two, fewer)
    with Scorer.open(one, fewer) as scorer, Scorer.open(one, more) as other:
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, now=NOW), other.score(USERS, ITEMS, now=NOW))
        tail = fresh_event(surface=["app"])
        np.testing.assert_array_equal(
            scorer.score([1], ITEMS, tail=tail, now=NOW), other.score([1], ITEMS, tail=tail, now=NOW)
        )
