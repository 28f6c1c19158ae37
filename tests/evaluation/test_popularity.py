"""Popularity of recommendations, against hand-computed numbers and SciPy."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Served
from tests.evaluation.conftest import evaluated
from vista.config import EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.evaluate import evaluate_scorer
from vista.evaluation.metrics import ranks_of_targets, top_items
from vista.evaluation.popularity_report import gini, popularity_deciles, popularity_report, spearman
from vista.evaluation.protocol import RecommendedLists
from vista.examples.item_statistics import item_counts
from vista.log.splits import visible_counts
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer


def test_gini_by_hand() -> None:
    assert gini(np.array([3, 3, 3])) == pytest.approx(0)
    assert gini(np.array([0, 5, 0, 0])) == pytest.approx(3 / 4)
    # Mean absolute difference of all 9 ordered pairs: 2 (1 + 3 + 2) / 9; over twice the mean, 7 / 3.
    assert gini(np.array([4, 1, 2])) == pytest.approx((12 / 9) / (2 * 7 / 3))
    assert math.isnan(gini(np.zeros(4, np.int64)))


def test_deciles_hold_a_tenth_of_the_events_each() -> None:
    # 100 events: fifty items with one event each share a decile, that of their common middle. Items without events are
    # rarest.
    popularity = np.array([0] * 3 + [1] * 50 + [10, 11, 14, 15])
    assert popularity_deciles(popularity).tolist() == [0] * 3 + [2] * 50 + [5, 6, 7, 9]
    even = np.random.default_rng(0).permutation(np.arange(1000, 2000))
    mass = np.bincount(popularity_deciles(even), weights=even) / even.sum()
    np.testing.assert_allclose(mass, 0.1, atol=0.002)
    assert popularity_deciles(np.zeros(5, np.int64)).tolist() == [0] * 5


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(-3, 3)), min_size=2, max_size=40))
def test_spearman_equals_scipy(rows: list[tuple[int, int]]) -> None:
    from scipy.stats import spearmanr  # takes a second

    one, other = np.array(rows).T
    if len(set(one.tolist())) == 1 or len(set(other.tolist())) == 1:
        assert math.isnan(spearman(one, other))
    else:
        assert spearman(one, other / 7) == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)


@given(st.data())
def test_a_label_is_in_the_list_if_its_rank_is_below_k(data: st.DataObject) -> None:
    num_rows, num_items = data.draw(st.integers(0, 6)), data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    scores = rng.permuted(np.tile(np.arange(num_items, dtype=np.float32), (num_rows, 1)), axis=1)
    target = rng.integers(0, num_items, num_rows)
    seen = rng.integers(0, num_items + 1, num_rows)
    excluded = (rng.integers(0, num_items, seen.sum()), np.concatenate([[0], np.cumsum(seen)]))
    k = data.draw(st.integers(1, 10))
    size = data.draw(st.sampled_from([1, 2 * num_items, 1 << 20]))
    lists = top_items(scores, target, k, excluded, scores_per_chunk=size)
    ranks = ranks_of_targets(scores, target, excluded)
    assert ((lists == target[:, None]).any(axis=1) == (ranks < k)).all()
    for row, items in enumerate(lists):
        kept = items[items >= 0].tolist()
        left_out = set(excluded[0][excluded[1][row] : excluded[1][row + 1]].tolist()) - {int(target[row])}
        assert len(set(kept)) == len(kept) == min(k, num_items - len(left_out))
        assert not left_out & set(kept)


def test_a_report_by_hand() -> None:
    popularity = np.array([10, 10, 10, 70])  # deciles 1, 1, 1 (by their common middle, 15 %) and 6
    lists = RecommendedLists(4, 2)
    lists.add(np.array([[3.0, 2.0, 1.0, 4.0], [1.0, 2.0, 3.0, 4.0]], np.float32), np.array([0, 2]), None)
    lists.add(np.array([[1.0, 3.0, 2.0, 4.0]], np.float32), np.array([-1]), (np.array([1]), np.array([0, 1])))
    assert lists.counts.tolist() == [1, 0, 2, 3] and lists.num_lists == 3
    np.testing.assert_allclose(lists.mean_scores, [5 / 3, 7 / 3, 2, 4])
    report = popularity_report(popularity, lists, np.array([1, 1, 4]), np.array([4.0, 3, 2, 1]))
    assert report.coverage == 0.75
    assert report.gini == pytest.approx(gini(np.array([1, 0, 2, 3])))
    assert report.num_items.tolist() == [0, 3, 0, 0, 0, 0, 1, 0, 0, 0]
    np.testing.assert_allclose(report.label_share[[0, 1, 6]], [1 / 3, 2 / 3, 0])
    np.testing.assert_allclose(report.recommended_share[[0, 1, 6]], [0, 0.5, 0.5])
    assert report.hit_rate[0] == 0 and report.hit_rate[1] == 1 and math.isnan(report.hit_rate[6])
    assert report.ndcg[1] == pytest.approx(1 / math.log2(3))
    # The ranks of the items are 2, 2, 2, 4; those of their scores 1, 3, 2, 4, and of their norms 4, 3, 2, 1.
    assert report.score_correlation == pytest.approx(3 / math.sqrt(15))
    assert report.norm_correlation == pytest.approx(-3 / math.sqrt(15))
    assert report.metrics()["recommended@2/decile-7"] == 0.5 and report.metrics()["gini@2"] == report.gini
    assert "7           1   0.00%       50.00%     nan     nan" in str(report)


class TestEvaluation:
    @pytest.mark.parametrize("exclude_seen", [True, False])
    def test_counts_equal_those_of_the_scorers_lists(
        self, served: Served, exclude_seen: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(served.model.data, "exclude_seen", exclude_seen)
        log, seen = served.log, visible_counts(served.log, "leave-last-out")
        with Scorer.open(served.model, served.test_store) as scorer:
            plain = evaluate_scorer(scorer, log, EvaluateConfig(top_k=[4, 10]))
            monkeypatch.setattr("vista.evaluation.protocol.USERS_PER_BATCH", 5)
            evaluation = evaluate_scorer(scorer, log, EvaluateConfig(top_k=[4, 10], popularity=True))
            shown: list[int] = []
            for row in np.flatnonzero(seen < log.lengths).tolist():
                history = log.slice(row)
                ids = log.items.ids(history.item).tolist()
                before = set(ids[: seen[row]]) - {ids[seen[row]]} if exclude_seen else set()
                now = int(history.timestamp[seen[row]])
                shown += scorer.rank(log.users.ids([row])[0], top_k=4, exclude=sorted(before), now=now).items.tolist()
        report = evaluation.popularity
        assert report is not None and plain.popularity is None and report.k == 4
        counts = np.zeros(len(served.model.items), np.int64)
        np.add.at(counts, served.model.item_rows(np.array(shown)) - 1, 1)
        assert len(shown) == 4 * 14 and report.gini == pytest.approx(gini(counts))
        assert report.coverage == pytest.approx((counts > 0).mean())
        assert evaluation.metrics == pytest.approx(plain.metrics | report.metrics(), nan_ok=True)
        hits = (report.label_share * np.nan_to_num(report.hit_rate)).sum()
        assert hits == pytest.approx(evaluation.metrics["hr@4"]), "the deciles' quality adds up to the quality of all"
        train_events = item_counts(log, visible_counts(log, "leave-last-two-out"))
        assert report.training_gini == pytest.approx(gini(train_events))

    def test_a_model_without_retrieval_is_refused(self, served: Served) -> None:
        model = served.model
        schema = dataclasses.replace(model.schema, has_retrieval=False, tasks=["click"])
        asked = VistaModel(model.config, schema, model.items, model.data).eval()
        asked.load_state_dict(model.state_dict(), strict=False)
        with pytest.raises(ConfigError, match=r"popularity=true: .* retrieval head was not trained"):
            evaluated(asked, served.test_store, served.log, popularity=True)
