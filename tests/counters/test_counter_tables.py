"""Counters of users: the spec, exact tables, codes, and that training reads the codes that serving reads. The
numbers that stand for what is counted, against Python's calendar and arithmetic."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.counters.counter_histories import (
    DAY,
    SPECS,
    Events,
    assert_identical,
    counted_by_loop,
    histories,
    key_by_hand,
    packed,
)
from vista.config.model_config import counted_fields
from vista.counters.counters import (
    MAX_CODE,
    CounterCodes,
    CounterSpec,
    CounterTable,
    OccurrenceIndex,
    code_scales,
    decode_values,
    encode_event_counts,
    encode_values,
)
from vista.counters.keys import MAX_KEY, ItemKeys, calendar_code, key_of, largest_key, newest_items, values_of


def test_half_lives_are_whole_ms_and_millionths_of_an_event() -> None:
    spec = CounterSpec(days=(1.0, 30.0), events=(200.0,))
    assert spec.half_lives.tolist() == [59_887_916, 1_796_637_492, 138_629_436]
    assert spec.num_columns == 5


def test_the_weight_of_an_event_falls_exponentially() -> None:
    spec = CounterSpec(days=(30.0,), events=(200.0, 10.0))
    weights = spec.decay(np.array([0, 86_400_000 * 30]), np.array([0, 20]))
    np.testing.assert_allclose(weights, [[1, 1, 1], [np.exp(-1), np.exp(-0.1), np.exp(-2)]], rtol=1e-4)


def test_ages_are_seconds_or_events() -> None:
    elapsed, events = np.array([1_500]), np.array([3])
    assert CounterSpec().age(elapsed, events).tolist() == [1.5]
    assert CounterSpec(days=(), has_time=False).age(elapsed, events).tolist() == [3.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"fields": ()}, "fields: must be distinct"),
        ({"fields": ("item", "item"), "keys": (1, 1)}, "fields: must be distinct"),
        ({"keys": (64, 12)}, "keys: expected one number for each of item"),
        ({"keys": (0,)}, "keys: must be from 1 to 65535"),
        ({"days": (0.0,)}, "days: must be from 1/24"),
        ({"days": (float("nan"),)}, "days: must be from 1/24"),
        ({"events": (0.5,)}, "events: must be from 1"),
        ({"days": (1.0,) * 8}, "at most 8 horizons"),
        ({"has_time": False}, "days: must be empty for a log without times"),
    ],
)
def test_bad_specs_are_named(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterSpec(**fields)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keys": ["64"]}, "keys: expected a list"),
        ({"has_time": 1}, "has_time: expected one of True, False"),
        ({"more": 1}, "'more' is unknown"),
    ],
)
def test_a_damaged_manifest_raises_value_error(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CounterSpec.from_dict(CounterSpec().to_dict() | change)


@settings(max_examples=25)
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


@settings(max_examples=25)
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


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), users=histories())
def test_users_are_counted_independently(spec: CounterSpec, users: list[Events]) -> None:
    together = CounterTable.of(spec, *packed(users))
    for index, user in enumerate(users):
        assert_identical(together.select(np.array([index])), CounterTable.of(spec, *packed([user])))


@settings(max_examples=25)
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


def stored(spec: CounterSpec, users: list[dict[int, list[float]]], clock: int = 0) -> CounterCodes:
    """Counters with these values per user and key."""
    values = np.array([user[key] for user in users for key in sorted(user)], np.float64).reshape(-1, spec.num_columns)
    keys = np.array([key for user in users for key in sorted(user)], np.int32)
    offsets = np.cumsum([0, *map(len, users)])
    return CounterCodes(spec, keys, encode_values(spec, values), offsets, np.full(len(users), clock))


def as_dicts(codes: CounterCodes) -> list[dict[int, list[float]]]:
    bounds = codes.offsets.tolist()
    pairs = list(zip(codes.key.tolist(), codes.values().tolist(), strict=True))
    return [dict(pairs[start:stop]) for start, stop in pairwise(bounds)]


@pytest.mark.parametrize("spec", SPECS)
def test_codes_follow_the_documented_formula(spec: CounterSpec) -> None:
    resolution, largest = code_scales(spec)
    values = np.random.default_rng(0).exponential(1, (200, spec.num_columns)) * largest / 5
    for row, codes in zip(values.tolist(), encode_values(spec, values).tolist(), strict=True):
        for value, code, small, large in zip(row, codes, resolution.tolist(), largest.tolist(), strict=True):
            assert code == min(round(63 * math.log(1 + value / small) / math.log(1 + large / small)), 63)


@pytest.mark.parametrize("spec", SPECS)
def test_rounding_loses_at_most_half_a_step(spec: CounterSpec) -> None:
    resolution, largest = code_scales(spec)
    values = np.random.default_rng(0).random((1_000, spec.num_columns)) ** 4 * largest
    decoded = decode_values(spec, encode_values(spec, values))
    step = np.log1p(largest / resolution) / MAX_CODE
    error = np.abs(np.log1p(decoded / resolution) - np.log1p(values / resolution))
    assert (error[:, 1:] <= step[1:] / 2 + 1e-9).all()
    assert (np.abs(decoded - values)[:, 0] <= 0.5 + (values[:, 0] + 0.5) * np.expm1(step[0] / 2)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_encoding_decoded_values_gives_the_codes_again(spec: CounterSpec) -> None:
    counts = np.arange(30_000, dtype=np.float64)
    codes = encode_values(spec, np.repeat(counts[:, None], spec.num_columns, 1))
    assert (encode_values(spec, decode_values(spec, codes)) == codes).all()
    every_code = np.repeat(np.arange(MAX_CODE + 1, dtype=np.uint8)[:, None], spec.num_columns, 1)
    assert (encode_values(spec, decode_values(spec, every_code)) == every_code)[:, 1:].all()


def test_small_counts_are_exact_and_present_keys_have_a_count_code() -> None:
    spec = CounterSpec()
    values = np.zeros((10, spec.num_columns))
    values[:, 0] = np.arange(10)
    codes = encode_values(spec, values)
    assert decode_values(spec, codes)[:, 0].tolist() == list(range(10))
    assert codes[:2, 0].tolist() == [0, 7]


def test_a_request_without_time_or_events_changes_nothing() -> None:
    spec = CounterSpec()
    codes = stored(spec, [{3: [4, 1.5, 2.5, 700], 9: [1, 0.1, 0.3, 86_400]}, {}], clock=DAY)
    for now in (None, np.array([DAY, DAY]), np.array([0, 0])):
        advanced = codes.advanced(now, *packed([[], []]))
        assert (advanced.codes == codes.codes).all()
        assert advanced.key.tolist() == [3, 9]
        assert advanced.offsets.tolist() == [0, 2, 2]


HISTORIES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40 * DAY)), max_size=6), min_size=1, max_size=4
)


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), new=HISTORIES, data=st.data())
def test_advancing_equals_a_loop_over_keys(spec: CounterSpec, new: list, data: st.DataObject) -> None:
    new = [sorted(user, key=lambda event: event[1]) for user in new]
    value = st.floats(0, 200)
    row = st.tuples(st.integers(1, 500).map(float), *[value] * (spec.num_columns - 1)).map(list)
    users = [data.draw(st.dictionaries(st.integers(1, 6), row, max_size=4)) for _ in new]
    now = data.draw(st.none() | st.integers(0, 60 * DAY).map(lambda at: np.full(len(new), at)))
    codes = stored(spec, users, clock=DAY)
    advanced = codes.advanced(now, *packed(new))

    half_lives, days = spec.half_lives.tolist(), len(spec.days)
    for index, (before, after, fresh) in enumerate(zip(as_dicts(codes), as_dicts(advanced), new, strict=True)):
        at = max([DAY, *(time for _, time in fresh)]) if now is None else int(now[index])
        assert advanced.clock[index] == at
        assert after.keys() == before.keys() | {key for key, _ in fresh if key}
        for key, found in after.items():
            past = [(DAY, len(fresh), before[key])] if key in before else []
            past += [
                (time, len(fresh) - 1 - place, [1.0] * (1 + len(half_lives)) + [0.0])
                for place, (other, time) in enumerate(fresh)
                if other == key
            ]
            expected = [sum(values[0] for _, _, values in past)]
            for column, half_life in enumerate(half_lives):
                passed = [max(at - time, 0) if column < days else 1_000_000 * later for time, later, _ in past]
                expected.append(
                    sum(v[1 + column] * 2 ** (-p / half_life) for (*_, v), p in zip(past, passed, strict=True))
                )
            ages = [v[-1] + (max(at - time, 0) / 1_000 if spec.has_time else later) for time, later, v in past]
            expected.append(min(ages))
            # The sums differ in rounding, which can move a value across the border of two codes.
            low, high = encode_values(spec, np.array([expected]) * [[1 - 1e-9], [1 + 1e-9]])
            code = encode_values(spec, np.array([found]))[0]
            assert ((low <= code) & (code <= high)).all()


@settings(max_examples=25)
@given(users=HISTORIES, new=HISTORIES)
def test_users_do_not_affect_one_another(users: list, new: list) -> None:
    """The result for a user is bit-identical to that of a batch with this user alone."""
    spec, count = CounterSpec(), min(len(users), len(new))
    new = [sorted(user, key=lambda event: event[1]) for user in new[:count]]
    codes = stored(spec, [{}] * count).advanced(
        None, *packed([sorted(user, key=lambda event: event[1]) for user in users[:count]])
    )
    together = codes.advanced(None, *packed(new))
    for index in range(count):
        one = np.array([index])
        alone = codes.select(one).advanced(None, *packed(new[index : index + 1]))
        for name in ("key", "codes", "clock"):
            np.testing.assert_array_equal(getattr(together.select(one), name), getattr(alone, name))


def test_lookup_finds_only_the_users_own_keys() -> None:
    spec = CounterSpec()
    codes = stored(spec, [{3: [4, 1, 2, 700]}, {}, {3: [2, 1, 1, 0], 2**31 - 1: [1, 1, 1, 0]}])
    user, key = np.array([0, 0, 0, 1, 2, 2, 2]), np.array([3, 0, 4, 3, 3, 2**31 - 1, 2])
    found = codes.lookup(user, key)
    assert (found[[0, 4, 5]] == codes.codes).all()
    assert (found[[1, 2, 3, 6]] == 0).all()
    assert stored(spec, [{}]).lookup(np.array([0]), np.array([3])).tolist() == [[0, 0, 0, 0]]


def test_padding_and_selection() -> None:
    spec = CounterSpec()
    codes = stored(spec, [{3: [4, 1, 2, 700]}, {}, {2: [2, 1, 1, 0], 8: [1, 1, 1, 0]}])
    key, padded = codes.select(np.array([2, 1, 2, 0])).padded()
    assert key.tolist() == [[2, 8], [-1, -1], [2, 8], [3, -1]]
    assert (padded[key >= 0] == codes.codes[[1, 2, 1, 2, 0]]).all()
    assert (padded[key < 0] == 0).all()
    assert stored(spec, [{}, {}]).padded()[0].shape == (2, 0)


def test_codes_of_numbers_of_events_keep_their_order() -> None:
    numbers = np.concatenate([np.arange(2_000), np.geomspace(2_000, 1e8, 500).astype(np.int64)])
    codes = encode_event_counts(numbers).astype(int)
    assert codes[0] == 0 and (np.diff(codes) >= 0).all() and codes[-1] == MAX_CODE
    assert set(codes) == set(range(MAX_CODE + 1))
    many = numbers[(numbers >= 50) & (numbers < 900_000)]
    assert (encode_event_counts((many * 1.25).astype(np.int64)) > encode_event_counts(many)).all()


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), users=histories())
def test_equals_counting_the_events_before_every_cut(spec: CounterSpec, users: list[Events]) -> None:
    cuts = [(user, position) for user, events in enumerate(users) for position in range(len(events) + 1)]
    user, position = np.array(cuts).T
    table = OccurrenceIndex(spec, *packed(users)).table(user, position)
    assert_identical(table, CounterTable.of(spec, *packed([users[user][:position] for user, position in cuts])))


@settings(max_examples=25)
@given(
    spec=st.sampled_from(SPECS),
    users=histories(),
    num_keys=st.integers(1, 4),
    wait=st.none() | st.integers(-(10**10), 10**10),
    data=st.data(),
)
def test_training_and_serving_have_the_same_codes(
    spec: CounterSpec, users: list[Events], num_keys: int, wait: int | None, data: st.DataObject
) -> None:
    """Serving counts the first part of each history, appends more in a refresh, and advances by the tail."""
    first, cut, end = [], [], []
    for events in users:
        end.append(data.draw(st.integers(0, len(events))))
        cut.append(data.draw(st.integers(0, end[-1])))
        first.append(data.draw(st.integers(0, cut[-1])))

    def part(begin: list[int], stop: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return packed([events[a:b] for events, a, b in zip(users, begin, stop, strict=True)])

    fresh = part(cut, end)
    now = None
    if wait is not None:
        now = np.array([(events[at - 1][1] if at else 0) + wait for events, at in zip(users, end, strict=True)])
    refreshed = CounterTable.of(spec, *part([0] * len(users), first)).appended(*part(first, cut))
    served = refreshed.top(num_keys).codes().advanced(now, *fresh)
    index = OccurrenceIndex(spec, *packed(users))
    trained = index.table(np.arange(len(users)), np.array(cut)).top(num_keys).codes().advanced(now, *fresh)
    for name in ("key", "codes", "offsets", "clock"):
        np.testing.assert_array_equal(getattr(trained, name), getattr(served, name), err_msg=name)


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), users=histories(), data=st.data())
def test_advanced_codes_are_at_most_one_level_off_the_exact_counters(
    spec: CounterSpec, users: list[Events], data: st.DataObject
) -> None:
    cut = [data.draw(st.integers(0, len(events))) for events in users]
    stored = CounterTable.of(spec, *packed([events[:at] for events, at in zip(users, cut, strict=True)])).codes()
    advanced = stored.advanced(None, *packed([events[at:] for events, at in zip(users, cut, strict=True)]))
    exact = CounterTable.of(spec, *packed(users)).codes()
    for name in ("key", "offsets", "clock"):
        np.testing.assert_array_equal(getattr(advanced, name), getattr(exact, name), err_msg=name)
    assert (np.abs(advanced.codes.astype(int) - exact.codes.astype(int)) <= 1).all()


@settings(max_examples=25)
@given(spec=st.sampled_from(SPECS), users=histories(), data=st.data())
def test_the_future_changes_nothing(spec: CounterSpec, users: list[Events], data: st.DataObject) -> None:
    position = np.array([data.draw(st.integers(0, len(events))) for events in users])
    past = [events[:end] for events, end in zip(users, position.tolist(), strict=True)]
    user = np.arange(len(users))
    assert_identical(
        OccurrenceIndex(spec, *packed(users)).table(user, position),
        OccurrenceIndex(spec, *packed(past)).table(user, position),
    )


def test_no_cuts_and_no_events() -> None:
    spec, none = CounterSpec(), np.zeros(0, np.int64)
    index = OccurrenceIndex(spec, none, none, np.array([0, 0]))
    assert index.table(none, none).offsets.tolist() == [0]
    assert index.table(np.array([0, 0]), np.array([0, 0])).offsets.tolist() == [0, 0, 0]


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
