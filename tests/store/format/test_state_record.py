"""States: their bytes, the round trip with exact counters, and damage."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xxhash

from vista.config.choices import StateDtype
from vista.counters.counter_spec import CounterSpec
from vista.counters.counter_table import CounterTable
from vista.errors import RecordError
from vista.store.format.keys import user_keys
from vista.store.format.state_record import HEADER, StateArrays, StateSpec, decode_states, encode_states, restamp_states

COUNTED = CounterSpec(("item", "genre"), (2, 2), (3.0,), (5.0,))
LENGTHS = [4, 0, 9]
KEYS = user_keys([1, 2, 3])


def spec_of(dtype: StateDtype = StateDtype.float32, counters: CounterSpec | None = COUNTED) -> StateSpec:
    return StateSpec(bytes(range(32)), 7, 2, 2, 3, dtype, created_at=5, counters=counters)


def tables(num_keys: int) -> CounterTable:
    rng, offsets = np.random.default_rng(num_keys), np.cumsum([0, *LENGTHS])
    return CounterTable.of(COUNTED, rng.integers(0, num_keys, offsets[-1]), 10**12 + np.arange(offsets[-1]), offsets)


def states(counters: bool = True) -> StateArrays:
    rng, count = np.random.default_rng(0), len(LENGTHS)
    return StateArrays(
        rng.standard_normal((count, 2, 2, 3, 3)).astype(np.float32),
        rng.random((count, 2)).astype(np.float32),
        rng.random((count, 2)).astype(np.float32),
        *(np.arange(count) + 10 * column for column in range(3)),
        np.arange(count).astype(np.uint64),
        (tables(4), tables(2)) if counters else (),
    )


def assert_equal(actual: StateArrays, expected: StateArrays, atol: float = 0.0) -> None:
    for name in ("n", "removed", "clock", "num_events", "applied_segment", "history_digest"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_allclose(actual.z, expected.z, atol=atol)
    for one, other in zip(actual.counters, expected.counters, strict=True):
        for name in ("offsets", "clock", "num_events"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for name in ("key", "count", "decayed", "last", "last_position"):
            np.testing.assert_array_equal(getattr(one.rows, name), getattr(other.rows, name))


@pytest.mark.parametrize("dtype", [StateDtype.float32, StateDtype.float16])
@pytest.mark.parametrize("counters", [True, False])
def test_round_trip(dtype: StateDtype, counters: bool) -> None:
    spec, whole = spec_of(dtype, COUNTED if counters else None), states(counters)
    encoded = encode_states(KEYS, whole, spec)
    assert len({len(state) for state in encoded}) == (3 if counters else 1)
    atol = 2e-3 if dtype is StateDtype.float16 else 0.0
    assert_equal(decode_states(encoded, KEYS, spec), whole, atol)
    for row in range(3):  # a batch does not change what is read of a user
        one = decode_states(encoded[row : row + 1], KEYS[row : row + 1], spec)
        assert_equal(one, whole[row : row + 1], atol)
    assert_equal(decode_states([], [], spec), whole[:0])
    assert_equal(StateArrays.concatenated([whole[:1], whole[1:]]), whole)
    assert_equal(StateArrays.concatenated([whole[np.array([2])], whole[:2]]), whole[np.array([2, 0, 1])])


def test_golden_bytes_of_the_counters() -> None:
    """One user: key 3 at positions 0 and 2, key 5 at position 1; no horizon."""
    spec = CounterSpec(("item",), (2,), (), ())
    table = CounterTable.of(spec, np.array([3, 5, 3]), np.array([256, 512, 768]), np.array([0, 3]))
    none = np.zeros((1, 0), np.float32)
    zero = np.zeros(1, np.int64)
    arrays = StateArrays(
        np.zeros((1, 0, 0, 0, 0), np.float32), none, none, zero, zero + 3, zero, zero.astype(np.uint64), (table,)
    )
    record = encode_states(KEYS[:1], arrays, StateSpec(bytes(32), 1, 0, 0, 0, StateDtype.float32, counters=spec))[0]
    assert record[120:].hex() == (
        "0003000000000000"  # clock 768
        "0300000000000000"  # three events
        "02000000"  # two keys
        "0300000002000000"
        "0003000000000000"
        "0200000000000000"  # key 3, twice, newest at 768 at position 2
        "0500000001000000"
        "0002000000000000"
        "0100000000000000"  # key 5, once, at 512 at position 1
    )
    header = np.frombuffer(record, HEADER, 1)[0]
    assert (header["format_version"], header["counters_length"], header["payload_length"]) == (2, 68, 68)


def with_checksum(state: bytearray) -> bytes:
    state[112:120] = bytes(8)
    state[112:120] = xxhash.xxh3_64_intdigest(bytes(state)).to_bytes(8, "little")
    return bytes(state)


def test_damage_is_detected() -> None:
    spec = spec_of()
    encoded = encode_states(KEYS, states(), spec)
    for bit in np.random.default_rng(0).choice(8 * len(encoded[0]), 400, replace=False).tolist():
        bad = bytearray(encoded[0])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError, match="the state of user 1 is corrupt"):
            decode_states([bytes(bad), *encoded[1:]], KEYS, spec)
    for length in range(len(encoded[0])):
        with pytest.raises(RecordError, match="the state of user 1 is corrupt"):
            decode_states([encoded[0][:length], *encoded[1:]], KEYS, spec)


def test_sizes_that_do_not_fit_are_refused_even_if_the_checksum_does() -> None:
    spec = spec_of()
    encoded = encode_states(KEYS, states(), spec)
    size_of_items = spec.least_bytes + 16
    for row in (0, 1, 2):
        for size in (0, 1, 200, 255):
            bad = bytearray(encoded[row])
            if bad[size_of_items] == size:
                continue
            bad[size_of_items] = size
            values = [*encoded[:row], with_checksum(bad), *encoded[row + 1 :]]
            with pytest.raises(RecordError, match=rf"the state of user {row + 1} is corrupt .*counters"):
                decode_states(values, KEYS, spec)


def test_counters_that_are_missing_or_too_many_are_refused() -> None:
    for written, read in ((COUNTED, None), (None, COUNTED)):
        encoded = encode_states(KEYS, states(written is not None), spec_of(counters=written))
        with pytest.raises(RecordError, match="counters"):
            decode_states(encoded, KEYS, spec_of(counters=read))


def test_another_generation_changes_only_its_number() -> None:
    spec, whole = spec_of(), states()
    moved = restamp_states(encode_states(KEYS, whole, spec), 9)
    assert moved == encode_states(KEYS, whole, dataclasses.replace(spec, generation=9))
    assert restamp_states([], 9) == []
