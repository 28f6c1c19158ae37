"""Popularity of recommendations, against hand-computed numbers and SciPy; and what summaries recall."""

from __future__ import annotations

import copy
import dataclasses
import math
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import Served, small_config
from tests.evaluation.conftest import evaluated
from vista.config import EvaluateConfig, SourceColumns
from vista.errors import ConfigError
from vista.evaluation import recall
from vista.evaluation.evaluate import _check, evaluate_scorer
from vista.evaluation.metrics import ranks_of_targets, top_items
from vista.evaluation.popularity_report import PopularityReport, gini, popularity_deciles, popularity_report, spearman
from vista.evaluation.protocol import RecommendedLists
from vista.evaluation.recall import AGES, WINDOW, RecallReport, bands, measure_recall, recall_of_user
from vista.examples.item_statistics import item_counts
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.log.splits import visible_counts
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store.writer import erase
from vista.training.trainer import train


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


@pytest.fixture(scope="module")
def skewed_log(tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """Half of the time each item is followed by its neighbor, else by an item drawn by popularity (Zipf)."""
    rng = np.random.default_rng(0)
    num_users, length, num_items = 150, 30, 60
    popularity = 1 / np.arange(1, num_items + 1)
    items = rng.choice(num_items, (num_users, length), p=popularity / popularity.sum())
    for step in range(1, length):
        follow = rng.random(num_users) < 0.5
        items[follow, step] = (items[follow, step - 1] + num_items // 2) % num_items
    frame = {"user": np.repeat(np.arange(num_users), length), "item": items.ravel()}
    return EventLog.from_frame(frame, tmp_path_factory.mktemp("skewed") / "log", columns=SourceColumns(timestamp=None))


def report_of(log: EventLog, folder: Path, strength: float, num_negatives: int) -> PopularityReport:
    config = small_config(
        log,
        folder / "run",
        data__exclude_seen=False,
        data__num_negatives=num_negatives,
        data__tokens_per_batch=256,
        optim__logq_strength=strength,
        optim__epochs=4,
        optim__validate_every=0,
    )
    model = train(config, log)
    refresh(model, log, folder / "store", until="leave-last-out")
    report = evaluated(model, folder / "store", log, top_k=[5], popularity=True).popularity
    assert report is not None
    return report


@pytest.mark.research
@pytest.mark.parametrize("num_negatives", [1000, 30], ids=["whole-catalog", "sampled"])
def test_logq_strength_zero_removes_popularity_from_the_lists(
    skewed_log: EventLog, tmp_path: Path, num_negatives: int
) -> None:
    plain = report_of(skewed_log, tmp_path / "plain", 1.0, num_negatives)
    remedied = report_of(skewed_log, tmp_path / "remedied", 0.0, num_negatives)
    assert plain.num_items[7:].tolist() == [1, 1, 1]
    popular, left = plain.recommended_share[7:].sum(), remedied.recommended_share[7:].sum()
    assert popular > 0.3, "three of sixty items take a large share of all lists"
    assert left < min(popular / 3, 0.15), "they are 5 % of the items"
    assert remedied.score_correlation < plain.score_correlation - 0.2
    assert plain.ndcg[7:].mean() > remedied.ndcg[7:].mean() + 0.1, "quality for popular labels drops"


@given(
    lengths=st.lists(st.integers(0, 10_000), min_size=1, max_size=20),
    band=st.integers(0, len(AGES) - 1),
    seed=st.integers(0, 1000),
)
def test_windows_lie_in_their_band(lengths: list[int], band: int, seed: int) -> None:
    end = AGES[band + 1] if band + 1 < len(AGES) else None
    windows = recall._random_windows(np.array(lengths), AGES[band], end, np.random.default_rng(seed))
    assert windows[0].tolist() == [row for row, length in enumerate(lengths) if length > AGES[band]]
    for row, start, stop in zip(*windows, strict=True):
        assert 0 <= start < stop <= lengths[row] - AGES[band] and stop - start <= WINDOW
        assert end is None or lengths[row] - start <= end


def test_shares_equal_a_loop_over_the_decoders_distances(served: Served) -> None:
    """Event by event: the prediction, its distances to the event and to the negatives, and the share beaten."""
    log, model = served.log, served.model
    users = np.arange(6)
    histories = log.gather(users, log.lengths[users])
    items = recall.RecallItems(model, log)
    windows = recall._random_windows(histories.lengths, 0, 32, np.random.default_rng(3))
    with Scorer.open(model, served.exact_store) as scorer:
        summary = torch.from_numpy(scorer.store.get_many(log.users.ids(users)).summary)
    shares = recall._share_beaten(model, items, histories, windows, [summary], np.random.default_rng(4))[0]

    rng, expected = np.random.default_rng(4), []
    lengths = windows[2] - windows[1]
    all_rows = np.concatenate([items.rows[histories.slice(r, a, b).item] for r, a, b in zip(*windows, strict=True)])
    negatives = items.alike(all_rows, rng)
    place = 0
    for row, start, length in zip(windows[0], windows[1], lengths, strict=True):
        history = histories.slice(int(row))
        rows = items.rows[history.item]
        gap = (
            recall.history_gaps(np.asarray(history.timestamp), np.array([0, len(rows)]))
            if model.encoder.gap is not None
            else rows * 0
        )

        with torch.no_grad():
            events = torch.stack([_embed(model, history, gap, int(rows[t]), t) for t in range(start, start + length)])
            offsets, age = torch.tensor([0, length]), torch.tensor([len(rows) - start])
            predicted = model.decoder(summary[row : row + 1], events, offsets, age)
            for step in range(length):
                new_items = [int(i) for i in negatives[place] if i not in set(rows.tolist())]
                at = (model, predicted[step], history, gap, int(start) + step)
                own = _distance(*at, int(rows[start + step]))
                theirs = [_distance(*at, item) for item in new_items]
                if new_items:
                    expected.append(np.mean([(own < each) + 0.5 * (own == each) for each in theirs]))
                place += 1
    np.testing.assert_allclose(shares, expected, atol=0.02)


def _distance(
    model: VistaModel, predicted: torch.Tensor, history: Histories, gap: np.ndarray, t: int, item: int
) -> float:
    """From a prediction to event t with an item."""
    return float((predicted - _embed(model, history, gap, item, t)).square().sum())


def _embed(model: VistaModel, history: Histories, gap: np.ndarray, item: int, t: int) -> torch.Tensor:
    """The embedding of event t with another item."""
    rating = None if history.rating is None else torch.tensor(history.rating[t])
    action = torch.tensor(int(history.action[t]))
    return model.encoder(model.item_vectors(torch.tensor(item)), action, torch.tensor(int(gap[t])), rating)


def test_negatives_are_about_as_popular(served: Served) -> None:
    items = recall.RecallItems(served.model, served.log)
    asked = np.repeat(items.by_popularity, 3)
    drawn = items.alike(asked, np.random.default_rng(0), num_neighbors=2)
    step = np.abs(items.rank[drawn] - items.rank[asked][:, None])
    assert step.min() == 1 and step.max() == 2


def test_items_that_histories_show_as_unknown_are_not_judged(served: Served) -> None:
    log, model = served.log, copy.deepcopy(served.model)
    is_known = model.rows_of(log.items) <= 20
    model.num_trained_items = 20
    items = recall.RecallItems(model, log)
    assert 0 < is_known.sum() < len(is_known)
    np.testing.assert_array_equal(items.rows > 0, is_known)
    assert np.sort(items.by_popularity).tolist() == list(range(1, 21))
    histories = log.gather(np.arange(log.num_users))
    windows = recall._random_windows(histories.lengths, 0, 32, np.random.default_rng(3))
    with Scorer.open(served.model, served.exact_store) as scorer:
        summary = torch.from_numpy(scorer.store.get_many(log.users.ids(np.arange(log.num_users))).summary)
    shares = recall._share_beaten(model, items, histories, windows, [summary], np.random.default_rng(4))
    index = recall.ranges(histories.offsets[:-1][windows[0]] + windows[1], windows[2] - windows[1])
    asked = is_known[histories.item[index]]
    assert 0 < shares.shape[1] <= asked.sum() < len(asked)


def test_equal_summaries_recall_nothing(served: Served) -> None:
    """If all records hold one summary, own and other are the same."""
    with Scorer.open(served.model, served.exact_store) as scorer:
        report = measure_recall(scorer, served.log, seed=1)
        again = measure_recall(scorer, served.log, seed=1)
        assert report.num_events[0] > 0 and np.array_equal(report.own, again.own, equal_nan=True)
        stored = scorer.store.get_many

        def alike(ids: object) -> object:
            batch = stored(ids)  # type: ignore[arg-type]
            return replace(batch, summary=np.broadcast_to(batch.summary[:1], batch.summary.shape).copy())

        scorer.store.get_many = alike  # type: ignore[assignment,method-assign]
        flat = measure_recall(scorer, served.log, seed=1)
        assert np.array_equal(flat.own, flat.other, equal_nan=True)


class Recalling(torch.nn.Module):
    """A decoder that predicts a window's events exactly from the summary of their user, and else predicts zeros."""

    def __init__(self, summaries: torch.Tensor, owners: list[set[bytes]]) -> None:
        super().__init__()
        self.summaries, self.owners = summaries, owners

    def forward(
        self, summary: torch.Tensor, events: torch.Tensor, offsets: torch.Tensor, age: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(events)
        for window, (start, stop) in enumerate(pairwise(offsets.tolist())):
            (user,) = (self.summaries == summary[window]).flatten(1).all(1).nonzero()[:1].flatten().tolist()
            known = [event.numpy().tobytes() in self.owners[user] for event in events[start:stop]]
            out[start:stop][known] = events[start:stop][known]
        return out


def test_own_and_other_are_not_swapped(served: Served) -> None:
    log, model = served.log, copy.deepcopy(served.model)
    users = np.arange(log.num_users)
    with Scorer.open(model, served.exact_store) as scorer:
        summaries = torch.from_numpy(scorer.store.get_many(log.users.ids(users)).summary)
        owners = []
        for user in users.tolist():
            history = log.slice(user)
            rows = torch.from_numpy(model.item_rows(log.items.ids(history.item)))
            gap = torch.from_numpy(recall.history_gaps(np.asarray(history.timestamp), np.array([0, len(rows)])))
            rating = None if history.rating is None else torch.from_numpy(np.array(history.rating))
            action = torch.from_numpy(history.action.astype(np.int64))
            with torch.no_grad():
                events = model.encoder(model.item_vectors(rows), action, gap, rating)
            owners.append({event.numpy().tobytes() for event in events})
        model.decoder = Recalling(summaries, owners)  # type: ignore[assignment]
        report = measure_recall(scorer, log)
        longest = int(log.lengths.argmax())
        of_user = recall_of_user(scorer, log, recall.RecallItems(model, log), longest)
    assert report.own[0] == 1.0 and report.other[0] < 0.9
    assert of_user is not None and of_user.own[0] == of_user.own[1] == 1.0 and of_user.other[0] < 0.9
    assert np.isnan(of_user.own[2:]).all() and of_user.num_events[0] > recall.WINDOW


def test_a_user_without_a_record_has_no_recall(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.exact_store, tmp_path / "store")
    erase(tmp_path / "store", served.log.users.ids([0]).tolist())
    items = recall.RecallItems(served.model, served.log)
    with Scorer.open(served.model, tmp_path / "store") as scorer:
        assert recall_of_user(scorer, served.log, items, 0) is None
        assert recall_of_user(scorer, served.log, items, 4) is not None


def test_events_that_only_the_tail_holds_are_not_asked_for(served: Served, tmp_path: Path) -> None:
    config = replace(served.model.config, tail_in_summary=False)
    model = VistaModel(config, served.model.schema, served.model.items, served.model.data).eval()
    model.load_state_dict(served.model.state_dict())
    refresh(model, served.log, tmp_path / "store")
    with Scorer.open(model, tmp_path / "store") as scorer:
        asked = measure_recall(scorer, served.log).num_events
    covered = np.clip(served.log.lengths - config.tail_len, 0, 32).sum()  # those of the first band
    assert 0.9 * covered < asked[0] <= covered


def test_report_and_refusal(served: Served) -> None:
    evaluation = evaluated(served.model, served.test_store, served.log, recall=True)
    assert isinstance(evaluation.recall, RecallReport)
    assert set(evaluation.recall.metrics()) == {f"recall/{band}" for band in bands()} <= set(evaluation.metrics)
    assert "age in events" in str(evaluation)


def test_a_model_without_summaries_is_refused(served: Served) -> None:
    config = replace(served.model.config, num_seeds=0)
    model = VistaModel(config, served.model.schema, served.model.items, served.model.data)
    with pytest.raises(ConfigError, match="no summaries"):
        _check(model, served.log, EvaluateConfig(recall=True))
