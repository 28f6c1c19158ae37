"""Bad requests to a scorer.

Each gives a typed error that names the argument, or the result of the policy, and never changes the scores of the other
users of the batch.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import DAY, ITEMS, ROUNDING, START, USERS, Served, tail_of
from vista.cli.serving_commands import run_score
from vista.config import ScoreConfig
from vista.config.checks import OnMissing
from vista.errors import RecordError, UserKeyError
from vista.scorer import Scorer, Tail
from vista.store.folder_files import open_environment
from vista.store.keys import user_keys
from vista.store.layout import environment_path

pytestmark = pytest.mark.usefixtures("no_warnings")
"""Tolerance for scores in different batches."""
Call = Callable[[Scorer], object]


def good_tail(**changes: Any) -> Tail:
    parts: dict[str, Any] = {"items": [10, 20], "times": [START, START + 1], "actions": [0, 1], "offsets": [0, 2]}
    return Tail(**(parts | changes))


@pytest.mark.parametrize(
    "users",
    [
        *([True], [None], [100, "a"], [np.nan], [2**63], [[100], [103]], np.array([[100]]), np.array(100)),
        *(torch.tensor([100.0]), np.array(["2024-01-01"], "datetime64[D]")),
    ],
    ids=repr,
)
def test_users(scorer: Scorer, users: Any) -> None:
    calls = [scorer.score, scorer.predict, lambda users, _: scorer.user_vectors(users)]
    calls += [lambda users, _: scorer.rank(users[0])] if isinstance(users, list) and len(users) == 1 else []
    for call in calls:
        with pytest.raises(UserKeyError, match="user"):
            call(users, ITEMS)


@pytest.mark.parametrize("users", [None, 100, "100", {100: 1}, map(int, "1")], ids=lambda users: type(users).__name__)
def test_users_that_are_not_a_list(scorer: Scorer, users: Any) -> None:
    for call in (scorer.score, scorer.predict, lambda users, _: scorer.user_vectors(users)):
        with pytest.raises(TypeError, match="users: must be a list or an array of ids"):
            call(users, ITEMS)


@pytest.mark.parametrize("items", [None, 10, "10", {10}, {10: 1}, torch.tensor(10)], ids=repr)
def test_candidates_that_are_not_a_list(scorer: Scorer, items: Any) -> None:
    calls: list[Call] = [lambda s: s.score([100], items), lambda s: s.encode(items)]
    calls += [] if items is None else [lambda s: s.rank(100, candidates=items)]
    for call in calls:
        with pytest.raises((TypeError, ValueError), match="candidates: must be of shape"):
            call(scorer)


@pytest.mark.parametrize(
    "items", [["a"], [True], [None], [10, "a"], [1.5], [np.nan], [2**64], np.array([2**63], np.uint64)], ids=repr
)
def test_items_of_another_type_are_refused(scorer: Scorer, items: Any) -> None:
    calls: dict[str, Call] = {
        "candidates": lambda s: s.score([100], items),
        "candidates: ": lambda s: s.rank(100, candidates=items),
        "exclude": lambda s: s.rank(100, exclude=items),
    }
    if len(items) == 1:
        one = good_tail(items=items, times=[START], actions=[0], offsets=[0, 1])
        calls["tail"] = lambda s: s.score([100], ITEMS, tail=one)
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"(?s){name}.*(int64|integer ids)"):
            call(scorer)


def test_rank_refuses_several_lists(scorer: Scorer) -> None:
    for candidates in (([10, 20], [0, 2]), [[10, 20], [30, 40]]):
        with pytest.raises(ValueError, match=r"candidates: must be of shape \[C\]"):
            scorer.rank(100, candidates=candidates)


@pytest.mark.parametrize(("top_k", "error"), [(1.5, TypeError), (None, TypeError), (0, ValueError)], ids=repr)
def test_top_k(scorer: Scorer, top_k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="top_k: "):
        scorer.rank(100, top_k=top_k)


@pytest.mark.parametrize(
    ("now", "error", "message"),
    [
        (True, TypeError, "now: must hold integer milliseconds, got bool"),
        (np.nan, TypeError, "now: must hold integer milliseconds, got float64"),
        (datetime.datetime(2024, 1, 1), TypeError, "now: must hold integer milliseconds, got object"),
        (2**63, ValueError, "now: 9223372036854775808 does not fit int64"),
        ([[START]], ValueError, r"now: must be one time, .*got shape \(1, 1\)"),
        ([[1], [2, 3]], ValueError, "now: the rows differ in length"),
        ([START] * 3, ValueError, r"now: must be one time, or one for each of 1 users, .*\(3,\)"),
        ("2024-01-01", TypeError, "now: must hold integer milliseconds, got <U10"),
    ],
    ids=repr,
)
def test_now(scorer: Scorer, now: Any, error: type[Exception], message: str) -> None:
    for call in (scorer.score, lambda users, _, now: scorer.user_vectors(users, now=now)):
        with pytest.raises(error, match=message):
            call([100], ITEMS, now=now)


def test_empty_requests(task_scorer: Scorer) -> None:
    user = next(task_scorer.store.keys())
    empty = np.zeros(0, np.int64)
    for candidates in ([], empty, torch.zeros(0, dtype=torch.int64), task_scorer.encode([]), range(0)):
        assert all(s.shape == (2, 0) for s in task_scorer.predict([user] * 2, candidates).values())
        assert all(s.shape == (0, 0) for s in task_scorer.predict([], candidates).values())
        ranking = task_scorer.rank(user, candidates=candidates)
        assert (len(ranking.items), len(ranking.scores), ranking.num_dropped) == (0, 0, 0)
    assert all(s.shape == (0,) for s in task_scorer.predict([user] * 2, (empty, [0, 0, 0])).values())
    assert all(s.shape == (0,) for s in task_scorer.predict([], (empty, [0])).values())
    assert task_scorer.score([], [], tail=Tail.empty(0), now=[]).shape == (0, 0)
    assert task_scorer.user_vectors([]).shape == (0, task_scorer.model.retrieval_dim)


def test_one_long_list_does_not_slow_down_the_others(task_scorer: Scorer) -> None:
    user, items = next(task_scorer.store.keys()), task_scorer.model.items.ids(np.arange(7))
    many = np.resize(items, 5_000)
    ragged = (np.concatenate([many, np.resize(items, 31)]), np.array([0, *range(5_000, 5_032)]))

    def seconds(call: Callable[[], object]) -> float:
        began = time.process_time()
        call()
        return time.process_time() - began

    alone = min(seconds(lambda: task_scorer.score([user], many)) for _ in range(3))
    assert seconds(lambda: task_scorer.score([user] * 32, ragged)) < 6 * alone


def test_a_tail_of_the_largest_size(scorer: Scorer) -> None:
    """Only the newest events count, and the tails of the other users do not change."""
    count = 1 << 20  # the most that a call may pass
    items, times = np.resize(np.arange(0, 400, 10), count), START + 900 * DAY + np.arange(count)
    offsets = np.array([0, 0, count, count])
    scores = scorer.score([100, 103, 108], ITEMS, tail=Tail(items, times, np.zeros(count, np.uint8), offsets))
    newest = Tail(items[-6:], times[-6:], np.zeros(6, np.uint8), np.array([0, 6]))
    np.testing.assert_allclose(scores[1], scorer.score([103], ITEMS, tail=newest)[0], atol=ROUNDING)
    np.testing.assert_allclose(scores[[0, 2]], scorer.score([100, 108], ITEMS), atol=ROUNDING)


def test_each_row_has_its_own_tail_and_time(scorer: Scorer) -> None:
    events = [
        (103, [(10, START + 900 * DAY, 1)]),
        (103, []),
        (999, []),
        (103, [(390, START + 901 * DAY, 0)]),
        (999, []),
    ]
    users, now = [user for user, _ in events], START + 950 * DAY + DAY * np.arange(5)
    scores = scorer.score(users, ITEMS, tail=tail_of(events), now=now)
    for place, (user, rows) in enumerate(events):
        alone = scorer.score([user], ITEMS, tail=tail_of([(user, rows)]), now=now[place])[0]
        np.testing.assert_allclose(scores[place], alone, atol=ROUNDING)
    assert np.abs(scores[0] - scores[1]).max() > 1e-3 and np.abs(scores[0] - scores[3]).max() > 1e-3


def test_more_users_than_one_transaction_reads(scorer: Scorer) -> None:
    expected = scorer.score([103, 999], ITEMS)
    np.testing.assert_allclose(scorer.score([103, 999] * 800, ITEMS), np.tile(expected, (800, 1)), atol=ROUNDING)


LATE = START + 900 * DAY
ODD_USERS: dict[str, tuple[int, list[int], list[tuple[int, int, int]]]] = {
    "no record": (999, ITEMS, []),
    "no record, but events": (-5, ITEMS, [(10, LATE, 0)]),
    "only unknown candidates": (103, [7, -1, 2**62], []),
    "no candidates": (103, [], []),
    "unknown items in the tail": (103, ITEMS, [(7, LATE, 0), (-1, LATE, 1), (2**62, LATE, 0)]),
    "many events at one time": (103, ITEMS, [(10 * (i % 40), LATE, i % 2) for i in range(5_000)]),
    "events before all others": (103, ITEMS, [(10, START - DAY, 0)] * 100),
    "events in the far future": (103, ITEMS, [(10, 4_000_000_000_000, 0)]),
}


@pytest.mark.parametrize("what", ODD_USERS)
def test_have_the_same_scores_without_the_odd_user(served: Served, what: str) -> None:
    odd_user, odd_items, odd_events = ODD_USERS[what]
    with Scorer.open(served.model, served.store, on_missing="nan") as scorer:
        now = LATE + DAY
        healthy = scorer.score(USERS, ITEMS, now=now)
        for place in (0, 2, len(USERS)):
            users, lists, events = list(USERS), [ITEMS] * len(USERS), [(user, []) for user in USERS]
            users.insert(place, odd_user)
            lists.insert(place, odd_items)
            tails: Any = [*events[:place], (odd_user, odd_events), *events[place:]]
            offsets = np.concatenate([[0], np.cumsum([len(items) for items in lists])])
            values = np.array([item for items in lists for item in items], np.int64)
            scores = scorer.score(users, (values, offsets), tail=tail_of(tails), now=now)
            rows = np.split(scores, offsets[1:-1])
            odd = rows.pop(place)
            np.testing.assert_allclose(np.stack(rows), healthy, atol=ROUNDING)
            missing = "no record" in what or "candidates" in what
            assert len(odd) == len(odd_items) and (np.isnan(odd) if missing else np.isfinite(odd)).all()
            vectors = scorer.user_vectors(users, tail=tail_of(tails), now=now)
            np.testing.assert_allclose(np.delete(vectors, place, 0), scorer.user_vectors(USERS, now=now), atol=ROUNDING)


@pytest.mark.parametrize("what", ["tail in seconds", "tail of no action", "now in seconds", "damaged record"])
def test_an_invalid_user_gets_nan_with_that_policy_and_fails_the_call_with_others(
    served: Served, tmp_path: Path, what: str
) -> None:
    shutil.copytree(served.store, tmp_path / "store")
    events: Any = [(user, []) for user in USERS]
    now: Any = np.full(len(USERS), LATE + DAY)
    error: type[Exception] = ValueError
    if what == "tail in seconds":
        events[1] = (USERS[1], [(10, LATE // 1000, 0)])
    elif what == "tail of no action":
        events[1] = (USERS[1], [(10, LATE, 7)])
    elif what == "now in seconds":
        now[1] //= 1000
    else:
        error = RecordError
        damage_record(tmp_path / "store", USERS[1])
        command = ScoreConfig(model=str(served.model_dir), store=str(tmp_path / "store"), users=[str(USERS[1])])
        with pytest.raises(RecordError):
            run_score(command)
        command.on_missing = OnMissing.nan
        assert f"user {USERS[1]} (damaged record; now " in run_score(command)
    with Scorer.open(served.model, served.store) as intact:
        expected = intact.score(USERS, ITEMS, now=LATE + DAY)
    with Scorer.open(served.model, tmp_path / "store", on_missing="nan") as scorer:
        scores = scorer.score(USERS, ITEMS, tail=tail_of(events), now=now)
        assert (
            np.isnan(scores[1]).all() and np.isnan(scorer.user_vectors(USERS, tail=tail_of(events), now=now)[1]).all()
        )
        np.testing.assert_array_equal(np.delete(scores, 1, 0), np.delete(expected, 1, 0))
        stats, num_damaged = scorer.stats(), 2 * (what == "damaged record")
        assert (stats.bad_users, stats.damaged, stats.failed_calls) == (2, num_damaged, 0)
        assert (stats.hits, stats.misses) == (2 * len(USERS) - num_damaged, 0)
    for policy in ("empty", "raise"):
        with Scorer.open(served.model, tmp_path / "store", on_missing=policy) as scorer:
            with pytest.raises(error):
                scorer.score(USERS, ITEMS, tail=tail_of(events), now=now)
            assert scorer.stats().damaged == (what == "damaged record")


def test_times_are_checked_per_user(scorer: Scorer) -> None:
    """Any time is possible for a user without a record, whether or not another user is in the call."""
    early = (999, [(10, LATE // 1000, 0)])
    alone = scorer.score([999], ITEMS, tail=tail_of([early]))
    both = scorer.score([999, 100], ITEMS, tail=tail_of([early, (100, [])]))
    np.testing.assert_allclose(both[0], alone[0], atol=ROUNDING)


def damage_record(store: Path, user: int) -> None:
    """Flip a bit of a user's summary in the published generation."""
    environment = open_environment(environment_path(store, 1), readonly=False)
    with environment.begin(write=True) as transaction:
        record = bytearray(transaction.get(user_keys([user])[0]) or b"")
        record[-40] ^= 1
        transaction.put(user_keys([user])[0], bytes(record))
    environment.close()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.score(range((1 << 24) + 1), ITEMS), "users: 16,777,217 ids, but at most 16,777,216 per call"),
        (lambda s: s.score([100], range((1 << 24) + 1)), "candidates: 16,777,217 ids, but at most"),
        (lambda s: s.encode(np.broadcast_to(np.int64(10), (1 << 13, 1 << 12))), "candidates: 33,554,432 ids, but at"),
        (lambda s: s.rank(100, exclude=range(1 << 25)), "exclude: 33,554,432 ids, but at most"),
        (
            lambda s: s.score([100] * 1025, np.broadcast_to(np.int64(10), 1 << 18)),
            "candidates: 268,697,600 pairs of a user and a candidate, but at most 268,435,456 per call",
        ),
        (
            lambda s: s.score([100], ITEMS, tail=good_tail(items=range((1 << 20) + 1), times=range((1 << 20) + 1))),
            "tail.items: 1,048,577 events, but at most 1,048,576 per call; make several calls",
        ),
    ],
)
def test_refusals(scorer: Scorer, call: Call, message: str) -> None:
    scorer.score([100], ITEMS)
    began = time.process_time()
    with pytest.raises(ValueError, match=message):
        call(scorer)
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("users", "candidates", "error", "message"),
    [
        (["abc"], ITEMS, UserKeyError, "user 'abc': the user ids of the store are of type int"),
        ([100], [[[10]]], ValueError, r"candidates: must be of shape \[C\] or \[B, C\], got \(1, 1, 1\)"),
        ([100], [[10], [20]], ValueError, r"candidates: shape \(2, 1\) does not match 1 users"),
        ([100, 103], [[10], [20, 30]], ValueError, "candidates: the rows differ in length"),
        ([100], ["a"], TypeError, "integer ids, got str 'a'"),
        ([100], (ITEMS, [0, 3]), ValueError, r"candidates: offsets must rise from 0 to 6, got 0 to 3"),
        ([100], (ITEMS, [0.0, 6.0]), ValueError, r"candidates: must be values \[N\] and integer offsets \[2\]"),
        ([100], ([[1], [2]], [0, 2]), ValueError, r"candidates: must be values \[N\] and .*\(2, 1\)"),
        ([100, 103], (ITEMS, [0, 6]), ValueError, r"integer offsets \[3\], got values of shape \(6,\)"),
    ],
)
def test_the_argument_is_named(
    scorer: Scorer, users: Any, candidates: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        scorer.score(users, candidates)
    assert scorer.score([100], [10]).shape == (1, 1)
