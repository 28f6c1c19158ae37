"""Counters in records, states, and history digests: their bytes, the round trip, and damage."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.record_reference import decode_record_reference
from tests.store.conftest import users_of
from vista.config.checks import Codec, StateDtype
from vista.counters.counters import CounterCodes, CounterSpec, CounterTable
from vista.errors import RecordError
from vista.log.histories import NO_TIMESTAMP
from vista.store.keys import _CHUNK, event_digests, history_digests, item_keys, user_keys
from vista.store.record import HEADER, CounterLayout, RecordSpec, Tail, check_records
from vista.store.record_encoding import encode_records
from vista.store.record_reading import read_records
from vista.store.state_record import HEADER as STATE_HEADER
from vista.store.state_record import StateArrays, StateSpec, UserSummaries, decode_states, encode_states, restamp_states

ITEMS = CounterLayout.of(CounterSpec(keys=(3,)), [60_000])
CATEGORIES = CounterLayout.of(CounterSpec(("item", "genre"), (3, 2)), [60_000, 200])
LAST = 1 << 40
TAIL = Tail(np.array([9, 1], np.int32), np.array([LAST - 300, LAST]), np.array([0, 255], np.uint8), np.array([0, 2, 2]))
USERS = user_keys([42, -5])


def codes(spec: CounterSpec, users: list[dict[int, list[int]]], clock: list[int]) -> CounterCodes:
    """Counters of one field, from a dict per user."""
    offsets = np.cumsum([0, *map(len, users)])
    key = np.array([key for user in users for key in sorted(user)], np.int32)
    values = [user[key] for user in users for key in sorted(user)]
    packed = np.array(values, np.uint8).reshape(len(key), spec.num_columns)
    return CounterCodes(spec, key, packed, offsets, np.array(clock, np.int64))


def counters_of(layout: CounterLayout) -> tuple[CounterCodes, ...]:
    """Of two users, the second one without keys."""
    fields: list[list[dict[int, list[int]]]] = [
        [{300: [63, 0, 0, 1], 9: [7, 1, 2, 63]}, {}],
        [{200: [8, 9, 10, 11]}, {}],
    ]
    return tuple(codes(layout.spec, held, [LAST, NO_TIMESTAMP]) for held in fields[: len(layout.spec.fields)])


def spec_of(layout: CounterLayout, key: bytes | None = None) -> RecordSpec:
    return RecordSpec(bytes(range(32)), 7, 1, 4, Codec.float16, applied_segment=3, counters=layout, key=key)


def encode(layout: CounterLayout, key: bytes | None = None, tail: Tail = TAIL) -> list[bytes]:
    return encode_records(counted_users(layout, tail), spec_of(layout, key))


def counted_users(layout: CounterLayout, tail: Tail = TAIL) -> UserSummaries:
    events = {"tail": tail, "event_count": np.array([2, 0]), "last_event_ts": np.array([LAST, NO_TIMESTAMP])}
    return users_of(USERS, summary=np.zeros((2, 1, 4), np.float32), counters=counters_of(layout), **events)


def with_checksum(record: bytearray) -> bytes:
    record[120:128] = bytes(8)
    record[120:128] = xxhash.xxh3_64_intdigest(bytes(record)).to_bytes(8, "little")
    return bytes(record)


def flags_and_lengths(record: bytes) -> tuple[int, ...]:
    header = np.frombuffer(record, HEADER, 1)[0]
    return tuple(int(header[name]) for name in ("flags", "tail_length", "counters_length"))


GOLDEN_ROWS = "00" * 8
GOLDEN_ITEMS = (
    "0200"  # two keys
    "0900"
    "4720fc"  # 7 + 1 * 2^6 + 2 * 2^12 + 63 * 2^18
    "2c01"
    "3f0004"  # 63 + 1 * 2^18
)
GOLDEN_GENRES = (
    "0100"  # one key
    "c8"
    "48a22c"  # 8 + 9 * 2^6 + 10 * 2^12 + 11 * 2^18
)
GOLDEN_TAIL = (
    "0900000001000000"
    "2c01000000000000"  # 300 ms and 0 ms before the newest event
    "00ff"
)


@pytest.mark.parametrize(
    ("layout", "golden"),
    [(ITEMS, GOLDEN_ITEMS), (CATEGORIES, GOLDEN_ITEMS + GOLDEN_GENRES)],
    ids=["items", "categories"],
)
@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "authenticated"])
def test_golden_bytes(layout, golden, key):
    first, second = encode(layout, key)
    code = 16 if key else 0
    assert first[128 : len(first) - code].hex() == GOLDEN_ROWS + golden + GOLDEN_TAIL
    assert flags_and_lengths(first) == (3 if key else 2, 2, len(golden) // 2)
    assert second[128 : len(second) - code].hex() == GOLDEN_ROWS + "0000" * len(layout.spec.fields)
    assert flags_and_lengths(second) == (3 if key else 2, 0, 2 * len(layout.spec.fields))


def test_times_that_are_too_old_for_four_bytes_take_eight():
    for before, short in ((2**32 - 1, True), (2**32, False)):
        tail = dataclasses.replace(TAIL, times=np.array([LAST - before, LAST]))
        records = encode(ITEMS, tail=tail)
        assert flags_and_lengths(records[0])[0] == (2 if short else 0)
        assert read_records(records, USERS, spec_of(ITEMS)).tail.times.tolist() == [LAST - before, LAST]


def test_a_layout_has_the_fewest_bytes_per_key():
    for largest, num_bytes in ((1, 1), (255, 1), (256, 2), (65_535, 2), (65_536, 3), (2**24, 4), (0, 1)):
        assert CounterLayout.of(CounterSpec(), [largest]).key_bytes == (num_bytes,)
    assert CounterLayout.from_dict(CATEGORIES.to_dict()) == CATEGORIES
    with pytest.raises(ValueError, match="key_bytes: expected 1 to 4 for each of item, got"):
        CounterLayout(CounterSpec(), (2, 2))


@st.composite
def batches(draw: st.DrawFn) -> tuple[RecordSpec, UserSummaries]:
    num_users, num_fields = draw(st.integers(0, 4)), draw(st.integers(1, 2))
    horizons = draw(st.integers(0, 8))
    counted = CounterSpec(
        ("item", "genre")[:num_fields], (4, 3)[:num_fields], (), tuple(2.0 + i for i in range(horizons))
    )
    layout = CounterLayout(counted, tuple(draw(st.integers(1, 4)) for _ in range(num_fields)))
    last = draw(hnp.arrays(np.int64, num_users))
    lengths = draw(hnp.arrays(np.int64, num_users, elements=st.integers(0, 3)))
    if draw(st.booleans()):
        lengths[:] = 2
    total = int(lengths.sum())
    before = draw(hnp.arrays(np.int64, total, elements=st.integers(0, 2**33)))
    counters = []
    for most, key_bytes in zip(counted.keys, layout.key_bytes, strict=True):
        keys = st.integers(1, min(2 ** (8 * key_bytes), 2**31) - 1)
        values = st.lists(st.integers(0, 63), min_size=counted.num_columns, max_size=counted.num_columns)
        held = [draw(st.dictionaries(keys, values, max_size=most)) for _ in range(num_users)]
        counters.append(codes(counted, held, last.tolist()))
    users = UserSummaries(
        keys=user_keys(list(range(num_users))),
        summary=np.zeros((num_users, 1, 2), np.float32),
        tail=Tail(
            np.arange(total, dtype=np.int32),
            np.repeat(last, lengths) - before,
            np.arange(total, dtype=np.uint8),
            np.concatenate([[0], np.cumsum(lengths)]),
        ),
        event_count=lengths,
        last_event_ts=last,
        history_digest=lengths.astype(np.uint64),
        counters=tuple(counters),
    )
    return RecordSpec(bytes(32), 1, 1, 2, Codec.float32, counters=layout), users


@settings(max_examples=30, deadline=None)
@given(batch=batches())
def test_round_trip_agrees_with_the_reference(batch):
    spec, users = batch
    records = encode_records(users, spec)
    raw = read_records(records, users.keys, spec)
    for name in ("items", "times", "actions", "offsets"):
        np.testing.assert_array_equal(getattr(raw.tail, name), getattr(users.tail, name))
    for read, written in zip(raw.counters, users.counters, strict=True):
        assert read.spec == written.spec
        for name in ("key", "codes", "offsets", "clock"):
            np.testing.assert_array_equal(getattr(read, name), getattr(written, name))
    for index, record in enumerate(records):
        reference, events = decode_record_reference(record, spec.counters), users.tail.of_user(index)
        assert reference["times"].tolist() == events.times.tolist()
        assert reference["items"].tolist() == events.items.tolist()
        one = [written.select(np.array([index])) for written in users.counters]
        assert reference["counters"] == [dict(zip(held.key.tolist(), held.codes.tolist(), strict=True)) for held in one]


@pytest.mark.parametrize("key", [None, bytes(range(32))], ids=["plain", "authenticated"])
def test_damage_is_detected(key):
    records, spec = encode(CATEGORIES, key), spec_of(CATEGORIES, key)
    for bit in range(8 * len(records[0])):
        bad = bytearray(records[0])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError, match="user 42"):
            check_records([bytes(bad), records[1]], USERS, spec)
    for length in range(len(records[0])):
        with pytest.raises(RecordError, match="user 42"):
            check_records([records[0][:length], records[1]], USERS, spec)


def test_lengths_that_do_not_fit_are_refused_even_if_the_checksum_does():
    """Whoever can write a store can make a checksum that fits; no byte beyond the record may be read."""
    record, spec = encode(CATEGORIES)[0], spec_of(CATEGORIES)
    size_of_items, size_of_genres = 128 + 8, 128 + 8 + 2 + 10
    for place, value, named in (
        (HEADER.fields["counters_length"][1], 19, "counters_length"),
        (HEADER.fields["counters_length"][1], 255, "counters_length"),
        (HEADER.fields["counters_length"][1], 0, "counters_length"),
        (HEADER.fields["tail_length"][1], 3, "tail_length"),
        (HEADER.fields["flags"][1], 0, "tail_length"),
        (HEADER.fields["flags"][1], 6, "flags"),
        (size_of_items, 3, "counters_length|number of counted keys"),
        (size_of_items, 255, "number of counted keys"),
        (size_of_genres, 2, "counters_length"),
        (size_of_genres, 0, "counters_length"),
    ):
        bad = bytearray(record)
        bad[place] = value
        with pytest.raises(RecordError, match=rf"user 42.*: ({named}) is"):
            read_records([with_checksum(bad)], USERS[:1], spec)


def test_records_with_another_layout_are_refused():
    for written, read in ((ITEMS, CATEGORIES), (CATEGORIES, ITEMS), (ITEMS, None)):
        with pytest.raises(RecordError, match="user 42"):
            read_records(encode(written), USERS, dataclasses.replace(spec_of(written), counters=read))


def test_counters_that_do_not_fit_the_layout_are_refused():
    users = counted_users(ITEMS)
    for layout, message in (
        (CATEGORIES, "expected those of 2 users for each of item, genre"),
        (CounterLayout(ITEMS.spec, (1,)), "counters of item: at most 3 keys of 1 bytes"),
        (CounterLayout.of(CounterSpec(keys=(1,)), [300]), "expected those of 2 users"),
    ):
        with pytest.raises(ValueError, match=message):
            encode_records(users, spec_of(layout))
    few = CounterSpec(keys=(1,))
    users = dataclasses.replace(users, counters=(dataclasses.replace(users.counters[0], spec=few),))
    with pytest.raises(ValueError, match="counters of item: at most 1 keys"):
        encode_records(users, spec_of(CounterLayout.of(few, [300])))


def test_a_default_record_with_counters_stays_below_the_page_limit():
    """LMDB keeps values of up to 2,020 bytes, under keys of 10 bytes, two to a page of 4,096 bytes."""
    spec = CounterSpec()
    for largest, days_between, most in ((60_000, 1, 2_020 - 128), (60_000, 3, 2_020), (2_000_000, 1, 2_020)):
        layout = CounterLayout.of(spec, [largest])
        held = codes(spec, [{key: [1, 2, 3, 4] for key in range(1, 65)}], [LAST])
        times = LAST - 86_400_000 * days_between * np.arange(32)[::-1]
        tail = Tail(np.zeros(32, np.int32), times, np.zeros(32, np.uint8), np.array([0, 32]))
        events = {"tail": tail, "event_count": np.array([32]), "last_event_ts": np.array([LAST])}
        users = users_of(user_keys([1]), summary=np.zeros((1, 16, 64), np.float32), counters=(held,), **events)
        record = encode_records(users, RecordSpec(bytes(32), 1, 16, 64, Codec.int8, counters=layout))[0]
        assert len(record) <= most


COUNTED = CounterSpec(("item", "genre"), (2, 2), (3.0,), (5.0,))
LENGTHS = [4, 0, 9]
STATE_KEYS = user_keys([1, 2, 3])


def state_spec(
    dtype: StateDtype = StateDtype.float32, counters: CounterSpec | None = COUNTED, pooled_dim: int = 4
) -> StateSpec:
    return StateSpec(bytes(range(32)), 7, 2, 2, 3, dtype, created_at=5, counters=counters, pooled_dim=pooled_dim)


def tables(num_keys: int) -> CounterTable:
    rng, offsets = np.random.default_rng(num_keys), np.cumsum([0, *LENGTHS])
    return CounterTable.of(COUNTED, rng.integers(0, num_keys, offsets[-1]), 10**12 + np.arange(offsets[-1]), offsets)


def states(counters: bool = True, pooled_dim: int = 4) -> StateArrays:
    rng, count = np.random.default_rng(0), len(LENGTHS)
    return StateArrays(
        rng.standard_normal((count, 2, 2, 3, 3)).astype(np.float32),
        rng.random((count, 2)).astype(np.float32),
        rng.random((count, 2)).astype(np.float32),
        *(np.arange(count) + 10 * column for column in range(3)),
        np.arange(count).astype(np.uint64),
        1e3 * rng.standard_normal((count, pooled_dim)),
        (tables(4), tables(2)) if counters else (),
    )


def assert_equal(actual: StateArrays, expected: StateArrays, atol: float = 0.0) -> None:
    for name in ("n", "removed", "clock", "num_events", "applied_segment", "history_digest", "pooled"):
        np.testing.assert_array_equal(getattr(actual, name), getattr(expected, name))
    np.testing.assert_allclose(actual.z, expected.z, atol=atol)
    for one, other in zip(actual.counters, expected.counters, strict=True):
        for name in ("offsets", "clock", "num_events"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
        for name in ("key", "count", "decayed", "last", "last_position"):
            np.testing.assert_array_equal(getattr(one.rows, name), getattr(other.rows, name))


@pytest.mark.parametrize("dtype", [StateDtype.float32, StateDtype.float16])
@pytest.mark.parametrize(("counters", "pooled_dim"), [(True, 4), (False, 4), (True, 0)])
def test_round_trip(dtype, counters, pooled_dim):
    """Counters and sums of item vectors are exact, also in states of float16."""
    spec, whole = state_spec(dtype, COUNTED if counters else None, pooled_dim), states(counters, pooled_dim)
    encoded = encode_states(STATE_KEYS, whole, spec)
    assert len({len(state) for state in encoded}) == (3 if counters else 1)
    atol = 2e-3 if dtype is StateDtype.float16 else 0.0
    assert_equal(decode_states(encoded, STATE_KEYS, spec), whole, atol)
    for row in range(3):  # a batch does not change what is read of a user
        one = decode_states(encoded[row : row + 1], STATE_KEYS[row : row + 1], spec)
        assert_equal(one, whole[row : row + 1], atol)
    assert_equal(decode_states([], [], spec), whole[:0])
    assert_equal(StateArrays.concatenated([whole[:1], whole[1:]]), whole)
    assert_equal(StateArrays.concatenated([whole[np.array([2])], whole[:2]]), whole[np.array([2, 0, 1])])


def test_golden_bytes_of_what_is_added_up():
    """One user: item vectors with the sum [1, -1.5]; key 3 at positions 0 and 2, key 5 at position 1; no horizon."""
    spec = CounterSpec(("item",), (2,), (), ())
    table = CounterTable.of(spec, np.array([3, 5, 3]), np.array([256, 512, 768]), np.array([0, 3]))
    none = np.zeros((1, 0), np.float32)
    zero = np.zeros(1, np.int64)
    z, digest, pooled = np.zeros((1, 0, 0, 0, 0), np.float32), zero.astype(np.uint64), np.array([[1.0, -1.5]])
    arrays = StateArrays(z, none, none, zero, zero + 3, zero, digest, pooled, (table,))
    whole = StateSpec(bytes(32), 1, 0, 0, 0, StateDtype.float32, counters=spec, pooled_dim=2)
    record = encode_states(STATE_KEYS[:1], arrays, whole)[0]
    assert record[120:].hex() == (
        "000000000000f03f"
        "000000000000f8bf"  # 1 and -1.5
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
    header = np.frombuffer(record, STATE_HEADER, 1)[0]
    assert (header["format_version"], header["counters_length"], header["payload_length"]) == (3, 68, 84)


def with_state_checksum(state: bytearray) -> bytes:
    state[112:120] = bytes(8)
    state[112:120] = xxhash.xxh3_64_intdigest(bytes(state)).to_bytes(8, "little")
    return bytes(state)


def test_damage_of_states_is_detected():
    spec = state_spec()
    encoded = encode_states(STATE_KEYS, states(), spec)
    for bit in np.random.default_rng(0).choice(8 * len(encoded[0]), 400, replace=False).tolist():
        bad = bytearray(encoded[0])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError, match="the state of user 1 is corrupt"):
            decode_states([bytes(bad), *encoded[1:]], STATE_KEYS, spec)
    for length in range(len(encoded[0])):
        with pytest.raises(RecordError, match="the state of user 1 is corrupt"):
            decode_states([encoded[0][:length], *encoded[1:]], STATE_KEYS, spec)


def test_sizes_of_states_that_do_not_fit_are_refused_even_if_the_checksum_does():
    spec = state_spec()
    encoded = encode_states(STATE_KEYS, states(), spec)
    size_of_items = spec.least_bytes + 16
    for row in (0, 1, 2):
        for size in (0, 1, 200, 255):
            bad = bytearray(encoded[row])
            if bad[size_of_items] == size:
                continue
            bad[size_of_items] = size
            values = [*encoded[:row], with_state_checksum(bad), *encoded[row + 1 :]]
            with pytest.raises(RecordError, match=rf"the state of user {row + 1} is corrupt .*counters"):
                decode_states(values, STATE_KEYS, spec)


def test_counters_that_are_missing_or_too_many_are_refused():
    for written, read in ((COUNTED, None), (None, COUNTED)):
        encoded = encode_states(STATE_KEYS, states(written is not None), state_spec(counters=written))
        with pytest.raises(RecordError, match="counters"):
            decode_states(encoded, STATE_KEYS, state_spec(counters=read))


def test_sums_of_item_vectors_of_another_width_are_refused():
    for written, read in ((4, 3), (0, 4), (4, 0)):
        encoded = encode_states(STATE_KEYS, states(pooled_dim=written), state_spec(pooled_dim=written))
        with pytest.raises(RecordError, match="the state of user 1 is corrupt"):
            decode_states(encoded, STATE_KEYS, state_spec(pooled_dim=read))


def test_another_generation_changes_only_its_number():
    spec, whole = state_spec(), states()
    moved = restamp_states(encode_states(STATE_KEYS, whole, spec), 9)
    assert moved == encode_states(STATE_KEYS, whole, dataclasses.replace(spec, generation=9))
    assert restamp_states([], 9) == []


def events(count: int, seed: int = 0):
    random = np.random.default_rng(seed)
    keys = random.integers(0, 1 << 64, count, dtype=np.uint64)
    times = random.integers(-(1 << 63), (1 << 63) - 1, count)
    return keys, times, random.integers(0, 256, count).astype(np.uint8)


@pytest.mark.parametrize("count", [0, 1, _CHUNK - 1, _CHUNK, _CHUNK + 1])
def test_equals_xxhash_over_the_17_bytes(count):
    keys, times, actions = events(count)
    expected = [
        xxhash.xxh3_64_intdigest(struct.pack("<QqB", *event))
        for event in zip(keys.tolist(), times.tolist(), actions.tolist(), strict=True)
    ]
    assert event_digests(keys, times, actions).tolist() == expected


def test_digests_are_sums_independent_of_order():
    keys, times, actions = events(50)
    offsets = np.array([0, 0, 20, 20, 50, 50])
    digests = history_digests(keys, times, actions, offsets)
    assert digests[[0, 2, 4]].tolist() == [0, 0, 0]
    whole = history_digests(keys, times, actions, np.array([0, 50]))
    assert (int(digests[1]) + int(digests[3])) % (1 << 64) == int(whole[0])
    order = np.random.default_rng(1).permutation(50)
    shuffled = history_digests(keys[order], times[order], actions[order], np.array([0, 50]))
    assert shuffled.tolist() == whole.tolist()


def test_item_keys():
    assert item_keys([-1, 2]).tolist() == [(1 << 64) - 1, 2]
    assert item_keys(["é"]).tolist() == [xxhash.xxh3_64_intdigest("é".encode())]
    assert item_keys(np.array(["a", "b"])).tolist() == item_keys(np.array(["a", "b"], dtype=object)).tolist()
    assert len(item_keys([])) == 0
    for bad in ([1.5], np.array([None], dtype=object), [b"a"]):
        with pytest.raises(TypeError, match="integers or strings"):
            item_keys(bad)
