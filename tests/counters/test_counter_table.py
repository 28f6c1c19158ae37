"""Exact counters equal a count event by event, in whatever parts the events arrive."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.counters.counter_histories import DAY, SPECS, Events, assert_identical, counted_by_loop, histories, packed
from vista.counters.counter_codes import encode_values
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable


@given(spec=st.sampled_from(SPECS), users=histories())
def test_equals_counting_by_the_definition(spec: CounterSpec, users: list[Events]) -> None:
    table = CounterTable.of(spec, *packed(users))
    values = table.values()
    for index, events in enumerate(users):
        expected = counted_by_loop(spec, events)
        rows = slice(table.offsets[index], table.offsets[index + 1])
        assert table.rows.key[rows].tolist() == sorted(expected)
        wanted = np.array([expected[key] for key in sorted(expected)]).reshape(-1, spec.num_columns)
        np.testing.assert_allclose(values[rows], wanted, rtol=1e-5, atol=1e-12)


@given(spec=st.sampled_from(SPECS), users=histories(), data=st.data())
def test_appending_is_bit_identical_to_counting_everything(
    spec: CounterSpec, users: list[Events], data: st.DataObject
) -> None:
    table = CounterTable.of(spec, *packed([[] for _ in users]))
    begin = [0] * len(users)
    for _ in range(3):
        end = [data.draw(st.integers(at, len(user))) for at, user in zip(begin, users, strict=True)]
        table = table.appended(*packed([u[a:b] for u, a, b in zip(users, begin, end, strict=True)]))
        begin = end
    table = table.appended(*packed([user[at:] for user, at in zip(users, begin, strict=True)]))
    assert_identical(table, CounterTable.of(spec, *packed(users)))


def test_a_key_of_many_events_is_bit_identical_in_parts() -> None:
    """Few keys with many events each are added up in a loop of their own."""
    rng, spec = np.random.default_rng(0), CounterSpec(days=(1.0, 30.0), events=(50.0,))
    key, time = rng.integers(0, 4, 3_000), np.cumsum(rng.integers(0, DAY // 4, 3_000))
    whole = CounterTable.of(spec, key, time, np.array([0, 3_000]))
    table = CounterTable.of(spec, key[:0], time[:0], np.array([0, 0]))
    for start in range(0, 3_000, 37):
        part = slice(start, start + 37)
        table = table.appended(key[part], time[part], np.array([0, len(key[part])]))
    assert_identical(table, whole)
    expected = counted_by_loop(spec, list(zip(key.tolist(), time.tolist(), strict=True)))
    np.testing.assert_allclose(whole.values(), [expected[1], expected[2], expected[3]], rtol=1e-6)


@given(spec=st.sampled_from(SPECS), users=histories())
def test_users_are_counted_independently(spec: CounterSpec, users: list[Events]) -> None:
    together = CounterTable.of(spec, *packed(users))
    for index, user in enumerate(users):
        assert_identical(together.select(np.array([index])), CounterTable.of(spec, *packed([user])))


@given(users=histories(), num_keys=st.integers(1, 4))
def test_top_keeps_the_most_frequent_then_the_most_recent_keys(users: list[Events], num_keys: int) -> None:
    table = CounterTable.of(CounterSpec(), *packed(users))
    top = table.top(num_keys)
    for index, events in enumerate(users):
        keys = [key for key, _ in events if key]
        newest = {key: place for place, key in enumerate(keys)}
        best = sorted(set(keys), key=lambda key: (-keys.count(key), -newest[key]))[:num_keys]
        assert top.rows.key[top.offsets[index] : top.offsets[index + 1]].tolist() == sorted(best)
    assert_identical(table.top(5), table)


def test_key_0_is_an_event_but_is_not_counted() -> None:
    spec = CounterSpec(days=(), events=(10.0,))
    table = CounterTable.of(spec, np.array([7, 0, 0]), np.array([0, DAY, 2 * DAY]), np.array([0, 3]))
    assert table.rows.key.tolist() == [7]
    assert table.num_events.tolist() == [3]
    np.testing.assert_allclose(table.values(), [[1, np.exp(-2 / 10), 2 * 86_400]], rtol=1e-6)


def test_codes_are_the_encoded_values_of_the_newest_event() -> None:
    spec = CounterSpec()
    table = CounterTable.of(spec, np.array([9, 3, 3]), np.array([0, DAY, 3 * DAY]), np.array([0, 1, 3]))
    codes = table.codes()
    assert codes.key.tolist() == [9, 3]
    assert codes.clock.tolist() == [0, 3 * DAY]
    assert (codes.codes == encode_values(spec, table.values())).all()


def test_a_late_event_is_an_error() -> None:
    table = CounterTable.of(CounterSpec(), np.array([9, 3]), np.array([5, 10]), np.array([0, 1, 2]))
    table.appended(np.array([9, 3]), np.array([5, 10]), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="user 1: the event at position 1 is older"):
        table.appended(np.array([9, 3]), np.array([5, 9]), np.array([0, 1, 2]))
    with pytest.raises(ValueError, match="user 0: the event at position 1 is older"):
        CounterTable.of(CounterSpec(), np.array([9, 3]), np.array([5, 4]), np.array([0, 2, 2]))
