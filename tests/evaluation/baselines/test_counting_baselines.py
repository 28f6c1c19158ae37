"""Counting baselines: none reads beyond the cut, no score depends on the batch, and each equals a plain loop."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import real_set
from tests.evaluation.baselines.conftest import HOUR, order_only_log, shopping_log, visible_items
from tests.log.conftest import run
from vista.arrays import Floats, Int
from vista.config import DataConfig, EvaluateConfig, SourceColumns
from vista.evaluation.baseline_evaluation import measure_baseline, trained_baselines
from vista.evaluation.counting_baselines import (
    ContentNeighbors,
    CountingBaseline,
    ItemNeighbors,
    OwnFrequency,
    Popularity,
    Transitions,
    TransitionsAndOwn,
    counting_baselines,
)
from vista.evaluation.trained_baselines import CounterTrees, NewItemTrees
from vista.examples.item_statistics import REACH
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts


def all_baselines(has_time: bool = True, at_one_time: bool = True) -> list[CountingBaseline]:
    return [
        *counting_baselines(has_time=has_time, horizon_events=10),
        *trained_baselines(horizon_events=10, at_one_time=at_one_time),
    ]


def test_names_are_distinct() -> None:
    names = [baseline.name for baseline in all_baselines()]
    assert len(set(names)) == len(names)


@pytest.fixture(scope="module")
def futures(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[EventLog, Int]]:
    """Two logs with the same visible events and other ones after them."""
    return [shopping_log(tmp_path_factory.mktemp("future"), future=number, users=12) for number in (1, 2)]


@pytest.fixture(scope="module")
def fitted(futures: list[tuple[EventLog, Int]]) -> list[list[CountingBaseline]]:
    """All baselines, fitted to each of the two logs; last those to which it matters when others are asked."""
    both = []
    for log, counts in futures:
        trees = [kind(horizon_events=10, at_one_time=False) for kind in (CounterTrees, NewItemTrees)]
        baselines = [*all_baselines(), *trees]
        for baseline in baselines:
            baseline.fit(log, counts, np.random.default_rng(0))
        both.append(baselines)
    return both


def test_no_baseline_reads_beyond_the_cut(
    futures: list[tuple[EventLog, Int]], fitted: list[list[CountingBaseline]]
) -> None:
    (one, counts), (other, same) = futures
    assert (counts == same).all() and one.num_items == other.num_items
    users = np.arange(one.num_users)
    assert any((one.slice(int(user)).item != other.slice(int(user)).item).any() for user in users)
    newest = one.gather_ranges(users, counts - 1, counts).timestamp
    for first, second in zip(*fitted, strict=True):
        for now in (np.full(len(users), newest.max() + 1), None):
            scores = first.scores(users, counts, now)
            assert scores.shape == (len(users), one.num_items) and np.isfinite(scores).all()
            np.testing.assert_array_equal(scores, second.scores(users, counts, now), err_msg=first.name)


def test_a_users_scores_do_not_depend_on_the_batch(
    futures: list[tuple[EventLog, Int]], fitted: list[list[CountingBaseline]]
) -> None:
    _, counts = futures[0]
    users = np.arange(8)
    for baseline in fitted[0]:
        together = baseline.scores(users, counts[users], None)
        apart = [baseline.scores(users[[n]], counts[users[[n]]], None)[0] for n in range(len(users))]
        np.testing.assert_allclose(together, apart, rtol=0, atol=1e-12, err_msg=baseline.name)


def test_all_baselines_take_a_log_without_times(order_log: EventLog) -> None:
    counts = visible_counts(order_log, "leave-last-out")
    for baseline in all_baselines(has_time=False, at_one_time=False):
        baseline.fit(order_log, counts, np.random.default_rng(0))
        assert np.isfinite(baseline.scores(np.arange(order_log.num_users), counts, None)).all()


@pytest.mark.research
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "popularity", "transitions"),
    [
        ("ml-1m", (0.039, 0.019), (0.193, 0.113)),
        ("ml-1m-half", (0.038, 0.018), (0.214, 0.128)),
        ("ml-100k", (0.086, 0.044), (0.145, 0.079)),
        ("ml-latest-small", (0.041, 0.019), (0.074, 0.047)),
    ],
)
def test_movielens(
    name: str, popularity: tuple[float, float], transitions: tuple[float, float], tmp_path: Path
) -> None:
    """HR@10 and NDCG@10 equal those of another program."""
    run(tmp_path / "log", [real_set(name)], kind="auto", timestamp=None, time_unit=None)
    log = EventLog.open(tmp_path / "log")
    for baseline, expected in ((Popularity(), popularity), (Transitions(), transitions)):
        values = measure_baseline(baseline, log, DataConfig(), EvaluateConfig(), np.arange(log.num_items)).means()
        assert (values["hr@10"], values["ndcg@10"]) == pytest.approx(expected, abs=6e-4)


TIES = 1e-9


def scores_of(baseline: CountingBaseline, log: EventLog, counts: Int, now: Int | None = None) -> Floats:
    """Scores for all users, each asked after their visible events."""
    baseline.fit(log, counts, np.random.default_rng(0))
    return baseline.scores(np.arange(log.num_users), counts, now)


def test_items_that_tie_rank_by_popularity(tmp_path: Path) -> None:
    log = order_only_log([[0, 1], [2, 3, 3], [3]], tmp_path)
    for baseline in (OwnFrequency(), TransitionsAndOwn(0.5), ItemNeighbors()):
        scores = scores_of(baseline, log, log.lengths)
        assert scores[0, 3] > scores[0, 2] > 0, f"{baseline.name}: both are new and unrelated to the first user"
        assert scores[0, 3] < TIES


def test_own_frequency_counts_event_by_event(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    got = {name: scores_of(baseline, log, counts) for name, baseline in own_frequencies().items()}
    for user, count in enumerate(counts.tolist()):
        history = log.slice(user, 0, count)
        for name, scores in got.items():
            expected = np.zeros(log.num_items)
            for age, (item, time) in enumerate(zip(history.item[::-1], history.timestamp[::-1], strict=True)):
                days = (history.timestamp[-1] - time) / (24 * HOUR)
                expected[item] += {
                    "whole": 1.0,
                    "last": float(age < 20),
                    "days": np.exp(-days / 9),
                    "events": np.exp(-age / 11),
                }[name]
            np.testing.assert_allclose(scores[user], expected, atol=2 * TIES)


def own_frequencies() -> dict[str, OwnFrequency]:
    return {
        "whole": OwnFrequency(),
        "last": OwnFrequency(last=20),
        "days": OwnFrequency(days=9),
        "events": OwnFrequency(events=11),
    }


def test_transitions_count_event_by_event(shopping: tuple[EventLog, Int]) -> None:
    log, counts = shopping
    visible = visible_items(log, counts)
    pairs = Counter(pair for history in visible for pair in pairwise(history))
    leaving = Counter(one for history in visible for one, _ in pairwise(history))
    popularity = Counter(item for history in visible for item in history)
    weight = max(popularity.values()) + 1
    plain, blend = scores_of(Transitions(), log, counts), scores_of(TransitionsAndOwn(2), log, counts)
    for user, history in enumerate(visible):
        own = Counter(history)
        last = history[-1]
        for item in range(log.num_items):
            assert plain[user, item] == pairs[last, item] * weight + popularity[item]
            expected = own[item] / len(history) + 2 * pairs[last, item] / leaving[last]
            assert blend[user, item] == pytest.approx(expected, abs=TIES)


def test_a_user_without_events_gets_popular_items(tmp_path: Path) -> None:
    log = order_only_log([[0, 1, 1], [2, 1]], tmp_path)
    counts = np.array([3, 0])
    for baseline in (OwnFrequency(), Transitions(), TransitionsAndOwn(1), ItemNeighbors()):
        assert np.argsort(-scores_of(baseline, log, counts)[1]).tolist() == [1, 0, 2]


@pytest.mark.parametrize("last", [None, 7])
def test_item_neighbors_count_pair_by_pair(shopping: tuple[EventLog, Int], last: int | None) -> None:
    log, counts = shopping
    visible = visible_items(log, counts)
    popularity = Counter(item for history in visible for item in history)
    near: Counter[tuple[int, int]] = Counter()
    for history in visible:
        for place, one in enumerate(history):
            for other in history[place + 1 : place + 1 + REACH]:
                if one != other:
                    near[one, other] += 1
                    near[other, one] += 1
    scores = scores_of(ItemNeighbors(last=last), log, counts)
    for user, history in enumerate(visible):
        for item in range(log.num_items):
            expected = sum(
                near[had, item] / np.sqrt(popularity[had] * max(popularity[item], 1))
                for had in (history[-last:] if last else history)
            )
            assert scores[user, item] == pytest.approx(expected, abs=TIES)


NAN = math.nan
TABLE = {
    "item": ["a", "b", "c", "d"],
    "kind": [["red", "big"], ["red"], ["big", "small"], []],
    "price": [1.0, 2.0, NAN, 2.0],
    "text": [[3.0, 4.0], [0.0, 2.0], None, [-1.0, 0.0]],
}


def cosine(a: Counter[object], b: Counter[object]) -> float:
    def length(values: Counter[object]) -> float:
        return math.sqrt(sum(value**2 for value in values.values()))

    product = sum(a[value] * b[value] for value in a)
    return 0.0 if product == 0 else product / (length(a) * length(b))


def weighted(values: list[object], all_values: list[list[object]]) -> Counter[object]:
    """Inverse frequencies of an item's values."""
    items_of = Counter(value for own in all_values for value in own)
    return Counter({value: math.log((1 + len(all_values)) / (1 + items_of[value])) for value in values})


def similarity(i: int, j: int) -> float:
    kinds: list[list[object]] = [list(own) for own in TABLE["kind"]]
    prices: list[list[object]] = [[] if math.isnan(own) else [own] for own in TABLE["price"]]
    total = sum(cosine(weighted(own[i], own), weighted(own[j], own)) for own in (kinds, prices))
    texts = [Counter(dict(enumerate(own or []))) for own in TABLE["text"]]
    return total + cosine(texts[i], texts[j])  # type: ignore[arg-type]


def test_scores_equal_a_plain_loop(tmp_path: Path) -> None:
    histories = [["a", "a", "c"], ["d"], ["b", "c", "a", "d"]]
    user = np.repeat(np.arange(3), [len(own) for own in histories])
    frame = pl.DataFrame({"user": user, "item": [item for own in histories for item in own]})
    log = EventLog.from_frame(
        frame, tmp_path / "log", columns=SourceColumns(timestamp=None), items=pl.DataFrame(TABLE, strict=False)
    )
    baseline, seen = ContentNeighbors(), np.array([3, 1, 2])
    baseline.fit(log, seen, np.random.default_rng(0))
    found = baseline.scores(np.arange(3), seen, None)
    rows = log.items.rows(TABLE["item"])
    for row, own in enumerate(histories):
        expected = [sum(similarity(i, "abcd".index(item)) for item in own[: seen[row]]) for i in range(4)]
        np.testing.assert_allclose(found[row, rows], expected, atol=1e-7)
    # b has no similarity of its own to d but for the price, and the popularity of visible events breaks ties.
    assert found[1, rows[3]] == found[1].max()


def test_a_log_without_features_has_none(tmp_path: Path) -> None:
    log = order_only_log([[0, 1]], tmp_path)
    with pytest.raises(ValueError, match="no features of items"):
        ContentNeighbors().fit(log, log.lengths, np.random.default_rng(0))
