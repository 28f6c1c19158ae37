"""Quantization of counters, and how a request advances stored counters."""

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.counters.counter_histories import DAY, SPECS, packed
from vista.counters.counter_codes import (
    MAX_CODE,
    CounterCodes,
    code_scales,
    decode_values,
    encode_event_counts,
    encode_values,
)
from vista.counters.counter_spec import CounterSpec


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


def test_a_request_decays_ages_and_adds_by_hand() -> None:
    spec = CounterSpec(days=(10.0,), events=(20.0,))
    codes = stored(spec, [{3: [4, 2, 3, DAY / 1_000]}], clock=0)
    advanced = codes.advanced(np.array([10 * DAY]), *packed([[(5, 5 * DAY), (0, 5 * DAY), (3, 11 * DAY)]]))
    old, (three, five) = codes.values()[0], advanced.values()
    # An event after the request has age 0. Half of a quantization step is about 11 %.
    expected = [5, old[1] * math.exp(-10 / 10) + 1, old[2] * math.exp(-3 / 20) + 1, 0]
    np.testing.assert_allclose(three, expected, rtol=0.11)
    np.testing.assert_allclose(five, [1, math.exp(-5 / 10), math.exp(-2 / 20), 5 * 86_400], rtol=0.11)


HISTORIES = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 40 * DAY)), max_size=6), min_size=1, max_size=4
)


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
