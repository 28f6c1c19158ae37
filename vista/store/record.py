"""What one user's record holds, and how it is read (docs/reference/file-formats.md).

A record is a header, K summary rows, user, counters, tail, and code. B users, K summary tokens, d model width, R bytes
of all rows of one user, N rows or events.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.config.checks import Codec
from vista.counters.counters import CODE_BITS, MAX_CODE, CounterCodes, CounterSpec
from vista.errors import RecordError, UserKeyError
from vista.files import TABLE, check_fields, list_of, whole
from vista.log.histories import ranges
from vista.store.keys import user_id

MAX_RECORD_BYTES = 1 << 24
"""Largest record, header included. Larger ones are refused when written, and when read before anything is decoded."""

MAGIC = b"VSUM"
FORMAT_VERSION = 3
HEADER_BYTES = 128
CHECKSUM_OFFSET = 120
AUTHENTICATED = 1
"""Bit of the flags: the record ends with an authentication code."""
SHORT_TIMES = 2
"""Bit of the flags: the times of the tail are uint32, ms before `last_event_ts`. Only in records with counters."""

HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("format_version", "<u2"),
        ("header_length", "<u2"),
        ("flags", "<u4"),
        ("codec", "<u2"),
        ("tokens", "<u2"),
        ("dim", "<u2"),
        ("scale_dtype", "<u2"),
        ("payload_length", "<u4"),
        ("generation", "<u8"),
        ("summarizer_id", "u1", (32,)),
        ("key_hash", "<u8"),
        ("created_at", "<i8"),
        ("last_event_ts", "<i8"),
        ("event_count", "<i8"),
        ("applied_segment", "<u8"),
        ("history_digest", "<u8"),
        ("tail_length", "<u4"),
        ("counters_length", "<u4"),
        ("checksum", "<u8"),
    ]
)
assert HEADER.itemsize == HEADER_BYTES

CODEC_NUMBERS = {Codec.float32: 0, Codec.int8: 1, Codec.float16: 2, Codec.int4: 3}
SCALE_DTYPE_NUMBERS = {Codec.float32: 0, Codec.int8: 1, Codec.float16: 0, Codec.int4: 2}
"""0: no scale; 1: float32 scale and bias per row; 2: float16 scale and bias per row."""

MAX_VALUES = 2**31 - 2
"""Codes and their stored form, which is one larger, are int32 in memory."""

MAX_KEY_BYTES = 4
"""Of a counted key."""

ITEM_BYTES, TIME_BYTES, SHORT_TIME_BYTES, ACTION_BYTES = 4, 8, 4, 1

CHECKSUM_BYTES = 8
"""At the end of the header."""
CODE_BYTES = 16
_RECORD = b"vista record 1"


@dataclass(frozen=True, slots=True)
class RecordSpec:
    """What all records of one generation share."""

    summarizer_id: bytes
    """SHA-256, 32 bytes."""
    generation: int
    num_tokens: int
    """K; 0 if stage 1 is off."""
    dim: int
    codec: Codec
    created_at: int = 0
    """Start of the refresh in ms; a resumed refresh keeps it. Written, not checked."""
    applied_segment: int = 0
    """Newest segment of the log that the records cover. Written, not checked."""
    counters: CounterLayout | None = None
    """How counters are stored; None if records have no counters."""
    user_columns: tuple[UserColumn, ...] = ()
    """Features of the user."""
    tail_columns: tuple[TailColumn, ...] = ()
    """Features of the tail's events."""
    key: bytes | None = field(default=None, repr=False)
    """32 bytes: records end with a code that only holders of the key can make."""

    def __post_init__(self) -> None:
        if len(self.summarizer_id) != 32:
            raise ValueError(f"summarizer_id must be 32 bytes (SHA-256), got {len(self.summarizer_id)}")
        if not 0 <= self.num_tokens < 1 << 16 or not 1 <= self.dim < 1 << 16:
            raise ValueError(
                f"num_tokens must lie in [0, 65535] and dim in [1, 65535], got {self.num_tokens} and {self.dim}"
            )
        if HEADER_BYTES + self.rows_bytes + self.user_bytes + self.code_bytes > MAX_RECORD_BYTES:
            raise ValueError(
                f"{self.num_tokens} rows of {self.row_bytes} bytes do not fit a record of {MAX_RECORD_BYTES} bytes; "
                "use fewer tokens, a smaller dim or a smaller codec"
            )

    @property
    def row_bytes(self) -> int:
        """Bytes of one summary row."""
        match self.codec:
            case Codec.float32:
                return 4 * self.dim
            case Codec.float16:
                return 2 * self.dim
            case Codec.int8:
                return self.dim + 8
            case Codec.int4:
                return (self.dim + 1) // 2 + 4

    @property
    def rows_bytes(self) -> int:
        """R: bytes of all rows of one user."""
        return self.num_tokens * self.row_bytes

    @property
    def user_bytes(self) -> int:
        """Bytes of the features of one user."""
        return sum(column.dtype.itemsize for column in self.user_columns)

    @property
    def code_bytes(self) -> int:
        """Bytes of the authentication code: 16 with a key, 0 without."""
        return 0 if self.key is None else CODE_BYTES


@dataclass(frozen=True, slots=True)
class TailColumn:
    """A category, whose values the model numbers, or a number. The first is stored as 0 for a missing value, else the
    value's code plus 1; the second as float32, NaN if missing."""

    name: str
    size: int | None
    """Number of distinct values of a category; None for a number."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """How a value is stored: the smallest unsigned type that holds `size`, or float32."""
        if self.size is None:
            return np.dtype("<f4")
        return np.min_scalar_type(self.size).newbyteorder("<")

    def stored(self, values: Any) -> NDArray[Any]:
        """[N] values as they are stored, from codes or numbers [N] as in `Tail.features`."""
        column = np.asarray(values)
        return np.ascontiguousarray(column if self.size is None else column + 1, dtype=self.dtype)

    def read(self, stored: NDArray[Any]) -> NDArray[Any]:
        """The inverse of `stored`; int32 or float32 [N]."""
        return stored.astype(np.float32) if self.size is None else stored.astype(np.int32) - np.int32(1)


@dataclass(frozen=True, slots=True)
class UserColumn(TailColumn):
    """A category or a number, stored once per user as a `TailColumn` is once per event.

    The summarizer that a generation names says nothing about features of users, so the column itself says which values
    its codes stand for.
    """

    values: str = ""
    """SHA-256 of the values of a category (`Vocabulary.digest`); "" for a number."""


@dataclass(frozen=True, slots=True)
class CounterLayout:
    """What the counters sections of all records of one generation share: what is counted, and the size of its keys."""

    spec: CounterSpec
    key_bytes: tuple[int, ...]
    """Bytes per key of each field in a record."""

    def __post_init__(self) -> None:
        if len(self.key_bytes) != len(self.spec.fields) or not all(1 <= n <= MAX_KEY_BYTES for n in self.key_bytes):
            raise ValueError(
                f"key_bytes: expected 1 to {MAX_KEY_BYTES} for each of {', '.join(self.spec.fields)}, got "
                f"{self.key_bytes}"
            )

    @classmethod
    def of(cls, spec: CounterSpec, largest_keys: Sequence[int]) -> CounterLayout:
        """The smallest layout that holds the keys 1 to `largest_keys[f]` of each field f."""
        return cls(spec, tuple(max(1, -(-largest.bit_length() // 8)) for largest in largest_keys))

    @property
    def code_bytes(self) -> int:
        """Bytes of the codes of one key in a record."""
        return -(-CODE_BITS * self.spec.num_columns // 8)

    def to_dict(self) -> dict[str, Any]:
        """The layout as JSON values, for manifests."""
        return {"spec": self.spec.to_dict(), "key_bytes": list(self.key_bytes)}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> CounterLayout:
        """The inverse of `to_dict`. Raises ValueError if a field is missing, unknown, or invalid; the message names
        it."""
        check_fields(fields, {"spec": TABLE, "key_bytes": list_of(whole(1, MAX_KEY_BYTES))})
        return cls(CounterSpec.from_dict(fields["spec"]), tuple(fields["key_bytes"]))


@dataclass(frozen=True, slots=True)
class Tail:
    """Last events of B users, packed: users end to end, oldest event first."""

    items: NDArray[np.int32]
    """[N] item rows of the model's vocabulary (in records), 0 for unknown items."""
    times: NDArray[np.int64]
    """[N] ms, or the ordinal in a log without times."""
    actions: NDArray[np.uint8]
    """[N] action codes. Callers of the scorer can pass names."""
    offsets: NDArray[np.int64]
    """[B+1]."""
    features: Mapping[str, Any] = field(default_factory=dict)
    """By name of a column, [N] each: in records, int32 codes of the model's values, -1 for a missing one, or float32
    numbers, NaN for a missing one. Callers of the scorer pass the values themselves."""

    @staticmethod
    def empty(num_users: int) -> Tail:
        """Tails without events and columns of features."""
        return Tail(
            np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.uint8), np.zeros(num_users + 1, np.int64)
        )

    @staticmethod
    def concatenated(tails: Sequence[Tail]) -> Tail:
        """The tails of all parts, end to end; at least one part, all with the same columns of features."""
        if len(tails) == 1:
            return tails[0]
        return Tail(
            np.concatenate([tail.items for tail in tails]),
            np.concatenate([tail.times for tail in tails]),
            np.concatenate([tail.actions for tail in tails]),
            offsets_of(np.concatenate([np.diff(tail.offsets) for tail in tails])),
            {name: np.concatenate([tail.features[name] for tail in tails]) for name in tails[0].features},
        )

    def select(self, index: Any, offsets: NDArray[np.int64]) -> Tail:
        """The events at `index`, as NumPy indexes, with new offsets."""
        features = {name: column[index] for name, column in self.features.items()}
        return Tail(self.items[index], self.times[index], self.actions[index], offsets, features)

    def of_user(self, row: int) -> Tail:
        """The tail of one of the users (B = 1)."""
        start, stop = self.offsets[row : row + 2].tolist()
        return self.select(slice(start, stop), np.array([0, stop - start], np.int64))


def event_bytes(short_times: NDArray[np.bool_], columns: Sequence[TailColumn]) -> NDArray[np.int64]:
    """Bytes of one event in each of B tails, by whether its times are short."""
    fixed = ITEM_BYTES + ACTION_BYTES + sum(column.dtype.itemsize for column in columns)
    return fixed + np.where(short_times, SHORT_TIME_BYTES, TIME_BYTES)


def read_tails(
    records: JoinedRecords,
    first: NDArray[np.int64] | int,
    lengths: NDArray[np.int64],
    columns: Sequence[TailColumn],
    keys: Sequence[bytes],
) -> Tail:
    """The tails of records whose lengths were checked.

    Args:
        records: B records.
        first: place of the section in each record, [B] or the same for all.
        lengths: [B] events of each tail.
        columns: of the tails' features.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    offsets = offsets_of(lengths)
    headers = records.headers
    short = (headers["flags"] & SHORT_TIMES) != 0
    times_at = first + ITEM_BYTES * lengths
    actions_at = first + (event_bytes(short, ()) - ACTION_BYTES) * lengths
    items = np.array(records.cut(first, times_at)).reshape(-1).view("<i4")
    actions = np.array(records.cut(actions_at, actions_at + lengths)).reshape(-1)
    features = read_features(records, actions_at + lengths, lengths, columns, keys, "")
    if not short.any():
        times = np.array(records.cut(times_at, actions_at)).reshape(-1).view("<i8")
        return Tail(items, times, actions, offsets, features)
    times = np.repeat(headers["last_event_ts"].astype(np.int64), lengths)
    if short.all():
        times -= np.ascontiguousarray(records.cut(times_at, actions_at)).reshape(-1).view("<u4")
    else:
        content, is_short = np.frombuffer(records.content, np.uint8), np.repeat(short, lengths)
        start = records.starts + times_at
        times[is_short] -= content[ranges(start[short], SHORT_TIME_BYTES * lengths[short])].view("<u4")
        times[~is_short] = content[ranges(start[~short], TIME_BYTES * lengths[~short])].view("<i8")
    return Tail(items, times, actions, offsets, features)


def read_features(
    records: JoinedRecords,
    first: Int | int,
    lengths: Int | int,
    columns: Sequence[TailColumn],
    keys: Sequence[bytes],
    owner: str,
) -> dict[str, NDArray[Any]]:
    """Features of B users or their events: by name, int32 codes, -1 for a missing one, or float32 numbers.

    Args:
        records: B records whose lengths were checked.
        first: place of the first column in each record.
        lengths: values of a column in each record.
        columns: of the generation.
        keys: the B users' keys, for errors.
        owner: what the features are of, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize * lengths
        stored = np.ascontiguousarray(records.cut(first, last)).reshape(-1).view(column.dtype)
        is_valid = ~np.isinf(stored) if column.size is None else stored <= column.size
        if not is_valid.all():
            value = np.flatnonzero(~is_valid)[:1]
            users = [keys[user] for user in np.repeat(np.arange(len(keys)), lengths)[value]]
            expected = "a finite number" if column.size is None else f"at most {column.size}"
            check_field(is_valid[value], users, stored[value], f"feature {column.name!r}{owner}", expected)
        features[column.name] = column.read(stored)
        first = last
    return features


def dequantize_rows(packed: NDArray[np.uint8], codec: Codec, dim: int) -> NDArray[np.float32]:
    """Decode stored rows: [N, row_bytes(codec, d)] uint8, contiguous -> [N, d] float32. For int8 and int4 (FBGEMM's
    layouts), value = q * scale + bias, rounded once."""
    match codec:
        case Codec.float32:
            return packed.view("<f4")
        case Codec.float16:
            return packed.view("<f2").astype(np.float32)
        case Codec.int8:
            return _scaled(packed[:, :dim], packed[:, dim:].copy().view("<f4"))
        case Codec.int4:
            size = (dim + 1) // 2
            values = np.stack([packed[:, :size] & 0x0F, packed[:, :size] >> 4], -1).reshape(len(packed), 2 * size)
            return _scaled(values[:, :dim], packed[:, size:].copy().view("<f2"))


def _scaled(values: NDArray[np.uint8], factors: NDArray[np.floating]) -> NDArray[np.float32]:
    """Values [N, d] times the scale, plus the bias, of factors [N, 2]. In float64, which holds the products exactly."""
    scale, bias = factors.astype(np.float64).T[:, :, None]
    with np.errstate(invalid="ignore"):  # the header of a damaged row; the checksum tells
        rows: NDArray[np.float32] = (values * scale + bias).astype(np.float32)
    return rows


def record_code(key: bytes, user_key: bytes, header: bytes, payload: Sequence[bytes | memoryview]) -> bytes:
    """16 bytes over the length of the user's key (uint16), that key, the header with a zero checksum, the payload.

    For stores that cross a trust boundary: only holders of the authentication key can make, change or move records.
    The key is never kept in a store, which holds `key_id`, from which it cannot be derived.
    """
    code = hashlib.blake2b(len(user_key).to_bytes(2, "little"), digest_size=CODE_BYTES, key=key, person=_RECORD)
    code.update(user_key)
    code.update(header)
    for part in payload:
        code.update(part)
    return code.digest()


def check_field(ok: NDArray[np.bool_], keys: Sequence[bytes], actual: Any, field: str, expected: Any) -> None:
    """Refuse a batch of B records if a field of one of them is wrong.

    Args:
        ok: [B] whether each record's field is right.
        keys: B user keys.
        actual: [B] what each record holds.
        field: its name in the error.
        expected: [B], or one value for all.

    Raises:
        RecordError: not all are right; the message names the first user and the field.
    """
    if ok.all():
        return
    index = int(np.flatnonzero(~ok)[0])
    if isinstance(expected, np.ndarray):
        expected = expected[index]
    raise RecordError(
        f"the record of {user_of(keys[index])} is corrupt or of another format: {field} is {actual[index]}, expected "
        f"{expected}. Refresh the store again, or publish the previous generation (`vista store rollback`)"
    )


def user_of(key: bytes) -> str:
    """How an error names the user of a key, which may be damaged."""
    try:
        return f"user {user_id(key)!r}"
    except UserKeyError:
        return f"key {key!r}"


class JoinedRecords:
    """Records, or states, copied end to end, with zeros for their checksums, which end their headers."""

    def __init__(
        self, values: Sequence[bytes | memoryview], lengths: NDArray[np.int64], header: np.dtype[np.void]
    ) -> None:
        self.content = bytearray().join(values)
        self.stops = lengths.cumsum()
        self.starts = self.stops - lengths
        self.one_length = len(lengths) > 0 and not np.count_nonzero(lengths != lengths[0])
        """Whether all records have the same length: the usual case, in which fields are columns of a matrix."""
        size = header.itemsize
        self.headers = self.cut(0, size).reshape(-1).copy().view(header)
        """[B], with the checksums as stored."""
        if self.one_length:
            self._table()[:, size - CHECKSUM_BYTES : size] = 0
        else:
            places = self.starts[:, None] + np.arange(size - CHECKSUM_BYTES, size)
            np.frombuffer(self.content, np.uint8)[places] = 0

    def views(self) -> list[memoryview]:
        """Of each record."""
        view = memoryview(self.content)
        return [view[start:stop] for start, stop in zip(self.starts.tolist(), self.stops.tolist(), strict=True)]

    def cut(self, first: NDArray[np.int64] | int, last: NDArray[np.int64] | int) -> NDArray[np.uint8]:
        """Bytes first to last of each record, which may differ by record [B]. Returns [B, bytes], a view, if the
        records are of one length and the bytes are at one place; otherwise flat."""
        if self.one_length:
            begin, end = _common(first), _common(last)
            if begin is not None and end is not None:
                return self._table()[:, begin:end]
        view = memoryview(self.content)
        bounds = zip((self.starts + first).tolist(), (self.starts + last).tolist(), strict=True)
        return np.frombuffer(bytearray().join([view[start:stop] for start, stop in bounds]), np.uint8)

    def _table(self) -> NDArray[np.uint8]:
        return np.frombuffer(self.content, np.uint8).reshape(len(self.starts), -1)


def _common(places: NDArray[np.int64] | int) -> int | None:
    """The value that all places have; None if they differ."""
    if isinstance(places, int):
        return places
    return int(places[0]) if (places == places[0]).all() else None


_KEY_HASH_BYTES = slice(64, 72)
_SHARED_FIELDS = ("magic", "format_version", "header_length", "codec", "tokens", "dim", "scale_dtype", "generation")
"""Fields that, like summarizer_id, are equal in all records of a generation; their bytes follow."""
_SHARED_BYTES = np.r_[0:8, 12:20, 24:64]

SIZE_BYTES = 2
"""The number of keys of a field of counters, uint16."""


def sum_of_checksums(records: Sequence[bytes | memoryview]) -> int:
    """Sum mod 2^64 of the checksums in the records' headers."""
    checksums = b"".join([record[CHECKSUM_OFFSET:HEADER_BYTES] for record in records])
    return int(np.frombuffer(checksums, "<u8").sum(dtype=np.uint64))


def check_records(
    values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec
) -> tuple[JoinedRecords, list[Int]]:
    """Check a batch of stored values as `read_records` does; returns them with the sizes of their counters."""
    lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    check_field(lengths >= HEADER_BYTES, keys, lengths, "length", f"at least {HEADER_BYTES} bytes")
    check_field(lengths <= MAX_RECORD_BYTES, keys, lengths, "length", f"at most {MAX_RECORD_BYTES} bytes")
    records = JoinedRecords(values, lengths, HEADER)
    headers = records.headers

    def require(field: str, expected: Any) -> None:
        check_field(headers[field] == expected, keys, headers[field], field, expected)

    template = record_template(spec)
    shared = headers.view(np.uint8).reshape(-1, HEADER_BYTES)[:, _SHARED_BYTES]
    alike = bool((shared == np.frombuffer(template.tobytes(), np.uint8)[_SHARED_BYTES]).all())
    if not alike:  # The usual case is one comparison for all; fields are checked by name only to report a difference.
        for field in _SHARED_FIELDS[:3]:
            require(field, template[field])
    require("payload_length", lengths - HEADER_BYTES)
    views = records.views()
    require("checksum", np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, views)), ">u8"))
    if not alike:
        for field in _SHARED_FIELDS:
            require(field, template[field])
        summarizer_ids = [row.tobytes().hex() for row in headers["summarizer_id"]]
        same = np.array(summarizer_ids) == spec.summarizer_id.hex()
        check_field(same, keys, summarizer_ids, "summarizer_id", spec.summarizer_id.hex())
    require("key_hash", key_hashes(keys))
    counters_at = HEADER_BYTES + spec.rows_bytes + spec.user_bytes
    tail_bytes = lengths - counters_at - spec.code_bytes
    sizes: list[NDArray[np.int64]] = []
    if spec.counters is None:
        require("flags", template["flags"])
        require("counters_length", 0)
    else:
        require("flags", template["flags"] | headers["flags"] & SHORT_TIMES)
        length = headers["counters_length"].astype(np.int64)
        check_field(length <= tail_bytes, keys, length, "counters_length", tail_bytes)
        sizes = counter_sizes(records, counters_at, spec.counters, keys)
        tail_bytes -= length
    bytes_per_event = event_bytes(headers["flags"] & SHORT_TIMES != 0, spec.tail_columns)
    require("tail_length", tail_bytes // bytes_per_event)
    check_field(tail_bytes % bytes_per_event == 0, keys, lengths, "length", "whole tail events")
    if spec.key is not None:
        _check_codes(views, keys, spec.key)
    return records, sizes


def _check_codes(views: Sequence[memoryview], keys: Sequence[bytes], key: bytes) -> None:
    for view, user in zip(views, keys, strict=True):
        code = record_code(key, user, bytes(view[:HEADER_BYTES]), [view[HEADER_BYTES:-CODE_BYTES]])
        if not hmac.compare_digest(view[-CODE_BYTES:], code):
            raise RecordError(
                f"the record of {user_of(user)} has a wrong authentication code: it was not written with this key, or "
                "was changed or moved since. Do not serve it; find out who can write to the store, then refresh it"
            )


def check_keys(keys: Sequence[bytes], values: Sequence[memoryview]) -> None:
    """Check keys against the hashes in their records; a key has no checksum of its own. Raises RecordError if a record
    was written under another key."""
    stored = np.array([int.from_bytes(value[_KEY_HASH_BYTES], "little") for value in values], dtype=np.uint64)
    expected = key_hashes(keys)
    check_field(stored == expected, keys, stored, "key_hash", expected)


def key_hashes(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(key_hash_bytes(keys), ">u8")


def key_hash_bytes(keys: Sequence[bytes]) -> bytes:
    """Hashes of keys, 8 bytes each, big-endian."""
    return b"".join(map(xxhash.xxh3_64_digest, keys))


@lru_cache(maxsize=16)
def record_template(spec: RecordSpec) -> np.void:
    header = np.zeros(1, dtype=HEADER)
    header["magic"] = MAGIC
    header["format_version"] = FORMAT_VERSION
    header["header_length"] = HEADER_BYTES
    header["flags"] = 0 if spec.key is None else AUTHENTICATED
    header["codec"] = CODEC_NUMBERS[spec.codec]
    header["tokens"] = spec.num_tokens
    header["dim"] = spec.dim
    header["scale_dtype"] = SCALE_DTYPE_NUMBERS[spec.codec]
    header["generation"] = spec.generation
    header["summarizer_id"] = np.frombuffer(spec.summarizer_id, np.uint8)
    header["created_at"] = spec.created_at
    header["applied_segment"] = spec.applied_segment
    template: np.void = header[0]
    return template


def counter_sizes(
    records: JoinedRecords, first: int, layout: CounterLayout, keys: Sequence[bytes]
) -> list[NDArray[np.int64]]:
    """Number of keys of each field per user, [B] for each field, checked against the length of the section.

    Args:
        records: B records with a `counters_length` that lies within each of them.
        first: place of the section in each record.
        layout: of the generation.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: the fields do not fill the section exactly; the message names the user.
    """
    length = records.headers["counters_length"].astype(np.int64)
    sizes, at = [], np.zeros_like(length)
    for most, key_bytes in zip(layout.spec.keys, layout.key_bytes, strict=True):
        check_field(at + SIZE_BYTES <= length, keys, length, "counters_length", at + SIZE_BYTES)
        size = np.ascontiguousarray(records.cut(first + at, first + at + SIZE_BYTES)).reshape(-1).view("<u2")
        check_field(size <= most, keys, size, "number of counted keys", f"at most {most}")
        sizes.append(size.astype(np.int64))
        at = at + SIZE_BYTES + sizes[-1] * (key_bytes + layout.code_bytes)
    check_field(at == length, keys, length, "counters_length", at)
    return sizes


def read_counters(
    records: JoinedRecords, first: int, layout: CounterLayout, sizes: Sequence[NDArray[np.int64]]
) -> tuple[CounterCodes, ...]:
    """The counters of checked records, one for each field.

    Args:
        records: B records.
        first: place of the section in each record.
        layout: of the generation.
        sizes: from `counter_sizes`.
    """
    counters, clock = [], records.headers["last_event_ts"].astype(np.int64)
    at = np.full(len(clock), first, np.int64)
    for size, key_bytes in zip(sizes, layout.key_bytes, strict=True):
        at = at + SIZE_BYTES
        stop = at + size * (key_bytes + layout.code_bytes)
        entries = np.ascontiguousarray(records.cut(at, stop)).reshape(-1, key_bytes + layout.code_bytes)
        key, packed = _widened(entries[:, :key_bytes], 4), _widened(entries[:, key_bytes:], 8)
        codes = np.empty((len(entries), layout.spec.num_columns), np.uint8)
        for column in range(layout.spec.num_columns):
            codes[:, column] = packed >> np.uint64(CODE_BITS * column) & np.uint64(MAX_CODE)
        offsets = offsets_of(size)
        counters.append(CounterCodes(layout.spec, key.view("<i4"), codes, offsets, clock))
        at = stop
    return tuple(counters)


def _widened(number: NDArray[np.uint8], width: int) -> NDArray[Any]:
    """Little-endian numbers [E, bytes] as unsigned integers of `width` bytes, [E]."""
    wide = np.zeros((len(number), width), np.uint8)
    wide[:, : number.shape[1]] = number
    return wide.view(f"<u{width}")[:, 0]
