"""Records with counters: their bytes, the round trip, damage, and their size."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.record_reference import decode_record_reference
from vista.config.choices import Codec
from vista.counters.counter_codes import CounterCodes
from vista.counters.counter_spec import CounterSpec
from vista.errors import RecordError
from vista.log.gaps import NO_TIMESTAMP
from vista.store.format.counter_layout import CounterLayout
from vista.store.format.keys import user_keys
from vista.store.format.record import check_records, encode_records, read_records
from vista.store.format.record_spec import HEADER, RecordSpec
from vista.store.tail import Tail
from vista.store.user_summaries import UserSummaries

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
    users = UserSummaries(
        keys=USERS,
        summary=np.zeros((2, 1, 4), np.float32),
        tail=tail,
        event_count=np.array([2, 0]),
        last_event_ts=np.array([LAST, NO_TIMESTAMP]),
        history_digest=np.zeros(2, np.uint64),
        counters=counters_of(layout),
    )
    return encode_records(users, spec_of(layout, key))


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
def test_golden_bytes(layout: CounterLayout, golden: str, key: bytes | None) -> None:
    first, second = encode(layout, key)
    code = 16 if key else 0
    assert first[128 : len(first) - code].hex() == GOLDEN_ROWS + golden + GOLDEN_TAIL
    assert flags_and_lengths(first) == (3 if key else 2, 2, len(golden) // 2)
    assert second[128 : len(second) - code].hex() == GOLDEN_ROWS + "0000" * len(layout.spec.fields)
    assert flags_and_lengths(second) == (3 if key else 2, 0, 2 * len(layout.spec.fields))


def test_times_that_are_too_old_for_four_bytes_take_eight() -> None:
    for before, short in ((2**32 - 1, True), (2**32, False)):
        tail = dataclasses.replace(TAIL, times=np.array([LAST - before, LAST]))
        records = encode(ITEMS, tail=tail)
        assert flags_and_lengths(records[0])[0] == (2 if short else 0)
        assert read_records(records, USERS, spec_of(ITEMS)).tail.times.tolist() == [LAST - before, LAST]


def test_a_layout_has_the_fewest_bytes_per_key() -> None:
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


@settings(max_examples=60, deadline=None)
@given(batch=batches())
def test_round_trip_agrees_with_the_reference(batch: tuple[RecordSpec, UserSummaries]) -> None:
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
def test_damage_is_detected(key: bytes | None) -> None:
    records, spec = encode(CATEGORIES, key), spec_of(CATEGORIES, key)
    for bit in range(8 * len(records[0])):
        bad = bytearray(records[0])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError, match="user 42"):
            check_records([bytes(bad), records[1]], USERS, spec)
    for length in range(len(records[0])):
        with pytest.raises(RecordError, match="user 42"):
            check_records([records[0][:length], records[1]], USERS, spec)


def test_lengths_that_do_not_fit_are_refused_even_if_the_checksum_does() -> None:
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


def test_records_with_another_layout_are_refused() -> None:
    for written, read in ((ITEMS, CATEGORIES), (CATEGORIES, ITEMS), (ITEMS, None)):
        with pytest.raises(RecordError, match="user 42"):
            read_records(encode(written), USERS, dataclasses.replace(spec_of(written), counters=read))


def test_counters_that_do_not_fit_the_layout_are_refused() -> None:
    users = UserSummaries(
        keys=USERS,
        summary=np.zeros((2, 1, 4), np.float32),
        tail=TAIL,
        event_count=np.array([2, 0]),
        last_event_ts=np.array([LAST, NO_TIMESTAMP]),
        history_digest=np.zeros(2, np.uint64),
        counters=counters_of(ITEMS),
    )
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


def test_a_default_record_with_counters_stays_below_the_page_limit() -> None:
    """LMDB keeps values of up to 2,020 bytes, under keys of 10 bytes, two to a page of 4,096 bytes."""
    spec = CounterSpec()
    for largest, days_between, most in ((60_000, 1, 2_020 - 128), (60_000, 3, 2_020), (2_000_000, 1, 2_020)):
        layout = CounterLayout.of(spec, [largest])
        held = codes(spec, [{key: [1, 2, 3, 4] for key in range(1, 65)}], [LAST])
        times = LAST - 86_400_000 * days_between * np.arange(32)[::-1]
        users = UserSummaries(
            keys=user_keys([1]),
            summary=np.zeros((1, 16, 64), np.float32),
            tail=Tail(np.zeros(32, np.int32), times, np.zeros(32, np.uint8), np.array([0, 32])),
            event_count=np.array([32]),
            last_event_ts=np.array([LAST]),
            history_digest=np.zeros(1, np.uint64),
            counters=(held,),
        )
        record = encode_records(users, RecordSpec(bytes(32), 1, 16, 64, Codec.int8, counters=layout))[0]
        assert len(record) <= most
