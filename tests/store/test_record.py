"""Records: their bytes, codecs, and keys; round trips, and refusals of what is damaged, foreign or too large."""

from __future__ import annotations

import dataclasses
import struct

import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tests.record_reference import decode_record_reference, error_bound
from vista.config.checks import Codec
from vista.errors import RecordError, StoreError, UserKeyError
from vista.log.histories import NO_TIMESTAMP
from vista.store.keys import MAX_KEY_BYTES, user_id, user_key, user_keys
from vista.store.record import (
    HEADER,
    HEADER_BYTES,
    MAX_RECORD_BYTES,
    RecordSpec,
    Tail,
    TailColumn,
    UserColumn,
    dequantize_rows,
)
from vista.store.record_encoding import encode_records, quantize_rows
from vista.store.record_reading import read_records
from vista.store.state_record import UserSummaries

SPEC = RecordSpec(bytes(range(32)), 7, 2, 4, Codec.int8, created_at=1_700_000_000_123, applied_segment=3)
USERS = [42, -5]
SUMMARY = np.array(
    [[[0, 1, 2, 255], [-1, 0.25, 0.5, 1]], [[0, 0, 0, 0], [3, 3, 3, 3]]], dtype=np.float32
)  # User -5: rows without range.
TAIL = Tail(
    np.array([9, 1], np.int32), np.array([-1, 1 << 40], np.int64), np.array([0, 255], np.uint8), np.array([0, 2, 2])
)
USER_COLUMNS = (UserColumn("region", 255, "ab" * 32), UserColumn("city", 256, "cd" * 32), UserColumn("age", None))
USER_FEATURES = {
    "region": np.array([254, -1], np.int32),
    "city": np.array([-1, 255], np.int32),
    "age": np.array([1.5, np.nan], np.float32),
}
COLUMNS = (TailColumn("surface", 255), TailColumn("page", 256), TailColumn("dwell", None))
DTYPES = {"surface": "u1", "page": "<u2", "dwell": "<f4"}
FEATURES = {
    "surface": np.array([254, -1], np.int32),
    "page": np.array([-1, 255], np.int32),
    "dwell": np.array([np.nan, 1.5], np.float32),
}
TAILS = {
    "plain": (SPEC, TAIL),
    "with features": (dataclasses.replace(SPEC, tail_columns=COLUMNS), dataclasses.replace(TAIL, features=FEATURES)),
}
GOLDEN_HEADER = (
    "5653554d"  # magic "VSUM"
    "0300"  # format version
    "8000"  # header length
    "00000000"  # flags
    "{codec}0002000400{scale}00"  # codec, tokens, dim, scale dtype
    "{payload}"  # payload length
    "0700000000000000"  # generation
    "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f"  # summarizer_id
    "{key_hash}"
    "7b68e5cf8b010000"  # created_at
    "0000000000010000"  # last_event_ts
    "0200000000000000"  # event_count
    "0300000000000000"  # applied segment
    "efcdab8967452301"  # history digest
    "02000000"  # tail length
    "00000000"  # counters length
    "{checksum}"
)
GOLDEN_TAIL = "0900000001000000ffffffffffffffff000000000001000000ff"
GOLDEN_INT8 = (
    GOLDEN_HEADER.format(
        codec="01", scale="01", payload="32000000", key_hash="a624af5bb76f6e4f", checksum="c969e24b7c61db45"
    )
    + "000102ff"
    "0000803f"
    "00000000"  # scale 1, bias 0
     + "009fbfff"
    "8180003c"
    "000080bf"  # scale 2 / 255, bias -1
     + GOLDEN_TAIL
)
GOLDEN_FLOAT32 = (
    GOLDEN_HEADER.format(
        codec="00", scale="00", payload="3a000000", key_hash="a624af5bb76f6e4f", checksum="39ed0b8f187788e9"
    )
    + "000000000000803f0000004000007f43"
    "000080bf0000803e0000003f0000803f" + GOLDEN_TAIL
)
GOLDEN_FLOAT16 = (
    GOLDEN_HEADER.format(
        codec="02", scale="00", payload="2a000000", key_hash="a624af5bb76f6e4f", checksum="3b3a330a3ce12a84"
    )
    + "0000003c0040f85b"
    "00bc00340038003c" + GOLDEN_TAIL
)
GOLDEN_INT4 = (
    GOLDEN_HEADER.format(
        codec="03", scale="02", payload="26000000", key_hash="a624af5bb76f6e4f", checksum="96d22fc16350437b"
    )
    + "00f0"  # two values per byte, the first one in the low half
    "404c"
    "0000"  # scale 17, bias 0
    "90fb"
    "4430"
    "00bc"  # scale 2 / 15, bias -1
     + GOLDEN_TAIL
)
GOLDEN_FEATURES = (
    GOLDEN_HEADER.format(
        codec="00", scale="00", payload="48000000", key_hash="a624af5bb76f6e4f", checksum="b68522dc1ad93a07"
    )
    + GOLDEN_FLOAT32[256:]
    + "ff00"
    "00000001"
    "0000c07f0000c03f"
)
GOLDEN = {
    Codec.int8: GOLDEN_INT8,
    Codec.float32: GOLDEN_FLOAT32,
    Codec.float16: GOLDEN_FLOAT16,
    Codec.int4: GOLDEN_INT4,
}


def summaries(summary: np.ndarray = SUMMARY, tail: Tail = TAIL, features: dict | None = None) -> UserSummaries:
    return UserSummaries(
        keys=user_keys(USERS),
        summary=summary,
        tail=tail,
        event_count=np.array([2, 0]),
        last_event_ts=np.array([1 << 40, NO_TIMESTAMP]),
        history_digest=np.array([0x0123456789ABCDEF, 0], dtype=np.uint64),
        features=features or {},
    )


def encode(
    spec: RecordSpec = SPEC, summary: np.ndarray = SUMMARY, tail: Tail = TAIL, features: dict | None = None
) -> list[bytes]:
    return encode_records(summaries(summary, tail, features), spec)


def with_checksum(record: bytearray) -> bytes:
    record[120:128] = bytes(8)
    record[120:128] = xxhash.xxh3_64_intdigest(bytes(record)).to_bytes(8, "little")
    return bytes(record)


@pytest.mark.parametrize("codec", Codec)
def test_golden_bytes(codec):
    assert encode(dataclasses.replace(SPEC, codec=codec))[0].hex() == GOLDEN[codec]


def test_golden_bytes_of_features():
    spec, tail = TAILS["with features"]
    assert encode(dataclasses.replace(spec, codec=Codec.float32), tail=tail)[0].hex() == GOLDEN_FEATURES


def test_golden_bytes_of_a_user():
    """Between the rows and the tail."""
    spec = dataclasses.replace(SPEC, codec=Codec.float32, user_columns=USER_COLUMNS)
    first, second = encode(spec, features=USER_FEATURES)
    plain, other = encode(dataclasses.replace(spec, user_columns=()))
    rows = 128 + spec.rows_bytes
    assert first[rows : rows + 7].hex() == "ff" + "0000" + "0000c03f"
    assert second[rows : rows + 7].hex() == "00" + "0001" + "0000c07f"
    assert (first[128:rows] + first[rows + 7 :], second[128:rows] + second[rows + 7 :]) == (plain[128:], other[128:])
    raw = read_records([first, second], user_keys(USERS), spec)
    for name, values in USER_FEATURES.items():
        np.testing.assert_array_equal(raw.features[name], values)
        assert raw.features[name].dtype == values.dtype
    np.testing.assert_array_equal(raw.tail.items, TAIL.items)
    empty = read_records([], [], spec)
    assert {name: len(values) for name, values in empty.features.items()} == {"region": 0, "city": 0, "age": 0}


@pytest.mark.parametrize(
    ("place", "content", "message"),
    [
        (0, "ff", r"feature 'region' of the user.*at most 254"),
        (3, "0000807f", r"feature 'age' of the user.*a finite number"),
    ],
)
def test_features_of_a_user_that_no_writer_stores_are_refused(place, content, message):
    columns = (dataclasses.replace(USER_COLUMNS[0], size=254), *USER_COLUMNS[1:])
    spec = dataclasses.replace(SPEC, user_columns=columns)
    record = bytearray(encode(spec, features=USER_FEATURES | {"region": np.array([3, 4], np.int32)})[0])
    at = 128 + spec.rows_bytes + place
    record[at : at + len(content) // 2] = bytes.fromhex(content)
    with pytest.raises(RecordError, match=message):
        read_records([with_checksum(record)], user_keys(USERS[:1]), spec)


def test_golden_checksum_is_xxh3_of_the_rest():
    for golden in (*GOLDEN.values(), GOLDEN_FEATURES):
        assert with_checksum(bytearray.fromhex(golden)).hex() == golden
    key_hash = struct.unpack_from("<Q", bytes.fromhex(GOLDEN_INT8), 64)[0]
    assert key_hash == xxhash.xxh3_64_intdigest(bytes.fromhex("7569800000000000002a"))


LARGEST = {Codec.float32: 2.0**100, Codec.int8: 2.0**100, Codec.float16: 65504.0, Codec.int4: 32752.0}


@settings(max_examples=30, deadline=None)
@given(
    data=st.data(),
    codec=st.sampled_from(Codec),
    shape=st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 9)),
)
def test_round_trip_agrees_with_the_reference(data, codec, shape):
    (num_users, num_tokens, dim), alike = shape, data.draw(st.booleans())
    values = st.floats(-LARGEST[codec], LARGEST[codec], width=32) | st.floats(-1, 1, width=32)
    summary = data.draw(hnp.arrays(np.float32, shape, elements=values))
    lengths = data.draw(hnp.arrays(np.int64, num_users, elements=st.just(3) if alike else st.integers(0, 5)))
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    columns = COLUMNS[: data.draw(st.integers(0, 3))]
    codes = {column.name: column.size for column in columns}
    features = {
        name: data.draw(hnp.arrays(np.float32, total, elements=st.floats(width=32, allow_infinity=False)))
        if size is None
        else data.draw(hnp.arrays(np.int32, total, elements=st.integers(-1, size - 1)))
        for name, size in codes.items()
    }
    tail = Tail(
        data.draw(hnp.arrays(np.int32, total)),
        data.draw(hnp.arrays(np.int64, total)),
        data.draw(hnp.arrays(np.uint8, total)),
        offsets,
        features,
    )
    counts = data.draw(hnp.arrays(np.int64, num_users, elements=st.integers(0, 1 << 62)))
    digests = data.draw(hnp.arrays(np.uint64, num_users))
    spec = RecordSpec(bytes(32), 1, num_tokens, dim, codec, tail_columns=columns)
    keys = user_keys([f"user {number}" for number in range(num_users)])
    users = UserSummaries(
        keys=keys, summary=summary, tail=tail, event_count=counts, last_event_ts=counts, history_digest=digests
    )
    records = encode_records(users, spec)
    raw = read_records(records, keys, spec)
    decoded = raw.summary
    assert list(raw.tail.features) == list(features)
    read = {name: getattr(raw.tail, name) for name in ("items", "times", "actions", "offsets")} | raw.tail.features
    for name, column in read.items():
        expected = features[name] if name in features else getattr(tail, name)
        np.testing.assert_array_equal(column, expected)
        assert column.dtype == expected.dtype and column.flags.aligned and column.flags.c_contiguous
        assert column.flags.writeable and not np.shares_memory(column, raw.summary)
    np.testing.assert_array_equal(raw.headers["event_count"], counts)
    np.testing.assert_array_equal(raw.headers["history_digest"], digests)
    span = np.ptp(summary.astype(np.float64), axis=2)
    for index, record in enumerate(records):
        reference = decode_record_reference(record, features={name: DTYPES[name] for name in features})
        for name, values in features.items():
            own = values[offsets[index] : offsets[index + 1]]
            np.testing.assert_array_equal(reference[name], own if name == "dwell" else own + 1)
        # Both round once, as a fused multiply-add does; a processor without it may differ in the last bit.
        np.testing.assert_allclose(
            decoded[index], reference["summary"], rtol=2e-7, atol=float(np.max(span, initial=0)) * 2e-7
        )
        if num_tokens:
            error = np.abs(decoded[index].astype(np.float64) - summary[index])
            assert (error <= error_bound(codec, summary[index])).all()


@pytest.mark.parametrize("codec", Codec)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_summary_is_refused_and_names_the_user(codec, value):
    summary = SUMMARY.copy()
    summary[1, 1, 2] = value
    with pytest.raises(RecordError, match=r"user -5.*NaN or infinity"):
        encode(dataclasses.replace(SPEC, codec=codec), summary)


def test_a_row_whose_range_overflows_is_refused_and_names_the_user():
    summary = SUMMARY.copy()
    summary[1, 0, :2] = 3e38, -3e38
    with pytest.raises(RecordError, match=r"user -5.*overflows"):
        encode(summary=summary)
    assert len(encode(dataclasses.replace(SPEC, codec=Codec.float32), summary)) == 2


@pytest.mark.parametrize(
    ("codec", "row"),
    [
        (Codec.float16, [65520, 0, 0, 0]),
        (Codec.int4, [-65520, 0, 0, 0]),
        (Codec.int4, [65520, 65520, 65520, 65520]),
        (Codec.int4, [1e6, 0, 0, 0]),
    ],
)
def test_a_row_that_overflows_float16_is_refused_and_names_the_user(codec, row):
    summary = SUMMARY.copy()
    summary[1, 1] = row
    with pytest.raises(RecordError, match=r"user -5 cannot be stored: row 1 .*overflows float16"):
        encode(dataclasses.replace(SPEC, codec=codec), summary)
    assert len(encode(summary=summary)) == 2


def test_large_records_are_refused_when_written_and_when_read():
    with pytest.raises(ValueError, match="do not fit a record"):
        dataclasses.replace(SPEC, num_tokens=65_535, dim=65_535)
    events = MAX_RECORD_BYTES // 13
    tail = Tail(
        np.zeros(events, np.int32), np.zeros(events, np.int64), np.zeros(events, np.uint8), np.array([0, 0, events])
    )
    with pytest.raises(RecordError, match=rf"user -5 would take \d+ bytes, but at most {MAX_RECORD_BYTES}"):
        encode(tail=tail)
    large = with_checksum(bytearray(encode()[0]) + bytes(MAX_RECORD_BYTES))
    with pytest.raises(RecordError, match=rf"user 42 .*length is \d+, expected at most {MAX_RECORD_BYTES} bytes"):
        read_records([large], user_keys(USERS[:1]), SPEC)


def test_values_that_do_not_fit_are_refused():
    spec, tail = TAILS["with features"]
    of_users, short = dataclasses.replace(SPEC, user_columns=USER_COLUMNS), FEATURES | {"page": FEATURES["page"][:1]}
    for change, message in (
        *(({"summary": np.zeros(shape, np.float32)}, "summary must be") for shape in ((2, 2, 5), (1, 2, 4), (2, 8))),
        *(({"tail": dataclasses.replace(TAIL, offsets=np.array(to))}, "tail") for to in ([0, 2], [0, 1, 1])),
        ({"tail": dataclasses.replace(TAIL, times=TAIL.times[:1])}, "tail"),
        ({"spec": spec}, r"features are \[\], but records of this store hold \['surface', 'page', 'dwell'"),
        ({"tail": tail}, r"features are \['surface', 'page', 'dwell'\], but records of this store hold \[\]"),
        ({"spec": spec, "tail": dataclasses.replace(tail, features=short)}, "lengths"),
        ({"spec": of_users}, r"features of users: expected \['region', 'city', 'age'\] of 2 users"),
        ({"spec": of_users, "features": {"age": USER_FEATURES["age"]}}, "features of users: expected"),
        (
            {"spec": of_users, "features": USER_FEATURES | {"age": USER_FEATURES["age"][:1]}},
            "features of users: expected",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            encode(**change)
    with pytest.raises(RecordError, match=r"length"):
        read_records(encode(of_users, features=USER_FEATURES), user_keys(USERS), SPEC)
    with pytest.raises(ValueError, match="32 bytes"):
        dataclasses.replace(SPEC, summarizer_id=b"short")
    for change in ({"num_tokens": 1 << 16}, {"dim": 0}, {"dim": 1 << 16}):
        with pytest.raises(ValueError, match="num_tokens must lie"):
            dataclasses.replace(SPEC, **change)


def test_a_stored_category_beyond_its_size_is_refused():
    spec, tail = TAILS["with features"]
    records = encode(spec, tail=tail)
    narrow = dataclasses.replace(spec, tail_columns=(TailColumn("surface", 254), *COLUMNS[1:]))
    with pytest.raises(RecordError, match=r"user 42 .*feature 'surface' is 255, expected at most 254"):
        read_records(records, user_keys(USERS), narrow)


def test_an_infinite_number_of_an_event_is_refused():
    spec, tail = TAILS["with features"]
    features = FEATURES | {"dwell": np.array([np.nan, -np.inf], np.float32)}
    tail = dataclasses.replace(tail, offsets=np.array([0, 1, 2]), features=features)
    with pytest.raises(RecordError, match=r"user -5 .*feature 'dwell' is -inf, expected a finite number"):
        read_records(encode(spec, tail=tail), user_keys(USERS), spec)


FREE_FIELDS = {"created_at", "last_event_ts", "event_count", "applied_segment", "history_digest", "checksum"}


@pytest.mark.parametrize("field", [name for name in HEADER.names if name not in FREE_FIELDS])
def test_a_wrong_field_with_a_valid_checksum_is_named(field):
    records, keys = encode(), user_keys(USERS)
    bad = bytearray(records[1])
    bad[HEADER.fields[field][1]] ^= 0x10
    with pytest.raises(RecordError, match=rf"user -5.*: {field} is"):
        read_records([records[0], with_checksum(bad)], keys, SPEC)


@pytest.mark.parametrize("kind", TAILS)
def test_all_bit_flips_are_detected(kind):
    spec, tail = TAILS[kind]
    records, keys = encode(spec, tail=tail), user_keys(USERS)
    for bit in range(8 * len(records[0])):
        bad = bytearray(records[0])
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordError, match="user 42"):
            read_records([bytes(bad), records[1]], keys, spec)


@pytest.mark.parametrize("kind", TAILS)
def test_truncated_extended_and_swapped_records_are_detected(kind):
    spec, tail = TAILS[kind]
    records, keys = encode(spec, tail=tail), user_keys(USERS)
    for length in range(len(records[0])):
        with pytest.raises(RecordError):
            read_records([records[0][:length], records[1]], keys, spec)
    with pytest.raises(RecordError, match="payload_length"):
        read_records([records[0] + b"\0", records[1]], keys, spec)
    with pytest.raises(RecordError, match="key_hash"):
        read_records(records[::-1], keys, spec)


@pytest.mark.parametrize(
    "change",
    [
        *({"summarizer_id": bytes(32)}, {"generation": 8}, {"num_tokens": 1}, {"dim": 3}, {"codec": Codec.float32}),
        {"tail_columns": COLUMNS},
    ],
)
def test_records_of_another_spec_are_refused(change):
    with pytest.raises(RecordError):
        read_records(encode(), user_keys(USERS), dataclasses.replace(SPEC, **change))


def test_read_arrays_outlive_and_do_not_alias_the_values():
    values = [bytearray(record) for record in encode()]
    raw = read_records([memoryview(value) for value in values], user_keys(USERS), SPEC)
    for value in values:
        value[HEADER_BYTES:] = bytes(len(value) - HEADER_BYTES)
    np.testing.assert_allclose(raw.summary, SUMMARY, atol=1 / 255)
    assert raw.tail.items.tolist() == [9, 1]
    assert raw.tail.items.flags.writeable and raw.summary.flags.writeable


def test_quantized_rows_are_fbgemm_rows():
    rows = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)
    packed = quantize_rows(rows, Codec.int8)
    scale, bias = packed[:, 16:].copy().view("<f4").T
    np.testing.assert_array_equal(bias, rows.min(axis=1))
    np.testing.assert_array_equal(scale, np.ptp(rows, axis=1) / np.float32(255))
    np.testing.assert_allclose(dequantize_rows(packed, Codec.int8, 16), rows, atol=float(scale.max()) * 0.501)


@pytest.mark.parametrize("dim", [1, 2, 3, 16, 31])
def test_four_bit_rows_are_fbgemm_rows(dim):
    rows = np.random.default_rng(0).standard_normal((50, dim)).astype(np.float32)
    packed = quantize_rows(rows, Codec.int4)
    width = (dim + 1) // 2
    assert packed.shape == (50, width + 4)
    scale, bias = packed[:, width:].copy().view("<f2").T
    np.testing.assert_array_equal(bias, rows.min(axis=1).astype(np.float16))
    steps = (rows.max(axis=1) - bias.astype(np.float32)) / np.float32(15)
    np.testing.assert_array_equal(scale, np.where(steps == 0, 1, steps).astype(np.float16))
    if dim % 2:  # The unused half of the last byte is zero, so that equal rows have equal bytes.
        assert (packed[:, width - 1] < 16).all()
    else:
        fbgemm = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(rows)).numpy()
        np.testing.assert_array_equal(packed, fbgemm)
    bound = error_bound(Codec.int4, rows)
    assert (np.abs(dequantize_rows(packed, Codec.int4, dim) - rows) <= bound).all()


int64 = st.integers(-(1 << 63), (1 << 63) - 1)


def test_golden_bytes_of_keys():
    assert user_key(0).hex() == "7569" + "8000000000000000"
    assert user_key(-1).hex() == "7569" + "7fffffffffffffff"
    assert user_key(258).hex() == "7569" + "8000000000000102"
    assert user_key("é1") == b"us\xc3\xa91"


@given(st.lists(int64, max_size=20))
def test_integer_keys_sort_like_their_ids_and_round_trip(ids):
    keys = user_keys(ids)
    assert [user_id(key) for key in sorted(keys)] == sorted(ids)
    assert keys == [user_key(number) for number in ids] == user_keys(np.array(ids, dtype=np.int64))


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=100))
def test_string_keys_round_trip(text):
    assert user_id(user_key(text)) == text


def test_other_array_types_give_the_same_keys():
    assert user_keys(np.array([1, 2], dtype=np.uint8)) == user_keys([1, 2]) == user_keys([np.int32(1), 2])
    assert user_keys(np.array(["a", "bc"])) == user_keys(["a", "bc"]) == user_keys(np.array(["a", "bc"], dtype=object))
    assert user_keys([]) == user_keys(np.array([], dtype=np.int64)) == []


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        (["a" * (MAX_KEY_BYTES - 1)], "510 bytes"),
        (["é" * 300], "600 bytes"),
        ([1 << 63], "does not fit int64"),
        ([1, -(1 << 63) - 1], "does not fit int64"),
        (np.array([1 << 63], dtype=np.uint64), "does not fit int64"),
        ([1.5], "float"),
        ([True], "bool"),
        ([b"a"], "bytes"),
        ([None], "NoneType"),
        (["\ud800"], "UTF-8"),
        (np.zeros((1, 1), dtype=np.int64), "one-dimensional"),
    ],
)
def test_invalid_ids_are_refused(ids, named):
    assert len(user_key("a" * (MAX_KEY_BYTES - 2))) == MAX_KEY_BYTES  # the longest
    with pytest.raises(UserKeyError, match=named) as error:
        user_keys(ids)
    assert isinstance(error.value, StoreError)


@pytest.mark.parametrize("key", [b"", b"u", b"ui123", b"!cursor", b"us\xff"])
def test_other_bytes_have_no_user_id(key):
    with pytest.raises(UserKeyError):
        user_id(key)
