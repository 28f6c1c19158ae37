"""Metrics over the labels of a window: by hand, against a loop over all orders of ties, and on a real log."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import real_set
from tests.log.conftest import run
from vista.arrays import Int
from vista.evaluation.protocol import case_batches, seen_columns
from vista.evaluation.window_cases import WindowCases, window_cases
from vista.evaluation.window_metrics import COLD, KINDS, window_metrics
from vista.examples.frequency import item_counts
from vista.log.event_log import EventLog
from vista.log.splits import visible_counts


def cases_of(labels: list[list[int]], seen: list[list[int]]) -> tuple[WindowCases, tuple[Int, Int]]:
    """Cases with these labels, and the seen columns; labels that are not seen are new."""
    flat = [(item, item not in had) for own, had in zip(labels, seen, strict=True) for item in own]
    bounds = [np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64) for rows in (labels, seen)]
    item, is_new = (np.array(column) for column in zip(*flat, strict=True)) if flat else (np.zeros(0), np.zeros(0))
    user = np.arange(len(labels))
    cases = WindowCases(user, user, None, item.astype(np.int64), is_new.astype(bool), bounds[0])
    return cases, (np.array([item for had in seen for item in had], np.int64), bounds[1])


def test_by_hand() -> None:
    """Items 0 to 5 in descending order of score. Item 6 is unknown to the model."""
    cases, seen = cases_of([[0, 3, 6]], [[0, 1, 1, 4]])
    columns = np.array([0, 1, 2, 3, 4, 5, -1])
    got = window_metrics(np.array([[6, 5, 4, 3, 2, 1.0]]), cases, columns, seen, [2, 4])
    discount = 1 / np.log2(np.arange(4) + 2)
    assert {name: value[0] for name, value in got.items()} == pytest.approx(
        {
            # 0 is first and 3 is fourth of all items.
            "precision@2": 1 / 2,
            "recall@2": 1 / 2,
            "ndcg@2": 1 / discount[:2].sum(),
            "precision@4": 2 / 4,
            "recall@4": 2 / 3,
            "ndcg@4": (1 + discount[3]) / discount[:3].sum(),
            # Seen items are 0, 1, 4; the label 0 is first.
            "precision@2:returns": 1 / 2,
            "recall@2:returns": 1,
            "ndcg@2:returns": 1,
            "precision@4:returns": 1 / 4,
            "recall@4:returns": 1,
            "ndcg@4:returns": 1,
            # The others are 2, 3, 5; of the labels 3 and 6, the first is second and the other one unknown.
            "precision@2:new": 1 / 2,
            "recall@2:new": 1 / 2,
            "ndcg@2:new": discount[1] / discount[:2].sum(),
            "precision@4:new": 1 / 4,
            "recall@4:new": 1 / 2,
            "ndcg@4:new": discount[1] / discount[:2].sum(),
        }
    )


def test_a_case_without_labels_of_a_kind_is_undefined() -> None:
    cases, seen = cases_of([[0], [1], []], [[0], [], [2]])
    got = window_metrics(np.zeros((3, 3), np.float32), cases, np.arange(3), seen, [1])
    for name in ("precision@1", "recall@1", "ndcg@1"):
        assert np.isnan(got[name]).tolist() == [False, False, True]
        assert np.isnan(got[f"{name}:returns"]).tolist() == [False, True, True]
        assert np.isnan(got[f"{name}:new"]).tolist() == [True, False, True]


def test_scores_must_be_numbers() -> None:
    cases, seen = cases_of([[0], [1]], [[0], [0]])
    with pytest.raises(ValueError, match="row 1 holds NaN"):
        window_metrics(np.array([[0, 1.0], [np.nan, 1.0]]), cases, np.arange(2), seen, [1])


def test_minus_infinity_is_never_listed() -> None:
    cases, seen = cases_of([[0, 1]], [[]])
    got = window_metrics(np.array([[-np.inf, 1.0, 0.0]]), cases, np.arange(3), seen, [3])
    assert got["precision@3"].tolist() == [1 / 3]


def plain_metrics(scores: list[float], labels: list[int], shown: list[int], k: int) -> tuple[float, float, float]:
    """Precision, recall, NDCG of one list, averaged over all orders of the items, among which a sort is stable."""
    values = []
    gains = [1 / np.log2(rank + 2) for rank in range(k)]
    for order in permutations(shown):
        ranked = sorted(order, key=lambda item: -scores[item])[:k]
        hits = [gains[rank] for rank, item in enumerate(ranked) if item in labels]
        values.append((len(hits) / k, len(hits) / min(k, len(labels)), sum(hits) / sum(gains[: len(labels)])))
    precision, recall, ndcg = np.mean(values, axis=0).tolist() if values else (0.0, 0.0, 0.0)
    return precision, recall, ndcg


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_to_a_loop_over_all_orders_of_ties(data: st.DataObject) -> None:
    items = st.integers(0, 4)
    num = data.draw(st.integers(1, 3))
    scores = [data.draw(st.lists(st.integers(0, 2), min_size=5, max_size=5)) for _ in range(num)]
    labels = [sorted(data.draw(st.sets(items))) for _ in range(num)]
    seen = [data.draw(st.lists(items, max_size=6)) for _ in range(num)]
    ks = data.draw(st.sampled_from([[1], [2, 4], [7, 3]]))
    cold = np.array(data.draw(st.lists(st.booleans(), min_size=5, max_size=5)))
    cases, columns = cases_of(labels, seen)
    got = window_metrics(np.array(scores, np.float32), cases, np.arange(5), columns, ks, cold)
    without = window_metrics(np.array(scores, np.float32), cases, np.arange(5), columns, ks)
    assert list(without) == [name for name in got if not name.endswith(COLD)]
    for row, had in enumerate(seen):
        lists = [range(5), [item for item in range(5) if item in had], [item for item in range(5) if item not in had]]
        lists.append(np.flatnonzero(cold).tolist())
        for kind, shown in zip(KINDS, map(list, lists), strict=True):
            wanted = [item for item in labels[row] if item in shown]
            for k in ks:
                values = [got[f"{name}@{k}{kind}"][row] for name in ("precision", "recall", "ndcg")]
                if wanted:
                    assert values == pytest.approx(plain_metrics(list(map(float, scores[row])), wanted, shown, k))
                else:
                    assert np.isnan(values).all()


@pytest.mark.parametrize("scores_per_chunk", [1, 100, 1 << 22])
def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch, scores_per_chunk: int) -> None:
    rng = np.random.default_rng(0)
    labels = [sorted(set(rng.integers(0, 40, 9).tolist())) for _ in range(11)]
    seen = [rng.integers(0, 40, rng.integers(0, 30)).tolist() for _ in range(11)]
    cases, columns = cases_of(labels, seen)
    scores = rng.integers(0, 9, (11, 40)).astype(np.float32)
    want = window_metrics(scores, cases, np.arange(40), columns, [3, 10])
    monkeypatch.setattr("vista.evaluation.window_metrics.SCORES_PER_CHUNK", scores_per_chunk)
    got = window_metrics(scores, cases, np.arange(40), columns, [3, 10])
    for name, value in want.items():
        np.testing.assert_array_equal(got[name], value)


@pytest.mark.data
@pytest.mark.research
def test_complete_journey(tmp_path: Path) -> None:
    """Two counting baselines equal the numbers of another program, which breaks ties by popularity."""
    path = real_set("complete-journey")
    names = {"user": "household_id", "item": "product_id", "timestamp": "timestamp"}
    run(tmp_path / "log", [path / "events.parquet"], time_unit="s", **names)
    log = EventLog.open(tmp_path / "log")
    seen = visible_counts(log, "2017-11-01")
    popularity = item_counts(log, seen).astype(np.float64)
    values: dict[str, list[np.ndarray]] = {"precision@10": [], "recall@50:new": []}
    for metric, horizon in (("precision@10", 50), ("recall@50:new", 200)):
        cases = window_cases(log, seen, None, horizon_events=horizon, min_seen=50, min_after=20)
        assert len(cases) == 893
        for part in case_batches(cases, log.num_items, 512):
            some = cases.part(part)
            had = seen_columns(log, some, np.arange(log.num_items))
            scores = np.tile(popularity * 1e-9, (len(some), 1))
            if metric == "precision@10":
                np.add.at(scores, (np.repeat(np.arange(len(some)), np.diff(had[1])), had[0]), 1)
            values[metric].append(window_metrics(scores, some, np.arange(log.num_items), had, [10, 50])[metric])
    means = {metric: np.nanmean(np.concatenate(parts)) for metric, parts in values.items()}
    assert means == pytest.approx({"precision@10": 0.3690, "recall@50:new": 0.0492}, abs=2e-4)
