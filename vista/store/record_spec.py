"""What all records of a generation share, and how they hold rows, tails, and features (docs/reference/file-formats.md).

B users, K summary tokens, d model width, N rows or events.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config.checks import Codec
from vista.counters.counters import CODE_BITS, CounterSpec
from vista.errors import ConfigError, RecordError, UserKeyError
from vista.files import TABLE, check_fields, either, hexadecimal, list_of, one_of, read_limited, text, whole
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

KEY_BYTES = 32
CODE_BYTES = 16
_MOST_KEY_FILE_BYTES = 1024
KEY_VARIABLE = "VISTA_AUTHENTICATION_KEY"
"""Environment variable with the key in 64 hex digits, read if no file is named."""

_RECORD = b"vista record 1"
_KEY_ID = b"vista key id 1"


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
    """32 bytes: records end with a code that only holders of the key can make (`vista.store.record_spec`)."""

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
        return row_bytes(self.codec, self.dim)

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
    """A category, whose values the model numbers, or a number.

    The first is stored as 0 for a missing value, else the value's code plus 1; the second as float32, NaN if missing.
    """

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

    def to_dict(self) -> dict[str, Any]:
        """The column as JSON values, for manifests."""
        return {"name": self.name, "size": self.size}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> TailColumn:
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or invalid; the message names it.
        """
        check_fields(fields, {"name": text(), "size": either(whole(1, MAX_VALUES), one_of(None))})
        return cls(fields["name"], fields["size"])


@dataclass(frozen=True, slots=True)
class UserColumn(TailColumn):
    """A category or a number, stored once per user as a `TailColumn` is once per event.

    The summarizer that a generation names says nothing about features of users, so the column itself says which values
    its codes stand for.
    """

    values: str = ""
    """SHA-256 of the values of a category (`Vocabulary.digest`); "" for a number."""

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, "size": self.size, "values": self.values}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> UserColumn:
        rules = {
            "name": text(),
            "size": either(whole(1, MAX_VALUES), one_of(None)),
            "values": either(hexadecimal(64), one_of("")),
        }
        check_fields(fields, rules)
        return cls(fields["name"], fields["size"], fields["values"])


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
        """The inverse of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown, or invalid; the message names it.
        """
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


def check_tail(tail: Tail, columns: Sequence[TailColumn], num_users: int) -> None:
    """Raise ValueError unless a tail has these columns of features, and its arrays belong to `num_users` users."""
    names = [column.name for column in columns]
    if sorted(tail.features) != sorted(names):
        raise ValueError(f"tail: its features are {list(tail.features)}, but records of this store hold {names}")
    arrays = (tail.items, tail.times, tail.actions, *tail.features.values())
    if len(tail.offsets) != num_users + 1 or any(len(array) != tail.offsets[-1] for array in arrays):
        raise ValueError(f"tail: the lengths of its arrays do not match each other, or the {num_users} users")


def have_short_times(tail: Tail, last_event_ts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether all times of each of B tails are less than 2^32 ms before the user's newest event, [B]."""
    owner = np.repeat(np.arange(len(last_event_ts)), np.diff(tail.offsets))
    before = last_event_ts[owner] - tail.times
    short = np.ones(len(last_event_ts), bool)
    short[owner[(before < 0) | (before >= 1 << 32)]] = False
    return short


def encode_tails(
    tail: Tail, last_event_ts: NDArray[np.int64], short_times: NDArray[np.bool_], columns: Sequence[TailColumn]
) -> list[list[memoryview]]:
    """The parts of each user's tail section: items, times, actions, and features of the last events, in columns.

    Args:
        tail: of B users.
        last_event_ts: [B] times that short times count from.
        short_times: [B] whether a tail is stored with short times.
        columns: of the tail's features.
    """
    lengths = np.diff(tail.offsets)
    items = _flat(np.ascontiguousarray(tail.items, dtype="<i4"))
    times = _flat(np.ascontiguousarray(tail.times, dtype="<i8"))
    short = _flat((np.repeat(last_event_ts, lengths) - tail.times).astype("<u4")) if short_times.any() else times
    actions = _flat(np.ascontiguousarray(tail.actions, dtype=np.uint8))
    features = [(column.dtype.itemsize, _flat(column.stored(tail.features[column.name]))) for column in columns]
    return [
        [
            items[4 * first : 4 * last],
            short[4 * first : 4 * last] if is_short else times[8 * first : 8 * last],
            actions[first:last],
            *(values[size * first : size * last] for size, values in features),
        ]
        for (first, last), is_short in zip(
            pairwise(np.asarray(tail.offsets).tolist()), short_times.tolist(), strict=True
        )
    ]


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
    features = _read_features(records, actions_at + lengths, lengths, columns, keys)
    if not short.any():
        times = np.array(records.cut(times_at, actions_at)).reshape(-1).view("<i8")
        return Tail(items, times, actions, offsets, features)
    times = np.repeat(headers["last_event_ts"].astype(np.int64), lengths)
    if short.all():
        times -= np.ascontiguousarray(records.cut(times_at, actions_at)).reshape(-1).view("<u4")
        return Tail(items, times, actions, offsets, features)
    content, is_short = np.frombuffer(records.content, np.uint8), np.repeat(short, lengths)
    start = records.starts + times_at
    times[is_short] -= content[ranges(start[short], SHORT_TIME_BYTES * lengths[short])].view("<u4")
    times[~is_short] = content[ranges(start[~short], TIME_BYTES * lengths[~short])].view("<i8")
    return Tail(items, times, actions, offsets, features)


def _read_features(
    records: JoinedRecords,
    first: NDArray[np.int64],
    lengths: NDArray[np.int64],
    columns: Sequence[TailColumn],
    keys: Sequence[bytes],
) -> dict[str, NDArray[Any]]:
    """The features of B tails, whose columns begin at `first` [B] in each record."""
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize * lengths
        stored = np.array(records.cut(first, last)).reshape(-1).view(column.dtype)
        is_number = column.size is None
        is_valid = ~np.isinf(stored) if is_number else stored <= column.size
        if not is_valid.all():
            event = np.flatnonzero(~is_valid)[:1]
            users = [keys[user] for user in np.repeat(np.arange(len(lengths)), lengths)[event]]
            expected = "a finite number" if is_number else f"at most {column.size}"
            check_field(is_valid[event], users, stored[event], f"feature {column.name!r}", expected)
        features[column.name] = column.read(stored)
        first = last
    return features


def _flat(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class CodecError(ValueError):
    """A row cannot be stored."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.row = row
        self.reason = reason


def row_bytes(codec: Codec, dim: int) -> int:
    """Bytes of one row of d = `dim` values."""
    match codec:
        case Codec.float32:
            return 4 * dim
        case Codec.float16:
            return 2 * dim
        case Codec.int8:
            return dim + 8
        case Codec.int4:
            return (dim + 1) // 2 + 4


def quantize_rows(rows: NDArray[np.float32], codec: Codec) -> NDArray[np.uint8]:
    """Encode rows as they are stored: float32, float16, or FBGEMM's int8 and int4 rows.

    Args:
        rows: [N, d] float32, contiguous.

    Returns:
        [N, row_bytes(codec, d)] uint8.

    Raises:
        CodecError: a value is not finite, or a value, scale or bias overflows the type that the codec stores it in.
    """
    _require_finite(rows, "holds NaN or infinity")
    match codec:
        case Codec.float32:
            return rows.astype("<f4", copy=False).view(np.uint8)
        case Codec.float16:
            halves: NDArray[np.float16] = torch.from_numpy(rows).half().numpy()
            _require_finite(halves, "has a value that overflows float16 (largest 65504); store it as int8 or float32")
            return halves.view(np.uint8)
        case Codec.int8:
            packed: NDArray[np.uint8] = torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows)).numpy()
            scales = packed[:, rows.shape[1] :].copy().view("<f4")
            _require_finite(scales, "has a range of values that overflows float32; store it as float32")
            return packed
        case Codec.int4:
            return _pack_nibbles(rows)


def dequantize_rows(packed: NDArray[np.uint8], codec: Codec, dim: int) -> NDArray[np.float32]:
    """Decode stored rows: [N, row_bytes(codec, d)] uint8, contiguous (FBGEMM does not check) -> [N, d] float32.

    For int8 and int4, value = q * scale + bias, rounded once if the processor has a fused multiply-add.
    """
    match codec:
        case Codec.float32:
            return packed.view("<f4")
        case Codec.float16:
            halves: NDArray[np.float32] = torch.from_numpy(packed.view("<f2")).float().numpy()
            return halves
        case Codec.int8:
            rows: NDArray[np.float32] = torch.ops.quantized.embedding_bag_byte_unpack(torch.from_numpy(packed)).numpy()
            return rows
        case Codec.int4:
            rows = torch.ops.quantized.embedding_bag_4bit_unpack(torch.from_numpy(packed)).numpy()
            return rows if rows.shape[1] == dim else np.ascontiguousarray(rows[:, :dim])


def _pack_nibbles(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    dim = rows.shape[1]
    if dim % 2:  # FBGEMM needs an even number of values; a copy of the last one changes neither scale nor bias.
        rows = np.concatenate([rows, rows[:, -1:]], axis=1)
    packed: NDArray[np.uint8] = torch.ops.quantized.embedding_bag_4bit_prepack(torch.from_numpy(rows)).numpy()
    if dim % 2:
        packed[:, dim // 2] &= 0x0F
    scales = packed[:, (dim + 1) // 2 :].copy().view("<f2")
    _require_finite(
        scales, "has a minimum or range that overflows float16 (largest 65504); store it as int8 or float32"
    )
    return packed


def _require_finite(values: NDArray[np.floating], reason: str) -> None:
    finite = np.isfinite(values)
    if not finite.all():
        raise CodecError(int(np.flatnonzero(~finite.all(axis=1))[0]), reason)


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


def key_id(key: bytes) -> str:
    """Fingerprint of a key, 16 hex digits, which does not reveal the key.

    Raises:
        ValueError: the key is not 32 bytes long.
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"key: an authentication key must be {KEY_BYTES} bytes")
    return hashlib.blake2b(digest_size=8, key=key, person=_KEY_ID).hexdigest()


def read_key(path: str | None) -> bytes | None:
    """Read the key from a file (32 bytes, or 64 hex digits) or, without a path, from VISTA_AUTHENTICATION_KEY.

    Returns:
        The key; None without a path if the variable is not set.

    Raises:
        ConfigError: the file or variable cannot be read, or does not hold a key. The message never holds the key.
    """
    remedy = "write one with `openssl rand -hex 32`"
    if path is None:
        text = os.environ.get(KEY_VARIABLE)
        return None if text is None else _parse(text.encode(), KEY_VARIABLE, remedy)
    try:
        held = read_limited(Path(path), _MOST_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"authentication_key_file: {path}: {error.strerror}; {remedy}") from error
    return _parse(held, f"authentication_key_file: {path}", remedy)


def _parse(held: bytes, where: str, remedy: str) -> bytes:
    if len(held) == KEY_BYTES:
        return held
    try:
        key = bytes.fromhex(held.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{where} must hold {KEY_BYTES} bytes, or {2 * KEY_BYTES} hex digits; {remedy}")
    return key


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
        self.stops = np.cumsum(lengths)
        self.starts = self.stops - lengths
        self.one_length = len(lengths) > 0 and bool((lengths == lengths[0]).all())
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
        """Bytes first to last of each record, which may differ by record [B].

        Returns:
            [B, bytes], a view, if the records are of one length and the bytes are at one place; otherwise flat.
        """
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
