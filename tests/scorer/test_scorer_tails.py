"""Tails that callers pass, which act like a refresh and merge with the stored ones; and the command `vista score`."""

from __future__ import annotations

import dataclasses
import re
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import DAY, ITEMS, START, Served, small_frame, tail_of, untrained
from vista.arrays import Int
from vista.cli.item_commands import run_index
from vista.cli.serving_commands import run_score
from vista.config import IndexConfig, ScoreConfig
from vista.config.checks import OnMissing
from vista.errors import ConfigError, ItemIndexError, UnknownUserError
from vista.log.event_log import EventLog
from vista.log.inspection import ItemNames
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer, Tail
from vista.scorer.request import NOW, checked_tail, merge_tails

pytestmark = pytest.mark.usefixtures("no_warnings")


@pytest.fixture(scope="module")
def tail_only(event_log: EventLog) -> VistaModel:
    """A model without summary tokens, whose scores depend on the tail alone."""
    return untrained(event_log, model__num_seeds=0)


def _rows(log: EventLog, row: int, first: int) -> list[tuple[int, int, int]]:
    events = log.slice(row, first)
    return list(
        zip(log.items.ids(events.item).tolist(), events.timestamp.tolist(), events.action.tolist(), strict=True)
    )


@pytest.mark.parametrize("until", ["leave-last-out", "leave-last-two-out", "long ago"])
def test_a_fresh_tail_equals_a_refreshed_one(
    event_log: EventLog, tail_only: VistaModel, tmp_path: Path, until: str
) -> None:
    before = START + DAY if until == "long ago" else until
    refresh(tail_only, event_log, tmp_path / "now")
    refresh(tail_only, event_log, tmp_path / "old", until=before)
    users = event_log.users.ids(np.arange(event_log.num_users)).tolist()
    now = START + 500 * DAY
    with Scorer.open(tail_only, tmp_path / "now") as refreshed, Scorer.open(tail_only, tmp_path / "old") as stale:
        expected = refreshed.score(users, ITEMS, now=now)
        assert np.abs(stale.score(users, ITEMS, now=now) - expected).max() > 0.1
        # The events since the refresh, the whole tail, and the whole history give the same scores.
        counts = stale.store.get_many(users).event_count
        newest = np.maximum(event_log.lengths - 6, 0)
        for first in (counts, newest, np.zeros_like(counts)):
            fresh = event_log.gather_ranges(np.arange(len(users)), first, event_log.lengths)
            ids = event_log.items.ids(fresh.item)
            tail = Tail(ids, fresh.timestamp, fresh.action, fresh.offsets)
            np.testing.assert_allclose(stale.score(users, ITEMS, now=now, tail=tail), expected, atol=1e-5)
        ranking = stale.rank(users[4], tail=tail_of([(users[4], _rows(event_log, 4, int(counts[4])))]), now=now)
        assert ranking.items.tolist() == refreshed.rank(users[4], now=now).items.tolist()


def test_events_that_are_stored_already_count_once(scorer: Scorer, event_log: EventLog) -> None:
    expected = scorer.score([104], ITEMS)
    stored = _rows(event_log, 4, 34)
    assert len(stored) == 6
    np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored)])), expected)
    np.testing.assert_array_equal(scorer.score([104], ITEMS, tail=tail_of([(104, stored[::-1] * 2)])), expected)
    # Another action at the same time is another event.
    item, time, action = stored[-1]
    other = scorer.score([104], ITEMS, tail=tail_of([(104, [(item, time, 1 - action)])]))
    assert np.abs(other - expected).max() > 1e-3


def test_an_event_with_an_unknown_item_counts(scorer: Scorer) -> None:
    scores = scorer.score([100], ITEMS, tail=tail_of([(100, [(777, START + 900 * DAY, 0)])]))
    assert np.isfinite(scores).all() and np.abs(scores - scorer.score([100], ITEMS)).max() > 1e-3


def test_actions_by_name(scorer: Scorer) -> None:
    """They are encoded with the model that scores."""
    events = [(10, START + 900 * DAY, 1), (20, START + 901 * DAY, 0)]
    codes = tail_of([(100, events), (103, events[:1])])
    actions = scorer.model.schema.actions
    for names in ([actions[code] for code in codes.actions], np.array(actions)[codes.actions]):
        named = dataclasses.replace(codes, actions=names)  # type: ignore[arg-type]
        np.testing.assert_array_equal(
            scorer.score([100, 103], ITEMS, tail=named), scorer.score([100, 103], ITEMS, tail=codes)
        )
    for wrong in ("buy", None):
        tail: Any = dataclasses.replace(codes, actions=[*actions, wrong])
        with pytest.raises(ValueError, match=rf"tail\.actions: {wrong!r} is not one of .*\['click', 'like'\]"):
            scorer.score([100, 103], ITEMS, tail=tail)


def test_the_only_action_needs_no_name(tmp_path: Path) -> None:
    frame = {key: values for key, values in small_frame().items() if key not in ("action", "rating")}
    log = EventLog.from_frame(frame, tmp_path / "log", time_unit="ms")
    refresh(model := untrained(log), log, tmp_path / "store")
    events = tail_of([(100, [(10, START + 900 * DAY, 0)])])
    with Scorer.open(model, tmp_path / "store") as scorer:
        expected = scorer.score([100], ITEMS, tail=events)
        for actions in ([None], scorer.model.schema.actions[:1]):
            named: Any = dataclasses.replace(events, actions=actions)
            np.testing.assert_array_equal(scorer.score([100], ITEMS, tail=named), expected)


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("times", [1.0, 2.0], TypeError, r"tail\.times: must hold integer milliseconds, got float64"),
        ("times", [1], ValueError, r"tail\.times: holds 1 values for 2 items"),
        ("times", [[1, 2]], ValueError, r"tail\.times: must be one-dimensional, got shape \(1, 2\)"),
        ("items", ["a", "b"], TypeError, r"tail\.items: .*integer ids, got <U1"),
        ("items", [0], ValueError, r"tail\.times: holds 2 values for 1 items"),
        ("actions", [0.0, np.nan], TypeError, r"tail\.actions: must hold integers, got float64"),
        ("actions", [0, 2], ValueError, r"tail\.actions: codes must lie in \[0, 2\), got 2"),
        ("actions", [0], ValueError, r"tail\.actions: holds 1 values for 2 items"),
        (
            "offsets",
            [0, 1],
            ValueError,
            r"tail\.offsets: must be 3 values that rise from 0 to 2, got 2 values that start with \[0, 1\]",
        ),
        ("offsets", [0, 3, 2], ValueError, r"tail\.offsets: must be 3 values that rise from 0 to 2"),
        ("offsets", [0.0, 1.0, 2.0], TypeError, r"tail\.offsets: must hold integers"),
    ],
)
def test_a_bad_tail_names_its_part(scorer: Scorer, part: str, value: Any, error: type[Exception], message: str) -> None:
    good = tail_of([(100, [(10, START, 0)]), (103, [(20, START, 1)])])
    assert scorer.score([100, 103], ITEMS, tail=good).shape == (2, 6)
    with pytest.raises(error, match=message):
        scorer.score([100, 103], ITEMS, tail=dataclasses.replace(good, **{part: np.array(value)}))


def test_times_that_are_not_in_milliseconds(scorer: Scorer) -> None:
    """Seconds would mean a time in 1970, and so events before the stored tail."""
    for time in (START // 1000, -5, 5_000_000_000_000):
        message = rf"{time} is not a Unix time in milliseconds"
        with pytest.raises(ValueError, match=r"tail\.times: " + message):
            scorer.score([100], ITEMS, tail=tail_of([(100, [(10, time, 0)])]))
        with pytest.raises(ValueError, match="now: " + message):
            scorer.score([100], ITEMS, now=time)


def score_config(served: Served, **changes: Any) -> ScoreConfig:
    return ScoreConfig(model=str(served.model_dir), store=str(served.store), **changes)


def test_scores_and_rankings_as_text(served: Served, scorer: Scorer) -> None:
    lines = run_score(score_config(served, users=["103", "100"], candidates=["0", "390"])).splitlines()
    scores = scorer.score([103, 100], [0, 390], now=NOW)
    assert lines[0] == "task next, generation 1"
    assert scorer.answered_from is not None and scorer.answered_from.now is not None
    came = np.datetime64(int(scorer.answered_from.now[0]) // 60_000, "m")
    assert lines[1] == f"user 103 (now {came}): 0 {scores[0, 0]:.4f}, 390 {scores[0, 1]:.4f}" and len(lines) == 3
    moment = {"now": "2024-05-01T12:00"}
    asked = run_score(score_config(served, users=["103"], candidates=["0"], **moment)).splitlines()
    then = scorer.score([103], [0], now=1_714_564_800_000)[0, 0]
    assert asked[1] == f"user 103: 0 {then:.4f}"
    best = scorer.rank(103, top_k=2, now=NOW).items.tolist()
    words = run_score(score_config(served, users=["103"], top_k=2)).splitlines()[1].split(": ")[1].split()
    assert [words[0], words[2]] == [str(item) for item in best]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, r"users: name at least one"),
        ({"users": ["nobody"]}, r"users: ids must be integers, as in the log, got nobody"),
        ({"users": ["100"], "candidates": ["x"]}, r"candidates: ids must be integers, as in the log, got x"),
        ({"users": ["100"], "candidates": [str(10**20)]}, r"candidates: ids must be integers, .*, got 1000"),
        ({"users": ["100"], "retrieve": True, "candidates": ["0"]}, "candidates: must be empty with retrieve=true"),
        ({"users": ["100"], "index": "items"}, "index: needs retrieve=true"),
        ({"users": ["100"], "item_name": "title"}, "item_name: needs explain=true, or data="),
        ({"users": ["100"], "now": "noon"}, r"time 'noon': write an ISO date or time"),
        ({"users": ["100"], "now": "1706140800"}, r"now: 1706140800 is not a Unix time .* looks like seconds"),
    ],
)
def test_bad_values_end_in_a_one_line_error(served: Served, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run_score(score_config(served, **changes))


def test_candidates_of_an_index(served: Served, tmp_path: Path) -> None:
    model = shutil.copytree(served.model_dir, tmp_path / "best")
    asked = {"model": str(model), "store": str(served.store), "users": ["103", "100"], "top_k": 3}
    with pytest.raises(ItemIndexError, match=r"best\.index"):
        run_score(ScoreConfig(**asked, retrieve=True))
    run_index(IndexConfig(model=str(model)))
    lines = run_score(ScoreConfig(**asked, retrieve=True)).splitlines()
    assert lines == run_score(ScoreConfig(**asked, retrieve=True, index=f"{model}.index")).splitlines()
    with Scorer.open(model, served.store, index=f"{model}.index") as scorer:
        for line, ranking in zip(lines[1:], scorer.retrieve([103, 100], top_k=3, now=NOW), strict=True):
            assert re.findall(r"(\d+) -?\d+\.\d{4}", line) == [str(item) for item in ranking.items]


def test_requests_without_a_time_come_now(served: Served, scorer: Scorer, monkeypatch: pytest.MonkeyPatch) -> None:
    """But at most 30 days after the user's newest event; the other users of a call keep their own times."""
    users = [103, 100, 999]
    newest = scorer.store.get_many(users[:2]).last_event_ts
    of_each = [*(newest + 30 * DAY), int(newest.max()) + 40 * DAY]
    monkeypatch.setattr("vista.scorer.request.time.time_ns", lambda: of_each[2] * 1_000_000)

    def same(now: Any, expected: Any, tail: Tail | None = None) -> None:
        scores = scorer.score(users, ITEMS, now=now, tail=tail)
        np.testing.assert_array_equal(scores, scorer.score(users, ITEMS, now=expected, tail=tail))

    same(NOW, of_each)
    same([NOW, int(newest[1]) + DAY, NOW], [of_each[0], int(newest[1]) + DAY, of_each[2]])
    event = (20, int(newest[0]) + 20 * DAY, 0)
    same(NOW, [min(event[1] + 30 * DAY, of_each[2]), *of_each[1:]], tail_of([(103, [event]), (100, []), (999, [])]))
    monkeypatch.setattr("vista.scorer.request.time.time_ns", lambda: (int(newest[0]) + 5 * DAY) * 1_000_000)
    told = scorer.explain(103, ITEMS, now=NOW)
    np.testing.assert_array_equal(told.value, scorer.explain(103, ITEMS, now=int(newest[0]) + 5 * DAY).value)


def test_unknown_user_by_policy(served: Served) -> None:
    with pytest.raises(UnknownUserError, match=r"users \[999\] have no record"):
        run_score(score_config(served, users=["999"], on_missing=OnMissing.error))
    said = run_score(score_config(served, users=["999"], top_k=1))
    assert "user 999 (no record, so scored like a new user: by the items alone, such as their popularity; now " in said
    said = run_score(score_config(served, users=["999"], candidates=["10"], on_missing=OnMissing.nan))
    assert "user 999 (no record; now " in said


def test_items_are_explained_with_their_names(served: Served, scorer: Scorer, tmp_path: Path) -> None:
    items = {"item": [*range(0, 400, 10)], "label": [f"Film {n}" for n in range(40)]}
    log = EventLog.from_frame(small_frame(), tmp_path / "log", time_unit="ms", items=items)
    named = {"explain": True, "data": str(log.path), "item_name": "label"}
    names = ItemNames.of(log, "label").of_ids
    lines = run_score(score_config(served, users=["103"], top_k=2, **named)).splitlines()
    best = scorer.rank(103, top_k=2, now=NOW)
    told = scorer.explain(103, best.items, now=NOW)
    assert lines[0].startswith("task next, generation 1; what raises the score above ") and lines[1].startswith(
        "user 103 (now "
    )
    for place, line in enumerate(lines[2:]):
        assert line == f"  {names(best.items)[place]} {best.scores[place]:.4f}: {told.why(place, names)}"
    assert len(lines) == 4 and names(best.items)[0].startswith("Film ")
    chosen = run_score(score_config(served, users=["103"], candidates=["0", "390"], **named)).splitlines()[2:]
    told = scorer.explain(103, [0, 390], candidates=[0, 390], now=NOW)
    assert [line.split(": ", 1)[1] for line in chosen] == [told.why(place, names) for place in (0, 1)]
    alone = run_score(score_config(served, users=["103"], candidates=["0"], explain=True)).splitlines()[2]
    assert alone.endswith(f": {scorer.explain(103, [0], now=NOW).why(0)}"), "compared with the catalog, shown by ids"
    plain = run_score(score_config(served, users=["103"], top_k=1, data=str(log.path), item_name="label"))
    assert plain.splitlines()[1].endswith(f"): {names(best.items)[0]} {best.scores[0]:.4f}")
    with pytest.raises(ConfigError, match=r"item_name: 'title' is not a category .* it has \['label'\]"):
        run_score(score_config(served, users=["103"], data=str(log.path), item_name="title"))


def test_unknown_items_are_marked(served: Served) -> None:
    line = run_score(score_config(served, users=["100"], candidates=["0", "77777"])).splitlines()[1]
    assert ", 77777 (unknown) 0.0000" in line and "0 (unknown)," not in line


Event = tuple[int, int, int]
"""(time, item, action)"""


def stored_tail(*users: list[Event]) -> Tail:
    events = [event for user in users for event in user]
    return Tail(
        np.array([item for _, item, _ in events], np.int32),
        np.array([time for time, _, _ in events], np.int64),
        np.array([action for _, _, action in events], np.uint8),
        np.concatenate([[0], np.cumsum([len(user) for user in users])]).astype(np.int64),
    )


def events_of(merged: Tail) -> list[list[Event]]:
    rows = list(zip(merged.times.tolist(), merged.items.tolist(), merged.actions.tolist(), strict=True))
    return [rows[a:b] for a, b in zip(merged.offsets[:-1], merged.offsets[1:], strict=True)]


def whole(stored: Tail) -> Int:
    """Records that cover no events but those of their tails."""
    return np.diff(stored.offsets)


events = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), max_size=6).map(
    lambda rows: sorted(rows, key=lambda row: row[0])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(events, events, st.integers(0, 1)), max_size=4), st.integers(1, 6))
def test_union_equals_that_of_a_loop(users: list[tuple[list[Event], list[Event], int]], tail_len: int) -> None:
    """Some records cover more events than their tails hold."""
    event_count = np.array([len(stored) + more for stored, _, more in users], np.int64)
    merged, is_fresh = merge_tails(
        stored_tail(*(stored for stored, _, _ in users)),
        event_count,
        stored_tail(*(fresh for _, fresh, _ in users)),
        tail_len,
    )
    marks = [is_fresh[a:b] for a, b in pairwise(merged.offsets)]
    for (stored, fresh, more), user_events, marked in zip(users, events_of(merged), marks, strict=True):
        union = list(stored)
        for event in fresh:
            if event not in union and not (more and stored and event[0] <= stored[0][0]):
                union.append(event)
        union.sort(key=lambda event: event[0])
        assert user_events == union[-tail_len:]
        assert [event for event, is_new in zip(user_events, marked, strict=True) if is_new] == [
            event for event in user_events if event not in stored
        ]
    assert (merged.items.dtype, merged.times.dtype, merged.actions.dtype) == (np.int32, np.int64, np.uint8)


def test_features_follow_their_events() -> None:
    """The features of the stored event count where a caller sends it again."""

    def with_names(stored_tail: Tail, names: list[str]) -> Tail:
        return replace(stored_tail, features={"name": np.array(names), "unread": np.zeros(len(names))})

    stored = with_names(stored_tail([(1, 5, 0), (3, 6, 0)], [(2, 7, 0)]), ["a", "b", "c"])
    fresh = stored_tail([(3, 6, 0), (2, 8, 0), (3, 6, 1)], [(1, 1, 0)])
    fresh = replace(fresh, features={"name": np.array(["again", "late", "new", "old"])})
    merged, _ = merge_tails(stored, whole(stored), fresh, 3)
    assert {name: column.tolist() for name, column in merged.features.items()} == {
        "name": ["late", "b", "new", "old", "c"]
    }


GOOD = {"items": [1, 2], "times": [5, 6], "actions": [0, 1], "offsets": [0, 1, 2]}


def test_valid_tails_become_arrays() -> None:
    for convert in (np.array, torch.tensor, list):
        checked = checked_tail(Tail(**{name: convert(values) for name, values in GOOD.items()}), 2, ["click", "like"])
        assert checked.times.dtype == checked.offsets.dtype == checked.actions.dtype == np.int64
        for name, values in GOOD.items():
            assert getattr(checked, name).tolist() == values
    checked_tail(Tail.empty(3), 3, [])
    strings = GOOD | {"items": np.array(["a", "b"], object)}
    assert checked_tail(Tail(**{name: np.asarray(values) for name, values in strings.items()}), 2, []).items[1] == "b"
    with pytest.raises(TypeError, match=r"tail: must be a Tail\(items, times, actions, offsets\), got a dict"):
        checked_tail(GOOD, 2, [])  # type: ignore[arg-type]
