"""The scorer against the model read directly, in all shapes; policies, fresh tails, rankings and refusals."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import DAY, START, Served, run_python, small_config
from vista import scorer as scorer_module
from vista.config import OnMissing, ScoreConfig
from vista.data.event_log import EventLog
from vista.errors import (
    CheckpointError,
    ConfigError,
    StoreError,
    SummarizerMismatchError,
    UnknownItemError,
    UnknownUserError,
    UserKeyError,
)
from vista.model import inference
from vista.model.recommender import Recommender
from vista.refresh import refresh
from vista.scorer import CandidateSet, Scorer, Tail, score_from_config
from vista.training.trainer import schema_of, train

USERS = [103, 100, 115, 108, 101]
ITEMS = [0, 390, 10, 200, 50, 60]


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Such as torch's on arrays that cannot be written."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture(scope="module")
def scorer(served: Served) -> Iterator[Scorer]:
    with Scorer.open(served.model_dir, served.store) as opened:
        yield opened


@pytest.fixture(scope="module")
def task_scorer(served_tasks: Served) -> Iterator[Scorer]:
    with Scorer.open(served_tasks.model_dir, served_tasks.store) as opened:
        yield opened


@pytest.fixture(scope="module")
def tail_only(event_log: EventLog) -> Recommender:
    """Without summary tokens the tail is all that counts."""
    config = small_config(event_log, "unused", model__num_seeds=0)
    return Recommender(config.model, schema_of(event_log, config), event_log.items, config.data).eval()


@torch.no_grad()
def expected_scores(
    given: Served, users: list[int], items: list[int], now: list[int] | None
) -> dict[str, NDArray[np.float32]]:
    """From the log and the model, a user and a candidate at a time, everything visible."""
    model, log = given.model, given.log
    scores: dict[str, list[list[float]]] = {task: [] for task in [*model.schema.tasks, "next"]}
    for index, user in enumerate(users):
        history = log[user]
        rows = model.item_rows(log.items.ids(history.item))
        history = dataclasses.replace(history, item=rows)
        tail = inference.pad_tail(model, rows, history.timestamp, history.action, history.offsets)
        context = inference.request_context(model, inference.summarize(model, history), tail)
        gap = inference.request_gap(model, None if now is None else np.array(now[index : index + 1]), tail)
        vector = inference.user_vectors(model, context, gap)[0]
        lines: dict[str, list[float]] = {task: [] for task in scores}
        for row in model.item_rows(items).tolist():
            item = torch.nn.functional.normalize(model.item_table[row], dim=0)
            lines["next"].append(float(vector @ item) / model.config.temperature)
            if model.schema.tasks:
                logits = inference.candidate_logits(model, context, gap, torch.tensor([[row]]))[0, 0]
                for task, logit in zip(model.schema.tasks, logits, strict=True):
                    lines[task].append(float(logit.sigmoid()))
        for task, line in lines.items():
            scores[task].append(line)
    return {task: np.array(lines, np.float32) for task, lines in scores.items()}


def tail_of(events: list[tuple[int, list[tuple[int, int, int]]]]) -> Tail:
    """From (user, [(item, time, action), …]) in the order of the request."""
    lengths = [len(rows) for _, rows in events]
    rows = [row for _, rows in events for row in rows]
    columns = np.array(rows, np.int64).reshape(-1, 3).T
    return Tail(columns[0], columns[1], columns[2].astype(np.uint8), np.concatenate([[0], np.cumsum(lengths)]))


class TestScores:
    @pytest.mark.parametrize("now", [None, [START + 400 * DAY + 1000 * i for i in range(5)]])
    def test_next_item_scores_are_the_models(self, scorer: Scorer, served: Served, now: list[int] | None) -> None:
        expected = expected_scores(served, USERS, ITEMS, now)["next"]
        found = scorer.score(USERS, ITEMS, now=now)
        assert found.dtype == np.float32 and (scorer.task, scorer.tasks) == ("next", ["next"])
        np.testing.assert_allclose(found, expected, atol=0.05)  # int8 summaries
        with Scorer.open(served.model, served.exact_store) as exact:
            np.testing.assert_allclose(exact.score(USERS, ITEMS, now=now), expected, atol=1e-4)
        assert np.abs(found - found.mean(0)).max() > 0.5  # users differ

    def test_task_scores_are_the_models_probabilities(self, task_scorer: Scorer, served_tasks: Served) -> None:
        users = served_tasks.log.users.ids(np.arange(5)).tolist()
        items = served_tasks.log.items.ids(np.arange(7)).tolist()
        now = int(served_tasks.log.slice(0).timestamp[-1]) + DAY
        expected = expected_scores(served_tasks, users, items, [now] * 5)
        found = task_scorer.predict(users, items, now=now)
        assert list(found) == ["click", "like", "long_view", "next"] == task_scorer.tasks
        with Scorer.open(served_tasks.model, served_tasks.exact_store) as exact:
            for task, scores in exact.predict(users, items, now=now).items():
                np.testing.assert_allclose(scores, expected[task], atol=1e-4)
                np.testing.assert_allclose(found[task], expected[task], atol=0.05)  # int8 summaries
        np.testing.assert_array_equal(task_scorer.score(users, items, now=now), found["click"])
        with Scorer.open(served_tasks.model, served_tasks.store, task="long_view") as other:
            np.testing.assert_array_equal(other.score(users, items, now=now), found["long_view"])

    @pytest.mark.parametrize("kind", ["scorer", "task_scorer"])
    def test_all_shapes_agree(self, kind: str, request: pytest.FixtureRequest) -> None:
        opened: Scorer = request.getfixturevalue(kind)
        users = list(opened.store.keys())[:3]
        items = opened.model.items.ids(np.arange(6))
        whole = opened.predict(users, items)
        grid = np.stack([items[:4], items[2:], items[1:5]])
        ragged = (items[[0, 1, 5, 2, 2, 3]], np.array([0, 2, 2, 6]))
        for task, scores in whole.items():
            assert scores.shape == (3, 6)

            def close(found: Any, expected: Any) -> None:
                np.testing.assert_allclose(found, expected, atol=2e-5)

            close(opened.predict(users, items.tolist())[task], scores)
            close(opened.predict(np.array(users), opened.encode(items))[task], scores)
            close(opened.predict(pd.Series(users), tuple(items[:2].tolist()))[task], scores[:, :2])
            close(opened.predict(users, grid)[task], [scores[0, :4], scores[1, 2:], scores[2, 1:5]])
            close(opened.predict(users, opened.encode(grid))[task], opened.predict(users, grid)[task])
            flat = [scores[0, 0], scores[0, 1], scores[2, 5], scores[2, 2], scores[2, 2], scores[2, 3]]
            close(opened.predict(users, ragged)[task], flat)
            close(opened.predict(users, (opened.encode(ragged[0]), ragged[1].tolist()))[task], flat)
            close(opened.predict([users[1]], items)[task], scores[1:2])
            close(opened.predict([users[1], users[1]], items)[task], scores[[1, 1]])
        for empty in ([], np.zeros((3, 0), np.int64), ([], [0, 0, 0, 0])):
            assert opened.score(users, empty).size == 0
        assert opened.score(users, []).shape == (3, 0)
        assert opened.score([], items).shape == (0, 6)

    def test_tensors_in_tensors_out(self, scorer: Scorer) -> None:
        expected = scorer.score(USERS, ITEMS)
        found = scorer.score(torch.tensor(USERS), torch.tensor(ITEMS), now=None)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
        np.testing.assert_array_equal(found.numpy(), expected)
        found += 1  # an ordinary tensor
        ragged = scorer.score(USERS, (torch.tensor(ITEMS[:5]), torch.tensor([0, 1, 2, 3, 4, 5])))
        np.testing.assert_allclose(ragged.numpy(), expected[np.arange(5), np.arange(5)], atol=2e-5)
        assert isinstance(scorer.score(torch.tensor(USERS), ITEMS), np.ndarray)
        now = torch.tensor([START + DAY] * 5)
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, now=now), scorer.score(USERS, ITEMS, now=START + DAY))

    def test_a_candidates_score_does_not_depend_on_the_others(
        self, task_scorer: Scorer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        users = list(task_scorer.store.keys())[:4]
        items = task_scorer.model.items.ids(np.arange(len(task_scorer.model.items)))
        whole = task_scorer.predict(users, items)
        for monkey in (scorer_module.PAIRS_PER_PASS, 1, 10):
            monkeypatch.setattr(scorer_module, "PAIRS_PER_PASS", monkey)
            backwards = task_scorer.predict(users, items[::-1])
            for task, scores in whole.items():
                np.testing.assert_allclose(backwards[task][:, ::-1], scores, atol=2e-5)
                np.testing.assert_allclose(task_scorer.predict(users, items[7:8])[task], scores[:, 7:8], atol=2e-5)

    def test_now_counts(self, scorer: Scorer) -> None:
        near, far = (scorer.score(USERS, ITEMS, now=START + days * DAY) for days in (300, 30_000))
        assert np.abs(near - far).max() > 1e-3 and np.abs(scorer.score(USERS, ITEMS) - far).max() > 1e-3

    def test_user_and_item_vectors_rank_as_the_scores_do(self, scorer: Scorer, served: Served) -> None:
        ids, items = scorer.item_vectors()
        users = scorer.user_vectors(USERS)
        assert ids.tolist() == served.log.items.ids(np.arange(served.log.num_items)).tolist()
        np.testing.assert_allclose(np.linalg.norm(users, axis=1), 1, atol=1e-5)
        scores = scorer.score(USERS, ids)
        np.testing.assert_allclose(users @ items.T / scorer.model.config.temperature, scores, atol=1e-4)
        items[:] = 0  # the caller's own copy
        np.testing.assert_array_equal(scorer.score(USERS, ids), scores)

    def test_a_history_of_one_event(self, scorer: Scorer, served: Served) -> None:
        assert served.log[101].num_events == 1
        expected = expected_scores(served, [101], ITEMS, None)["next"]
        np.testing.assert_allclose(scorer.score([101], ITEMS), expected, atol=0.05)


class TestPolicies:
    def test_unknown_users(self, served: Served, tmp_path: Path) -> None:
        with Scorer.open(served.model, served.store) as empty:
            found = empty.score([100, 999, 103], ITEMS)
            np.testing.assert_allclose(found[[0, 2]], empty.score([100, 103], ITEMS), atol=2e-5)
            nobody = empty._request([999], None, None).context  # the seeds alone
            history = inference.summarize(served.model, scorer_module._empty_history())
            tail = inference.pad_tail(served.model, *(np.zeros(0, np.int64),) * 3, np.zeros(2, np.int64))
            expected = inference.request_context(served.model, history, tail)
            torch.testing.assert_close(nobody.values, expected.values)
            np.testing.assert_allclose(found[1], empty.score([-5], ITEMS)[0], atol=2e-5)
        with Scorer.open(served.model, served.store, on_missing="nan") as nan:
            found = nan.score([100, 999], ITEMS)
            assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
            vectors = nan.user_vectors([100, 999])
            assert np.isfinite(vectors[0]).all() and np.isnan(vectors[1]).all()
            ranking = nan.rank(999)
            assert len(ranking.items) == 0 and ranking.num_dropped == served.log.num_items
        with Scorer.open(served.model, served.store, on_missing=OnMissing.error) as strict:
            with pytest.raises(
                UnknownUserError, match=r"users \[999, 5\] have no record in .*refresh it, or on_missing"
            ):
                strict.score([100, 999, 5], ITEMS)
            assert strict.score([100], ITEMS).shape == (1, 6)

    def test_unknown_candidates(self, served: Served) -> None:
        items = [0, 7, 390, -1]  # 7 and -1 are no items
        with Scorer.open(served.model, served.store) as empty:
            found = empty.score([100, 103], items)
            np.testing.assert_allclose(found[:, [0, 2]], empty.score([100, 103], [0, 390]), atol=2e-5)
            assert (found[:, [1, 3]] == 0).all()  # neutral: at right angles to every user
            ranking = empty.rank(100, candidates=[0, 7, 390, -1, 0])
            assert sorted(ranking.items.tolist()) == [0, 390] and ranking.num_dropped == 2
        with Scorer.open(served.model, served.store, on_missing="nan") as nan:
            found = nan.score([100, 103], items)
            assert np.isnan(found[:, [1, 3]]).all() and np.isfinite(found[:, [0, 2]]).all()
            grid = nan.score([100, 103], [[0, 7], [7, 390]])
            assert np.isnan(grid).tolist() == [[False, True], [True, False]]
            ragged = nan.score([100, 103], ([7, 0, 390], [0, 1, 3]))
            assert np.isnan(ragged).tolist() == [True, False, False]
        with Scorer.open(served.model, served.store, on_missing="raise") as strict:
            for candidates in (items, [items, items], (items, [0, 2, 4])):
                with pytest.raises(UnknownItemError, match=r"candidates: items \[7, -1"):
                    strict.score([100, 103], candidates)
            # Padding of ragged candidates is no unknown item.
            assert strict.score([100, 103], ([0, 390, 10], [0, 1, 3])).shape == (3,)

    def test_policies_and_tasks_that_do_not_exist(self, served: Served) -> None:
        with pytest.raises(ValueError, match=r"on_missing: 'ignore' is none of \['empty', 'nan', 'raise'\]"):
            Scorer.open(served.model, served.store, on_missing="ignore")
        with pytest.raises(ValueError, match=r"task: 'buy' is none of this model's \['next'\]"):
            Scorer.open(served.model, served.store, task="buy")


class TestFreshTails:
    """What a caller brings must do what a refresh would have stored."""

    @pytest.mark.parametrize("until", ["leave-last-out", "leave-last-two-out", "long ago"])
    def test_a_fresh_tail_equals_a_refreshed_one(
        self, event_log: EventLog, tail_only: Recommender, tmp_path: Path, until: str
    ) -> None:
        before = START + DAY if until == "long ago" else until
        refresh(tail_only, event_log, tmp_path / "now")
        refresh(tail_only, event_log, tmp_path / "old", until=before)
        users = event_log.users.ids(np.arange(event_log.num_users)).tolist()
        now = START + 500 * DAY
        with (
            Scorer.open(tail_only, tmp_path / "now") as refreshed,
            Scorer.open(tail_only, tmp_path / "old") as stale,
        ):
            expected = refreshed.score(users, ITEMS, now=now)
            assert np.abs(stale.score(users, ITEMS, now=now) - expected).max() > 0.1
            # Since the refresh only, or the whole tail again: the same.
            counts = stale.store.get_many(users).event_count
            newest = np.maximum(event_log.lengths - 6, 0)
            for first in (counts, newest, np.zeros_like(counts)):
                fresh = event_log.gather_ranges(np.arange(len(users)), first, event_log.lengths)
                ids = event_log.items.ids(fresh.item)
                tail = Tail(ids, fresh.timestamp, fresh.action, fresh.offsets)
                np.testing.assert_allclose(stale.score(users, ITEMS, now=now, tail=tail), expected, atol=1e-5)
            ranking = stale.rank(users[4], tail=tail_of([(users[4], _rows(event_log, 4, int(counts[4])))]), now=now)
            assert ranking.items.tolist() == refreshed.rank(users[4], now=now).items.tolist()

    def test_an_empty_tail_equals_none(self, scorer: Scorer) -> None:
        expected = scorer.score(USERS, ITEMS)
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=Tail.empty(5)), expected)
        lists: Any = Tail([], [], [], [0] * 6)  # type: ignore[arg-type]
        np.testing.assert_array_equal(scorer.score(USERS, ITEMS, tail=lists), expected)

    def test_what_the_store_has_already_counts_once(self, scorer: Scorer, event_log: EventLog) -> None:
        expected = scorer.score([104], ITEMS)
        stored = _rows(event_log, 4, 34)
        assert len(stored) == 6
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored)])), expected)
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored[::-1] * 2)])), expected)
        # Another action at the same time is another event.
        item, time, action = stored[-1]
        other = scorer.score([104], ITEMS, tail=tail_of([(104, [(item, time, 1 - action)])]))
        assert np.abs(other - expected).max() > 1e-3

    def test_older_events_than_the_stored_ones_change_nothing(self, scorer: Scorer, event_log: EventLog) -> None:
        tail = tail_of([(104, _rows(event_log, 4, 0)[:20])])
        np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail), scorer.score([104], ITEMS))

    def test_each_user_gets_its_own(self, scorer: Scorer) -> None:
        events = [(103, [(390, START + 900 * DAY, 1)]), (100, []), (115, [(0, START + 900 * DAY, 0)] * 2)]
        users = [user for user, _ in events]
        found = scorer.score(users, ITEMS, tail=tail_of(events))
        for index, (user, rows) in enumerate(events):
            alone = scorer.score([user], ITEMS, tail=tail_of([(user, rows)]))[0]
            np.testing.assert_allclose(found[index], alone, atol=2e-5)
        np.testing.assert_allclose(found[1], scorer.score([100], ITEMS)[0], atol=2e-5)
        assert np.abs(found[[0, 2]] - scorer.score([103, 115], ITEMS)).min(1).max() > 1e-4

    def test_an_unknown_item_is_an_event_all_the_same(self, scorer: Scorer) -> None:
        found = scorer.score([100], ITEMS, tail=tail_of([(100, [(777, START + 900 * DAY, 0)])]))
        assert np.isfinite(found).all() and np.abs(found - scorer.score([100], ITEMS)).max() > 1e-3

    def test_tensors_are_taken(self, scorer: Scorer) -> None:
        tail = tail_of([(100, [(10, START + 900 * DAY, 1)])])
        tensors: Any = Tail(*(torch.from_numpy(np.array(part)) for part in dataclasses.astuple(tail)))
        np.testing.assert_array_equal(scorer.score([100], ITEMS, tail=tensors), scorer.score([100], ITEMS, tail=tail))

    @pytest.mark.parametrize(
        ("part", "value", "error", "message"),
        [
            ("times", [np.nan, 2.0], TypeError, r"tail\.times: needs integers, got float64 \(times are milliseconds\)"),
            ("times", [1.0, 2.0], TypeError, r"tail\.times: needs integers, got float64"),
            ("times", [1], ValueError, r"tail\.times: 1 values for 2 items"),
            ("times", [[1, 2]], ValueError, r"tail\.times: needs one dimension, got shape \(1, 2\)"),
            ("items", [np.nan, 1.0], TypeError, r"tail\.items: .*integer ids, got float64"),
            ("items", ["a", "b"], TypeError, r"tail\.items: .*integer ids, got <U1"),
            ("items", [0], ValueError, r"tail\.times: 2 values for 1 items"),
            ("actions", [0.0, np.nan], TypeError, r"tail\.actions: needs integers, got float64"),
            ("actions", [0, 2], ValueError, r"tail\.actions: codes must lie in \[0, 2\), got 0 to 2"),
            ("actions", [-1, 0], ValueError, r"tail\.actions: codes must lie in \[0, 2\), got -1 to 0"),
            ("actions", [0], ValueError, r"tail\.actions: 1 values for 2 items"),
            ("offsets", [0, 1], ValueError, r"tail\.offsets: must rise from 0 to 2 in 3 values, got \[0, 1\]"),
            ("offsets", [0, 2, 1], ValueError, r"tail\.offsets: must rise from 0 to 2"),
            ("offsets", [0, 3, 2], ValueError, r"tail\.offsets: must rise from 0 to 2"),
            ("offsets", [0.0, 1.0, 2.0], TypeError, r"tail\.offsets: needs integers"),
        ],
    )
    def test_a_bad_tail_names_its_part(
        self, scorer: Scorer, part: str, value: Any, error: type[Exception], message: str
    ) -> None:
        good = tail_of([(100, [(10, START, 0)]), (103, [(20, START, 1)])])
        assert scorer.score([100, 103], ITEMS, tail=good).shape == (2, 6)
        with pytest.raises(error, match=message):
            scorer.score([100, 103], ITEMS, tail=dataclasses.replace(good, **{part: np.array(value)}))

    def test_what_is_no_tail(self, scorer: Scorer) -> None:
        with pytest.raises(TypeError, match=r"tail: needs a Tail\(items, times, actions, offsets\), got a dict"):
            scorer.score([100], ITEMS, tail={"items": []})  # type: ignore[arg-type]


def _rows(log: EventLog, row: int, first: int) -> list[tuple[int, int, int]]:
    events = log.slice(row, first)
    return list(
        zip(log.items.ids(events.item).tolist(), events.timestamp.tolist(), events.action.tolist(), strict=True)
    )


class TestRanking:
    def test_best_of_the_catalogue(self, scorer: Scorer, served: Served) -> None:
        everything = served.log.items.ids(np.arange(served.log.num_items))
        scores = scorer.score([103], everything)[0]
        order = np.argsort(-scores, kind="stable")
        ranking = scorer.rank(103, top_k=7)
        assert ranking.items.tolist() == everything[order[:7]].tolist() and ranking.num_dropped == 0
        np.testing.assert_allclose(ranking.scores, scores[order[:7]], atol=2e-5)
        assert len(scorer.rank(103, top_k=1000).items) == len(everything)
        best = ranking.items[:2].tolist()
        for excluded in (best, np.array(best), torch.tensor(best), [*best, 12345]):
            assert scorer.rank(103, top_k=5, exclude=excluded).items.tolist() == ranking.items[2:].tolist()
        tail = set(served.log.items.ids(served.log[108].item[-6:]).tolist())
        without = scorer.rank(108, top_k=1000, exclude_tail=True).items.tolist()
        assert set(everything.tolist()) - set(without) == tail
        new = tail_of([(108, [(everything[5], START + 900 * DAY, 0)])])
        assert everything[5] not in scorer.rank(108, top_k=1000, exclude_tail=True, tail=new).items

    def test_best_of_candidates(self, scorer: Scorer) -> None:
        scores = scorer.score([103], ITEMS)[0]
        expected = [ITEMS[i] for i in np.argsort(-scores)]
        for candidates in (ITEMS, np.array(ITEMS * 2), torch.tensor(ITEMS), scorer.encode(ITEMS)):
            assert scorer.rank(103, candidates=candidates).items.tolist() == expected
        assert scorer.rank(103, candidates=[], top_k=3).items.tolist() == []
        assert scorer.rank(103, candidates=[10], exclude=[10]).items.tolist() == []

    def test_scores_that_are_not_finite_are_left_out_and_counted(self, served: Served) -> None:
        model = Recommender.from_pretrained(served.model_dir)
        with Scorer.open(model, served.store) as scorer:
            scorer._vectors[[3, 9]] = torch.tensor([[np.nan], [np.inf]], dtype=torch.float32)
            ranking = scorer.rank(103, top_k=1000)
            assert ranking.num_dropped == 2 and len(ranking.items) == len(model.items) - 2
            assert not set(ranking.items.tolist()) & set(model.items.ids([2, 8]).tolist())
            assert np.isfinite(ranking.scores).all()

    def test_rankings_by_task(self, task_scorer: Scorer) -> None:
        user = next(task_scorer.store.keys())
        everything, _ = task_scorer.item_vectors()
        scores = task_scorer.predict([user], everything)["click"][0]
        ranking = task_scorer.rank(user, top_k=3)
        np.testing.assert_allclose(ranking.scores, np.sort(scores)[::-1][:3], atol=2e-5)
        assert scores[np.flatnonzero(everything == ranking.items[0])[0]] == pytest.approx(scores.max(), abs=2e-5)

    def test_top_k_must_be_positive(self, scorer: Scorer) -> None:
        with pytest.raises(ValueError, match="top_k: must be at least 1, got 0"):
            scorer.rank(103, top_k=0)


class TestBadRequests:
    @pytest.mark.parametrize(
        ("users", "candidates", "now", "error", "message"),
        [
            (103, ITEMS, None, TypeError, "users: needs a list or an array of ids, got 103"),
            ("abc", ITEMS, None, TypeError, "users: needs a list or an array of ids, got 'abc'"),
            (["abc"], ITEMS, None, UserKeyError, "user 'abc': the store's user ids are of type int"),
            ([1.5], ITEMS, None, UserKeyError, "user id 1.5 is a float"),
            ([100], 10, None, ValueError, r"candidates: needs \[C\] or \[B, C\], got shape \(\)"),
            ([100], [[[10]]], None, ValueError, r"candidates: needs \[C\] or \[B, C\], got shape \(1, 1, 1\)"),
            ([100], [[10], [20]], None, ValueError, r"candidates: \(2, 1\) do not fit 1 users"),
            ([100, 103], [[10], [20, 30]], None, ValueError, "candidates: rows of different lengths"),
            ([100], ["a"], None, TypeError, "integer ids, got <U1 .*'a'"),
            ([100], [1.0], None, TypeError, "integer ids, got float64"),
            ([100], (ITEMS, [0, 3]), None, ValueError, r"candidates: offsets must rise from 0 to 6, got 0 … 3"),
            ([100], (ITEMS, [0.0, 6.0]), None, ValueError, r"candidates: ragged .* need integer offsets \[2\]"),
            ([100], ([[1], [2]], [0, 2]), None, ValueError, r"candidates: ragged values \[N\] need .*\(2, 1\)"),
            ([100, 103], (ITEMS, [0, 6]), None, ValueError, r"need integer offsets \[3\], got shape \(6,\)"),
            ([100], ITEMS, 1.5e12, TypeError, "now: needs integer milliseconds, got float64"),
            ([100], ITEMS, "2024-01-01", TypeError, "now: needs integer milliseconds, got <U10"),
            ([100, 103], ITEMS, [START] * 3, ValueError, r"now: needs one time, or one of each of 2 users, .*\(3,\)"),
        ],
    )
    def test_the_argument_is_named(
        self, scorer: Scorer, users: Any, candidates: Any, now: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            scorer.score(users, candidates, now=now)
        assert scorer.score([100], [10]).shape == (1, 1)

    def test_a_closed_scorer_says_so(self, served: Served) -> None:
        scorer = Scorer.open(served.model, served.store)
        scorer.close()
        scorer.close()
        for call in (lambda: scorer.score([100], ITEMS), lambda: scorer.rank(100), scorer.reload):
            with pytest.raises(StoreError, match=f"{served.store} is closed; open the store again"):
                call()

    def test_a_store_of_another_model_is_refused_by_both_names(self, served: Served, tail_only: Recommender) -> None:
        ids = (served.model.summarizer_id().hex(), tail_only.summarizer_id().hex())
        with pytest.raises(SummarizerMismatchError, match=f"summarizer {ids[0]}, but the model's is {ids[1]}"):
            Scorer.open(tail_only, served.store)

    def test_a_store_with_shorter_tails_is_refused(self, served: Served, tmp_path: Path) -> None:
        config = dataclasses.replace(served.model.config, tail_len=3)
        short = Recommender(config, served.model.schema, served.model.items, served.model.data).eval()
        weights = {k: v for k, v in served.model.state_dict().items() if not k.startswith("target_attention")}
        short.load_state_dict(weights, strict=False)
        assert short.summarizer_id() == served.model.summarizer_id()
        refresh(short, served.log, tmp_path / "store")
        with pytest.raises(StoreError, match=r"store holds tails of 3 events, the model reads 6; refresh it"):
            Scorer.open(served.model, tmp_path / "store")
        # A model that reads less of each tail may share the store of one that reads more.
        with Scorer.open(short, served.store) as scorer, Scorer.open(short, tmp_path / "store") as own:
            np.testing.assert_allclose(scorer.score(USERS, ITEMS), own.score(USERS, ITEMS), atol=2e-5)
        refresh(served.model, served.log, tmp_path / "store")
        with Scorer.open(served.model, tmp_path / "store") as scorer:
            refresh(short, served.log, tmp_path / "store")
            with pytest.raises(StoreError, match="tails of 3 events"):
                scorer.reload()

    def test_stores_and_models_that_are_none(self, served: Served, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        (tmp_path / "file").write_text("hello")
        for place in ("absent", "empty", "file"):
            with pytest.raises(StoreError, match=place):
                Scorer.open(served.model, tmp_path / place)
            with pytest.raises(CheckpointError, match=rf"{place}: no readable model .*vista train"):
                Scorer.open(tmp_path / place, served.store)
        with pytest.raises(ConfigError, match="device=cuda:99: torch cannot use it here"):
            Scorer.open(served.model_dir, served.store, device="cuda:99")

    def test_a_truncated_store_is_refused(self, served: Served, tmp_path: Path) -> None:
        refresh(served.model, served.log, tmp_path / "store")
        (path,) = (tmp_path / "store").rglob("data.mdb")
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        with pytest.raises(StoreError, match=r"data\.mdb"):
            Scorer.open(served.model, tmp_path / "store")

    def test_a_model_without_retrieval_head(self, impression_log: EventLog, tmp_path: Path) -> None:
        config = small_config(impression_log, tmp_path / "run", optim__next_weight=0.0, optim__epochs=1)
        model = train(config, impression_log)
        refresh(model, impression_log, tmp_path / "store")
        with Scorer.open(model, tmp_path / "store") as scorer:
            assert scorer.tasks == ["click", "like", "long_view"] and scorer.task == "click"
            user = next(scorer.store.keys())
            assert list(scorer.predict([user], scorer.model.items.ids([0]))) == scorer.tasks
            with pytest.raises(ValueError, match=r"no retrieval head; train it with optim\.next_weight above 0"):
                scorer.user_vectors([user])


def test_encoded_candidates_are_rows_of_the_model(scorer: Scorer) -> None:
    encoded = scorer.encode(np.array([[0, 390], [7, 10]]))
    assert isinstance(encoded, CandidateSet) and scorer.encode(encoded) is encoded
    assert encoded.rows.tolist() == [[1, 40], [0, 2]]


def test_string_ids(order_log: EventLog, tmp_path: Path) -> None:
    config = small_config(order_log, tmp_path / "run", optim__epochs=1)
    model = train(config, order_log)
    refresh(model, order_log, tmp_path / "store")
    with Scorer.open(tmp_path / "run" / "best", tmp_path / "store", on_missing="nan") as scorer:
        found = scorer.score(["u100", "u999"], [["i0", "i10"], ["i0", "i20"]])
        assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
        assert (
            scorer.rank("u103", top_k=3, exclude=["i0"]).items.tolist()
            == [item for item in scorer.rank("u103", top_k=4).items.tolist() if item != "i0"][:3]
        )
        tail = Tail(np.array(["i0", "i70"]), np.array([90, 91]), np.zeros(2, np.uint8), np.array([0, 2]))
        assert np.abs(scorer.score(["u100"], ["i0"], tail=tail) - found[0, 0]).max() > 1e-4
        with pytest.raises(UserKeyError, match="user 100: the store's user ids are of type str"):
            scorer.score([100], ["i0"])


LIGHT = """
import json, sys
from vista.scorer import Scorer, Tail
import numpy as np
with Scorer.open(sys.argv[1], sys.argv[2]) as scorer:
    tail = Tail(np.array([10]), np.array([1_700_000_000_000]), np.array([0], np.uint8), np.array([0, 1]))
    scores = scorer.score([103], [0, 390, 10], tail=tail, now=1_700_000_000_000)
    items = scorer.rank(103, top_k=2).items.tolist()
print(json.dumps({"modules": sorted(sys.modules), "scores": scores.tolist(), "items": items}))
"""


def test_serving_in_a_fresh_process_loads_no_training_library(served: Served, scorer: Scorer) -> None:
    import json

    done = run_python(LIGHT, str(served.model_dir), str(served.store))
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    tops = {name.partition(".")[0] for name in report["modules"]}
    assert not tops & {"hydra", "omegaconf", "polars", "triton", "matplotlib", "pandas", "pyarrow", "sklearn"}
    assert report["items"] == scorer.rank(103, top_k=2).items.tolist()


class TestCommand:
    def settings(self, served: Served, **changes: Any) -> ScoreConfig:
        return ScoreConfig(model=str(served.model_dir), store=str(served.store), **changes)

    def test_scores_and_rankings_as_text(self, served: Served, scorer: Scorer) -> None:
        lines = score_from_config(self.settings(served, users=["103", "100"], candidates=["0", "390"])).splitlines()
        scores = scorer.score([103, 100], [0, 390])
        assert lines[0] == "task next, generation 1"
        assert lines[1] == f"user 103: 0 {scores[0, 0]:.4f}, 390 {scores[0, 1]:.4f}" and len(lines) == 3
        best = scorer.rank(103, top_k=2).items.tolist()
        words = score_from_config(self.settings(served, users=["103"], top_k=2)).splitlines()[1].split()
        assert [words[2], words[4]] == [str(item) for item in best]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({}, r"users: name at least one"),
            ({"users": ["nobody"]}, r"users: ids are integers here, got nobody"),
            ({"users": ["100"], "candidates": ["x"]}, r"candidates: ids are integers here, got x"),
        ],
    )
    def test_bad_ids_end_in_a_line(self, served: Served, changes: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            score_from_config(self.settings(served, **changes))

    def test_unknown_user_by_policy(self, served: Served) -> None:
        with pytest.raises(UnknownUserError, match=r"users \[999\] have no record"):
            score_from_config(self.settings(served, users=["999"], on_missing=OnMissing.error))
        assert score_from_config(self.settings(served, users=["999"], top_k=1)).count("user 999: ") == 1
