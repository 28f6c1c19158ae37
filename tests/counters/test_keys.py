"""The numbers that stand for what is counted, against Python's calendar and arithmetic."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.counters.counter_histories import key_by_hand
from vista.config.model_config import counted_fields
from vista.counters.counters import CounterSpec
from vista.counters.keys import (
    MAX_KEY,
    ItemKeys,
    calendar_code,
    key_of,
    largest_key,
    newest_items,
    values_of,
)

FIELDS = ("item", "brand", "brand*month", "weekday*brand", "previous*item", "item*weekday", "previous*brand*month")
ACTIONS = ["wrong", "right"]
OF_ACTIONS = ("action:wrong", "item*action:right", "action:wrong*brand*weekday", "previous*action:right")
BRANDS = [0, 1, 3, 0, 2, 3]
SPEC = CounterSpec((*FIELDS, *OF_ACTIONS), (4,) * len((*FIELDS, *OF_ACTIONS)))
KEYS = ItemKeys(SPEC, 6, {"brand": np.array(BRANDS)}, {"brand": 3}, ACTIONS)
TIMES = st.integers(-(10**13), 2 * 10**14)  # years 1653 to 8307
EVENTS = st.lists(st.tuples(st.integers(0, 5), TIMES, st.integers(0, 5), st.integers(0, 1)), min_size=1, max_size=20)


@given(EVENTS)
def test_keys_are_those_of_the_definition(events: list[tuple[int, int, int, int]]) -> None:
    """An event with another action counts for nothing; a candidate has no action yet, and reads the same key."""
    columns = np.array(events, np.int64).T
    of_events, of_candidates = KEYS.of(*columns), KEYS.of(*columns[:3])
    for field, keys, asked in zip(SPEC.fields, of_events, of_candidates, strict=True):
        assert keys.tolist() == [key_by_hand(field, *e[:3], ACTIONS[e[3]], {"brand": BRANDS}) for e in events]
        assert asked.tolist() == [key_by_hand(field, *e[:3], None, {"brand": BRANDS}) for e in events]


@given(st.lists(TIMES, min_size=1))
def test_tensors_have_the_same_calendar(times: list[int]) -> None:
    for part in ("month", "weekday"):
        expected = calendar_code(part, np.array(times)).tolist()
        assert calendar_code(part, torch.tensor(times)).tolist() == expected


@pytest.mark.parametrize("field", ["item*weekday", "brand*month", "weekday*brand", "previous*brand*month"])
def test_keys_of_few_values_tell_all_of_them_apart(field: str) -> None:
    """No two combinations share a key, the largest key is known, and values are found from keys."""
    sizes, counts = {"brand": 3}, {"item": 5, "previous": 5, "brand": 3, "month": 12, "weekday": 7}
    parts = field.split("*")
    grid = np.meshgrid(*(np.arange(1, counts[part] + 1) for part in parts), indexing="ij")
    codes = {part: values.ravel() for part, values in zip(parts, grid, strict=True)}
    keys = key_of(field, codes, sizes)
    assert np.unique(keys).tolist() == list(range(1, largest_key(field, 5, sizes) + 1))
    assert largest_key(f"{field}*action:right", 5, sizes) == largest_key(field, 5, sizes)
    found = values_of(f"action:right*{field}", keys, 5, sizes)
    assert found is not None and {part: own.tolist() for part, own in found.items()} == {
        part: own.tolist() for part, own in codes.items()
    }


def test_pairs_of_items_are_hashed_to_31_bits() -> None:
    """Also for a model whose items have more pairs than that; adding items to it changes no key."""
    rng = np.random.default_rng(0)
    codes: dict[str, Any] = {part: rng.integers(1, 10**7, 2_000) for part in ("previous", "item")}
    keys = key_of("previous*item", codes, {})
    assert keys.min() >= 1 and keys.max() <= MAX_KEY == largest_key("previous*item", 2, {})
    assert len(np.unique(keys)) == 2_000 and values_of("previous*item", keys, 10**7, {}) is None


def test_items_of_packed_histories() -> None:
    item, offsets = np.array([4, 5, 6, 7]), np.array([0, 3, 3, 4])
    keys, time = ItemKeys.of_spec(CounterSpec(("item", "previous*item"), (4, 4)), 8, {}), np.zeros(4, np.int64)

    def pairs(previous: list[int]) -> list[int]:
        return keys.of(item, time, np.array(previous))[1].tolist()

    action = np.zeros(4, np.uint8)
    assert keys.of_events(item, action, time, offsets)[1].tolist() == pairs([0, 4, 5, 0])
    assert keys.of_events(item, action, time, offsets, np.array([1, 2, 3]))[1].tolist() == pairs([1, 4, 5, 3])
    assert newest_items(item, offsets).tolist() == [6, 0, 7]
    none = np.zeros(0, np.int64)
    assert newest_items(none, np.zeros(2, np.int64)).tolist() == [0]
    assert [len(key) for key in keys.of_events(none, none, none, np.zeros(2, np.int64))] == [0, 0]


def test_a_key_of_all_actions_is_one_per_action() -> None:
    assert counted_fields(["item", "brand*action", "action:b"], ["a", "b"]) == (
        "item",
        "brand*action:a",
        "brand*action:b",
        "action:b",
    )
    assert counted_fields(["item", "action", "action:b"], ["a", "b"]) == ("item", "action:a", "action:b")
    assert largest_key("action:a", 5, {}) == 1 and values_of("action:a", np.ones(2, np.int64), 5, {}) == {}
