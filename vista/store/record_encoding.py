"""How records are written (docs/reference/file-formats.md), and the key that authenticates them.

B users, K summary tokens, d model width, N rows or events.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.config.checks import Codec
from vista.counters.counters import CODE_BITS, CounterCodes
from vista.errors import ConfigError, RecordError
from vista.files import read_limited
from vista.store.keys import user_id
from vista.store.record import (
    CHECKSUM_OFFSET,
    HEADER,
    HEADER_BYTES,
    MAX_RECORD_BYTES,
    SHORT_TIMES,
    SIZE_BYTES,
    CounterLayout,
    RecordSpec,
    Tail,
    TailColumn,
    UserColumn,
    event_bytes,
    key_hashes,
    record_code,
    record_template,
    user_of,
)
from vista.store.state_record import UserSummaries

KEY_BYTES = 32
_MOST_KEY_FILE_BYTES = 1024
KEY_VARIABLE = "VISTA_AUTHENTICATION_KEY"
"""Environment variable with the key in 64 hex digits, read if no file is named."""
_KEY_ID = b"vista key id 1"


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


def _flat(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data


class CodecError(ValueError):
    """A row cannot be stored."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.row = row
        self.reason = reason


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
            with np.errstate(over="ignore"):
                halves = rows.astype("<f2")
            _require_finite(halves, "has a value that overflows float16 (largest 65504); store it as int8 or float32")
            return halves.view(np.uint8)
        case Codec.int8:
            import torch  # Reading records does not need it, and a process that writes summaries has loaded it.

            packed: NDArray[np.uint8] = torch.ops.quantized.embedding_bag_byte_prepack(torch.from_numpy(rows)).numpy()
            scales = packed[:, rows.shape[1] :].copy().view("<f4")
            _require_finite(scales, "has a range of values that overflows float32; store it as float32")
            return packed
        case Codec.int4:
            return _pack_nibbles(rows)


def _pack_nibbles(rows: NDArray[np.float32]) -> NDArray[np.uint8]:
    import torch  # as above

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


def key_id(key: bytes) -> str:
    """Fingerprint of a key, 16 hex digits, which does not reveal the key. Raises ValueError if the key is not 32 bytes
    long."""
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


def encode_records(users: UserSummaries, spec: RecordSpec) -> list[bytes]:
    """Encode the records of a batch of B users.

    Args:
        users: what the records hold; the states are not part of it.
        spec: what the generation's records share (`StoreWriter.spec`).

    Returns:
        B byte strings.

    Raises:
        RecordError: a summary is not finite or overflows the codec, or a record would exceed MAX_RECORD_BYTES; the
            message names the user.
        ValueError: the shapes do not match.
    """
    keys, tail, num_users = users.keys, users.tail, len(users)
    if users.summary.shape != (num_users, spec.num_tokens, spec.dim):
        raise ValueError(f"summary must be {(num_users, spec.num_tokens, spec.dim)}, got {users.summary.shape}")
    check_tail(tail, spec.tail_columns, num_users)
    features = encode_user_features(users.features, spec.user_columns, num_users).tobytes()
    rows_KD = np.ascontiguousarray(users.summary, dtype="<f4").reshape(num_users * spec.num_tokens, spec.dim)
    try:
        rows = quantize_rows(rows_KD, spec.codec)
    except CodecError as error:
        user, token = user_id(keys[error.row // spec.num_tokens]), error.row % spec.num_tokens
        raise RecordError(
            f"the summary of user {user!r} cannot be stored: row {token} {error.reason}; nothing of this batch was "
            "written. Check the user's events and the model's weights"
        ) from error

    tail_length = np.diff(tail.offsets).astype(np.int64)
    counters, short_times = [b""] * num_users, np.zeros(num_users, bool)
    if spec.counters is not None:
        counters = encode_counters(users.counters, spec.counters, num_users)
        short_times = have_short_times(tail, users.last_event_ts)
    counters_length = np.fromiter(map(len, counters), np.int64, num_users)
    tail_bytes = event_bytes(short_times, spec.tail_columns) * tail_length
    payload_length = spec.rows_bytes + spec.user_bytes + counters_length + tail_bytes + spec.code_bytes
    _require_size(HEADER_BYTES + payload_length, keys)
    headers = np.full(num_users, record_template(spec))
    headers["flags"] |= np.where(short_times, SHORT_TIMES, 0).astype(np.uint32)
    headers["payload_length"] = payload_length
    headers["key_hash"] = key_hashes(keys)
    headers["created_at"] = spec.created_at
    headers["last_event_ts"] = users.last_event_ts
    headers["event_count"] = users.event_count
    headers["applied_segment"] = spec.applied_segment
    headers["history_digest"] = users.history_digest
    headers["tail_length"] = tail_length
    headers["counters_length"] = counters_length

    header_bytes, summary_bytes = headers.tobytes(), rows.reshape(-1).view(np.uint8).data
    size, user_size = spec.rows_bytes, spec.user_bytes
    records = []
    tails = encode_tails(tail, users.last_event_ts, short_times, spec.tail_columns)
    for index, tail_parts in enumerate(tails):
        header = header_bytes[HEADER_BYTES * index : HEADER_BYTES * (index + 1)]
        payload: list[bytes | memoryview]
        of_user = features[user_size * index : user_size * (index + 1)]
        payload = [summary_bytes[size * index : size * (index + 1)], of_user, counters[index], *tail_parts]
        records.append(seal_record(header, payload, keys[index], spec.key))
    return records


def seal_record(header: bytes, payload: Sequence[bytes | memoryview], user_key: bytes, key: bytes | None) -> bytes:
    """Finish a record: append the authentication code, if there is a key, and fill in the checksum.

    Args:
        header: complete but for its checksum, which is zero.
        payload: complete but for the code.
        user_key: under which the record is stored.
        key: 32 bytes, if the store is authenticated.
    """
    if key is not None:
        payload = [*payload, record_code(key, user_key, header, payload)]
    checksum = xxhash.xxh3_64(header)
    for part in payload:
        checksum.update(part)
    return b"".join((header[:CHECKSUM_OFFSET], checksum.intdigest().to_bytes(8, "little"), *payload))


def restamp_records(keys: Sequence[bytes], records: Sequence[bytes], spec: RecordSpec) -> list[bytes]:
    """Move checked records to another generation: only its number, the checksum and the code change."""
    headers = np.frombuffer(b"".join([record[:HEADER_BYTES] for record in records]), HEADER).copy()
    headers["generation"] = spec.generation
    headers["checksum"] = 0
    packed = headers.tobytes()
    sealed = []
    for index, (key, record) in enumerate(zip(keys, records, strict=True)):
        payload = memoryview(record)[HEADER_BYTES : len(record) - spec.code_bytes]
        header = packed[HEADER_BYTES * index : HEADER_BYTES * (index + 1)]
        sealed.append(seal_record(header, [payload], key, spec.key))
    return sealed


def _require_size(lengths: NDArray[np.int64], keys: Sequence[bytes]) -> None:
    if (lengths > MAX_RECORD_BYTES).any():
        index = int(lengths.argmax())
        raise RecordError(
            f"the record of {user_of(keys[index])} would take {lengths[index]} bytes, but at most {MAX_RECORD_BYTES} "
            "are allowed; nothing of this batch was written. Use a shorter tail (model.tail_len) or a smaller codec"
        )


def encode_user_features(
    features: Mapping[str, Any], columns: Sequence[UserColumn], num_users: int
) -> NDArray[np.uint8]:
    """The section of each of B users, [B, bytes].

    Args:
        features: by name, [B] codes or numbers, as in `UserSummaries.features`.
        columns: of the generation.
        num_users: B.

    Raises:
        ValueError: the features are of other columns, or of another number of users.
    """
    names = [column.name for column in columns]
    if sorted(features) != sorted(names) or any(len(values) != num_users for values in features.values()):
        raise ValueError(f"features of users: expected {names} of {num_users} users, got {list(features)}")
    parts = [
        column.stored(features[column.name]).view(np.uint8).reshape(num_users, column.dtype.itemsize)
        for column in columns
    ]
    return np.concatenate([np.zeros((num_users, 0), np.uint8), *parts], axis=1)


def most_bytes(layout: CounterLayout) -> int:
    """Bytes of the section of a user who has all keys that a record keeps."""
    fields = zip(layout.spec.keys, layout.key_bytes, strict=True)
    return sum(SIZE_BYTES + keys * (key_bytes + layout.code_bytes) for keys, key_bytes in fields)


def encode_counters(counters: Sequence[CounterCodes], layout: CounterLayout, num_users: int) -> list[bytes]:
    """The counters section of each of B users: per field the number of keys, then keys with codes.

    Args:
        counters: of the B users, one for each field of the layout.
        layout: of the generation.
        num_users: B.

    Raises:
        ValueError: the counters are of another spec, or of another number of users; or a user has too many keys, or a
            key has too many bytes.
    """
    spec = layout.spec
    if len(counters) != len(spec.fields) or any(
        one.spec != spec or len(one.offsets) != num_users + 1 or len(one.key) != one.offsets[-1] for one in counters
    ):
        raise ValueError(f"counters: expected those of {num_users} users for each of {', '.join(spec.fields)}")
    sections = [b""] * num_users
    for one, name, most, key_bytes in zip(counters, spec.fields, spec.keys, layout.key_bytes, strict=True):
        sizes = np.diff(one.offsets)
        if (sizes > most).any() or (one.key >> 8 * key_bytes != 0).any():
            raise ValueError(f"counters of {name}: at most {most} keys of {key_bytes} bytes are allowed per user")
        entries = _entries(one, key_bytes, layout.code_bytes)
        content, entry_bytes = entries.tobytes(), entries.shape[1]
        for user, (first, last) in enumerate(pairwise(one.offsets.tolist())):
            size = (last - first).to_bytes(SIZE_BYTES, "little")
            sections[user] += size + content[entry_bytes * first : entry_bytes * last]
    return sections


def _entries(counters: CounterCodes, key_bytes: int, code_bytes: int) -> NDArray[np.uint8]:
    """The bytes of each key and its codes, [E, k + c]."""
    key = counters.key.astype("<u4")[:, None].view(np.uint8)
    shifted = counters.codes.astype("<u8") << CODE_BITS * np.arange(counters.codes.shape[1], dtype=np.uint64)
    packed = np.bitwise_or.reduce(shifted, axis=1, keepdims=True).view(np.uint8)
    return np.concatenate([key[:, :key_bytes], packed[:, :code_bytes]], axis=1)
