"""All counting baselines: none reads beyond the cut, and a user's scores do not depend on the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars
import pytest

from tests.conftest import real_set
from tests.evaluation.baselines.conftest import quality, shopping_log
from tests.log.conftest import run
from vista.arrays import Int
from vista.config import DataConfig, EvaluateConfig, SourceColumns
from vista.evaluation.baseline_evaluation import measure_baseline
from vista.evaluation.baselines.all_baselines import counting_baselines, trained_baselines
from vista.evaluation.baselines.counter_trees import CounterTrees
from vista.evaluation.baselines.counting_baseline import CountingBaseline
from vista.evaluation.baselines.item_neighbors import ItemNeighbors
from vista.evaluation.baselines.new_item_trees import NewItemTrees
from vista.evaluation.baselines.own_frequency import OwnFrequency
from vista.evaluation.baselines.popularity import Popularity
from vista.evaluation.baselines.transitions import Transitions
from vista.evaluation.window_cases import window_cases
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts
from vista.log.until import parse_time

NOVEMBER = parse_time("2017-11-01")


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
    return [shopping_log(tmp_path_factory.mktemp("future"), future=number, users=25) for number in (1, 2)]


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


@pytest.mark.data
@pytest.mark.research
def test_complete_journey(tmp_path: Path) -> None:
    """Precision over the next 50 events, and recall of new items over the next 200, equal those of another program."""
    columns = SourceColumns(user="household_id", item="product_id")
    frame = polars.read_parquet(real_set("complete-journey") / "events.parquet")
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="s", columns=columns)
    seen = visible_counts(log, "2017-11-01")
    near, far = (
        window_cases(log, seen, None, horizon_events=events, now=NOVEMBER, min_seen=50, min_after=20)
        for events in (50, 200)
    )
    assert len(near) == len(far) == 893
    expected: list[tuple[CountingBaseline, float | None, float | None]] = [
        (OwnFrequency(last=32), 0.257, None),
        (OwnFrequency(last=200), 0.360, None),
        (OwnFrequency(), 0.369, None),
        (OwnFrequency(days=90), 0.369, None),
        (Popularity(), None, 0.0492),
        (ItemNeighbors(), None, 0.0545),
    ]
    for baseline, precision, recall in expected:
        baseline.fit(log, seen, np.random.default_rng(0))
        if precision is not None:
            assert quality(baseline, log, near, "precision@10") == pytest.approx(precision, abs=6e-4)
        if recall is not None:
            assert quality(baseline, log, far, "recall@50:new") == pytest.approx(recall, abs=6e-5)
