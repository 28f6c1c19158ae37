"""Tails that callers pass: what is refused, and the union with the stored ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vista.arrays import Int
from vista.scorer.tail_merging import checked_tail, merge_tails
from vista.store.tail import Tail

Event = tuple[int, int, int]
"""(time, item, action)"""


def tail(*users: list[Event]) -> Tail:
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


def test_union_by_hand() -> None:
    stored = tail([(1, 5, 0), (2, 6, 0), (2, 7, 1)], [], [(9, 1, 0)])
    fresh = tail([(2, 7, 1), (2, 7, 0), (3, 8, 0)], [(4, 4, 0)], [])
    assert events_of(merge_tails(stored, whole(stored), fresh, 10)[0]) == [
        [(1, 5, 0), (2, 6, 0), (2, 7, 1), (2, 7, 0), (3, 8, 0)],
        [(4, 4, 0)],
        [(9, 1, 0)],
    ]
    merged = merge_tails(stored, whole(stored), fresh, 2)[0]
    assert events_of(merged) == [[(2, 7, 0), (3, 8, 0)], [(4, 4, 0)], [(9, 1, 0)]]
    # A late event is sorted in by its time, and dropped if it is older than all events that are kept.
    stored = tail([(5, 1, 0), (7, 2, 0)])
    for late, expected in ((6, [(6, 3, 0), (7, 2, 0)]), (4, [(5, 1, 0), (7, 2, 0)])):
        assert events_of(merge_tails(stored, whole(stored), tail([(late, 3, 0)]), 2)[0]) == [expected]
    assert events_of(merge_tails(tail([], []), np.array([0, 4]), tail([], []), 3)[0]) == [[], []]


@pytest.mark.parametrize("sent", [range(6), [0], [1, 5], [3], []])
def test_a_basket_longer_than_the_tail_sent_again(sent: Sequence[int]) -> None:
    """The tail holds the last 4 of 6 events of one time; the caller sends some of the 6 again."""
    basket = [(5, item, 0) for item in range(1, 7)]
    stored, again = tail(basket[2:], [(5, 1, 0)]), [basket[place] for place in sent]
    covered = np.array([9, 1])
    merged, is_fresh = merge_tails(stored, covered, tail(again, []), 4)
    assert events_of(merged) == events_of(stored) and not is_fresh.any()
    # Later events count, and so do those of a user whose tail holds all covered events.
    merged, is_fresh = merge_tails(stored, covered, tail([*again, (6, 1, 0)], [(5, 2, 0), (4, 3, 0)]), 4)
    assert events_of(merged) == [[*basket[3:], (6, 1, 0)], [(4, 3, 0), (5, 1, 0), (5, 2, 0)]]
    assert is_fresh.tolist() == [False, False, False, True, True, False, True]


events = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 2), st.integers(0, 1)), max_size=6).map(
    lambda rows: sorted(rows, key=lambda row: row[0])
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(events, events, st.integers(0, 1)), max_size=4), st.integers(1, 6))
def test_union_equals_that_of_a_loop(users: list[tuple[list[Event], list[Event], int]], tail_len: int) -> None:
    """Some records cover more events than their tails hold."""
    event_count = np.array([len(stored) + more for stored, _, more in users], np.int64)
    merged, is_fresh = merge_tails(
        tail(*(stored for stored, _, _ in users)), event_count, tail(*(fresh for _, fresh, _ in users)), tail_len
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

    def with_names(tail: Tail, names: list[str]) -> Tail:
        return replace(tail, features={"name": np.array(names), "unread": np.zeros(len(names))})

    stored = with_names(tail([(1, 5, 0), (3, 6, 0)], [(2, 7, 0)]), ["a", "b", "c"])
    fresh = tail([(3, 6, 0), (2, 8, 0), (3, 6, 1)], [(1, 1, 0)])
    fresh = replace(fresh, features={"name": np.array(["again", "late", "new", "old"])})
    merged, _ = merge_tails(stored, whole(stored), fresh, 3)
    assert {name: column.tolist() for name, column in merged.features.items()} == {
        "name": ["late", "b", "new", "old", "c"]
    }


GOOD = {"items": [1, 2], "times": [5, 6], "actions": [0, 1], "offsets": [0, 1, 2]}


@pytest.mark.parametrize(
    ("part", "value", "error", "message"),
    [
        ("times", [5.0, float("nan")], TypeError, r"tail\.times: must hold integer milliseconds, got float64"),
        ("actions", [0.5, 1.0], TypeError, r"tail\.actions: must hold integers"),
        ("offsets", [0.0, 1.0, 2.0], TypeError, r"tail\.offsets: must hold integers"),
        ("items", [[1, 2]], ValueError, r"tail\.items: must be one-dimensional"),
        ("times", [5], ValueError, r"tail\.times: holds 1 values for 2 items"),
        ("actions", [0, 1, 1], ValueError, r"tail\.actions: holds 3 values for 2 items"),
        ("offsets", [0, 2], ValueError, r"tail\.offsets: must be 3 values that rise from 0 to 2"),
        ("offsets", [0, 1, 3], ValueError, r"tail\.offsets: must be 3 values that rise"),
        ("offsets", [1, 1, 2], ValueError, r"tail\.offsets: must be 3 values that rise"),
        ("offsets", [0, 2, 1], ValueError, r"tail\.offsets: must be 3 values that rise"),
    ],
)
def test_invalid_parts_of_a_tail_are_named(
    part: str, value: list[object], error: type[Exception], message: str
) -> None:
    arrays = {name: np.array(values) for name, values in (GOOD | {part: value}).items()}
    with pytest.raises(error, match=message):
        checked_tail(Tail(**arrays), 2, ["click", "like"])


def test_valid_tails_become_arrays() -> None:
    for convert in (np.array, torch.tensor, list):
        checked = checked_tail(Tail(**{name: convert(values) for name, values in GOOD.items()}), 2, ["click", "like"])
        assert checked.times.dtype == checked.offsets.dtype == checked.actions.dtype == np.int64
        for name, values in GOOD.items():
            assert getattr(checked, name).tolist() == values
    checked_tail(Tail.empty(3), 3, [])
    strings = GOOD | {"items": np.array(["a", "b"], object)}
    assert checked_tail(Tail(**{name: np.asarray(values) for name, values in strings.items()}), 2, []).items[1] == "b"
    with pytest.raises(TypeError, match=r"tail: must be a Tail"):
        checked_tail(GOOD, 2, [])  # type: ignore[arg-type]
