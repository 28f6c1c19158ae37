"""The bytes of one user's record: header, K summary rows, user, counters, tail, code (docs/reference/file-formats.md).

B users, K summary tokens, d model width, R bytes of all rows of one user, n events of one tail.
"""

from __future__ import annotations

import dataclasses
import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counters import CODE_BITS, MAX_CODE, CounterCodes
from vista.errors import RecordError
from vista.log.histories import NO_TIMESTAMP, ranges
from vista.store.keys import user_id
from vista.store.record_spec import (
    AUTHENTICATED,
    CHECKSUM_OFFSET,
    CODE_BYTES,
    CODEC_NUMBERS,
    FORMAT_VERSION,
    HEADER,
    HEADER_BYTES,
    MAGIC,
    MAX_RECORD_BYTES,
    SCALE_DTYPE_NUMBERS,
    SHORT_TIMES,
    CodecError,
    CounterLayout,
    JoinedRecords,
    RecordSpec,
    Tail,
    UserColumn,
    check_field,
    check_tail,
    dequantize_rows,
    encode_tails,
    event_bytes,
    have_short_times,
    quantize_rows,
    read_tails,
    record_code,
    user_of,
)
from vista.store.state_record import UserSummaries

_KEY_HASH_BYTES = slice(64, 72)
_SHARED_FIELDS = (
    *("magic", "format_version", "header_length", "codec", "tokens", "dim", "scale_dtype", "generation"),
    "summarizer_id",
)
"""Fields that are equal in all records of a generation; their bytes follow."""
_SHARED_BYTES = np.r_[0:8, 12:20, 24:64]

SIZE_BYTES = 2
"""The number of keys of a field of counters, uint16."""


@dataclass(frozen=True, slots=True)
class RawRecords:
    """Records copied out of the store and checked, with their rows still quantized."""

    headers: NDArray[np.void]
    """[B] of dtype HEADER."""
    rows: NDArray[np.uint8]
    """Bytes of all rows, [B, R]; possibly a strided view, which `decode_rows` makes contiguous."""
    tail: Tail
    counters: tuple[CounterCodes, ...]
    """One per field; empty if the generation has no counters."""
    features: dict[str, NDArray[Any]]
    """Of the users, [B] by name: codes or numbers; empty if the generation has none."""


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
    headers = np.full(num_users, _template(spec))
    headers["flags"] |= np.where(short_times, SHORT_TIMES, 0).astype(np.uint32)
    headers["payload_length"] = payload_length
    headers["key_hash"] = _key_hashes(keys)
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


def read_records(values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec) -> RawRecords:
    """Check a batch of stored values and copy them out; the values need not stay valid afterwards.

    Args:
        values: B stored values.
        keys: their B keys.
        spec: what the generation's records must hold.

    Raises:
        RecordError: a value is truncated, corrupt, of another format, generation or summarizer; the message names the
            user and the field.
    """
    records, sizes = _checked(values, keys, spec)
    headers, user_at = records.headers, HEADER_BYTES + spec.rows_bytes
    rows = records.cut(HEADER_BYTES, user_at).reshape(len(values), spec.rows_bytes)
    features, first = read_user_features(records, user_at, spec.user_columns, keys), user_at + spec.user_bytes
    counters = () if spec.counters is None else read_counters(records, first, spec.counters, sizes)
    tail_at = first + headers["counters_length"].astype(np.int64)
    tails = read_tails(records, tail_at, headers["tail_length"].astype(np.int64), spec.tail_columns, keys)
    return RawRecords(headers, rows, tails, counters, features)


def decode_rows(raw: RawRecords, spec: RecordSpec) -> NDArray[np.float32]:
    """Summaries of checked records as [B, K, d] float32."""
    count = len(raw.headers)
    # Flattened in between: for a single record NumPy keeps the stride, which torch refuses.
    rows = np.ascontiguousarray(raw.rows).reshape(-1).reshape(count * spec.num_tokens, spec.row_bytes)
    return dequantize_rows(rows, spec.codec, spec.dim).reshape(count, spec.num_tokens, spec.dim)


def sum_of_checksums(records: Sequence[bytes | memoryview]) -> int:
    """Sum mod 2^64 of the checksums in the records' headers."""
    checksums = b"".join([record[CHECKSUM_OFFSET:HEADER_BYTES] for record in records])
    return int(np.frombuffer(checksums, "<u8").sum(dtype=np.uint64))


def check_records(values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec) -> None:
    """Check a batch of stored values like `read_records`, without returning them."""
    _checked(values, keys, spec)


def _checked(
    values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec
) -> tuple[JoinedRecords, list[NDArray[np.int64]]]:
    """Checked records, and the sizes of their counters (`counter_sizes`)."""
    lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    check_field(lengths >= HEADER_BYTES, keys, lengths, "length", f"at least {HEADER_BYTES} bytes")
    check_field(lengths <= MAX_RECORD_BYTES, keys, lengths, "length", f"at most {MAX_RECORD_BYTES} bytes")
    records = JoinedRecords(values, lengths, HEADER)
    headers = records.headers

    def require(field: str, expected: Any) -> None:
        check_field(headers[field] == expected, keys, headers[field], field, expected)

    template = _template(spec)
    shared = headers.view(np.uint8).reshape(-1, HEADER_BYTES)[:, _SHARED_BYTES]
    alike = bool((shared == np.frombuffer(template.tobytes(), np.uint8)[_SHARED_BYTES]).all())
    if not alike:  # The usual case is one comparison for all; fields are checked by name only to report a difference.
        for field in ("magic", "format_version", "header_length"):
            require(field, template[field])
    require("payload_length", lengths - HEADER_BYTES)
    views = records.views()
    require("checksum", np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, views)), ">u8"))
    if not alike:
        for field in _SHARED_FIELDS:
            if field != "summarizer_id":
                require(field, template[field])
        summarizer_ids = [row.tobytes().hex() for row in headers["summarizer_id"]]
        same = np.array(summarizer_ids) == spec.summarizer_id.hex()
        check_field(same, keys, summarizer_ids, "summarizer_id", spec.summarizer_id.hex())
    require("key_hash", _key_hashes(keys))
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
    """Check keys against the hashes in their records; a key has no checksum of its own.

    Raises:
        RecordError: a record was written under another key.
    """
    stored = np.array([int.from_bytes(value[_KEY_HASH_BYTES], "little") for value in values], dtype=np.uint64)
    expected = _key_hashes(keys)
    check_field(stored == expected, keys, stored, "key_hash", expected)


def _key_hashes(keys: Sequence[bytes]) -> NDArray[np.uint64]:
    return np.frombuffer(b"".join(map(xxhash.xxh3_64_digest, keys)), ">u8")


@lru_cache(maxsize=16)
def _template(spec: RecordSpec) -> np.void:
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


def _require_size(lengths: NDArray[np.int64], keys: Sequence[bytes]) -> None:
    if (lengths > MAX_RECORD_BYTES).any():
        index = int(lengths.argmax())
        raise RecordError(
            f"the record of {user_of(keys[index])} would take {lengths[index]} bytes, but at most {MAX_RECORD_BYTES} "
            "are allowed; nothing of this batch was written. Use a shorter tail (model.tail_len) or a smaller codec"
        )


CLOCK_SKEW_MS = 300_000
"""A record dated further ahead was written by a wrong clock, so its age is unknown."""


@dataclass(frozen=True, slots=True)
class StoredBatch:
    """Records of B users, in the order of the request."""

    found: NDArray[np.bool_]
    """[B]; False for users without a record."""
    summary: NDArray[np.float32]
    """[B, K, d]; zeros if not found."""
    tail: Tail
    """Tails as of the refresh; empty if not found."""
    event_count: NDArray[np.int64]
    """[B] events that the record covers; 0 if not found."""
    last_event_ts: NDArray[np.int64]
    """[B] ms; NO_TIMESTAMP if not found or without events."""
    created_at: NDArray[np.int64]
    """[B] start of the refresh, ms; NO_TIMESTAMP if not found."""
    history_digest: NDArray[np.uint64]
    """[B]; 0 if not found."""
    generation: int
    """Number of the store's generation that was read; of a sharded store, the oldest one."""
    features: dict[str, NDArray[Any]] = dataclasses.field(default_factory=dict)
    """Of the users, [B] by name: the model's codes int32, or float32 numbers; -1 or NaN if missing, or not found."""
    counters: tuple[CounterCodes, ...] = ()
    """Counters as of the refresh, one per field of their spec; without keys if not found. Empty if the store keeps no
    counters."""

    def expired(self, now_ms: int, refreshed_at: int, max_age_ms: int) -> NDArray[np.bool_]:
        """Whether each user's record is older than `max_age_ms`, or dated in the future, [B].

        Args:
            now_ms: the current time.
            refreshed_at: of the manifest; a user without new events is as current as the last refresh.
            max_age_ms: the limit; a record of exactly this age is not expired.
        """
        age = now_ms - np.maximum(self.created_at, refreshed_at)
        return self.found & ((age > max_age_ms) | (age < -CLOCK_SKEW_MS))

    def take(self, rows: Int) -> StoredBatch:
        """The batch of the users at `rows` [N], in this order; a row of -1 stands for a user without a record."""
        present = rows >= 0

        def column(values: NDArray[Any], missing: float = 0) -> NDArray[Any]:
            taken = np.full((len(rows), *values.shape[1:]), missing, values.dtype)
            taken[present] = values[rows[present]]
            return taken

        def packed(offsets: Int) -> tuple[Int, Int]:
            """Positions of what the users have of packed values, and its offsets."""
            lengths = column(np.diff(offsets))
            return ranges(column(offsets[:-1]), lengths), offsets_of(lengths)

        counters = []
        for one in self.counters:
            index, offsets = packed(one.offsets)
            clock = column(one.clock, NO_TIMESTAMP)
            counters.append(CounterCodes(one.spec, one.key[index], one.codes[index], offsets, clock))
        return StoredBatch(
            found=column(self.found),
            summary=column(self.summary),
            tail=self.tail.select(*packed(self.tail.offsets)),
            event_count=column(self.event_count),
            last_event_ts=column(self.last_event_ts, NO_TIMESTAMP),
            created_at=column(self.created_at, NO_TIMESTAMP),
            history_digest=column(self.history_digest),
            generation=self.generation,
            features={name: column(values, _missing(values)) for name, values in self.features.items()},
            counters=tuple(counters),
        )

    def spread(self, rows: Int, num_users: int) -> StoredBatch:
        """A batch of `num_users` with these records at `rows`, and no records elsewhere."""
        places = np.full(num_users, -1, np.int64)
        places[rows] = np.arange(len(rows))
        return self.take(places)

    def without(self, users: NDArray[np.bool_]) -> StoredBatch:
        """The same batch, as if the marked users [B] had no record."""
        return self.take(np.where(users, -1, np.arange(len(users)))) if users.any() else self

    @staticmethod
    def concatenated(batches: Sequence[StoredBatch]) -> StoredBatch:
        """The users of all batches, end to end; at least one batch, all with the same features and counters."""

        def column(name: str) -> NDArray[Any]:
            return np.concatenate([getattr(batch, name) for batch in batches])

        return StoredBatch(
            found=column("found"),
            summary=column("summary"),
            tail=Tail.concatenated([batch.tail for batch in batches]),
            event_count=column("event_count"),
            last_event_ts=column("last_event_ts"),
            created_at=column("created_at"),
            history_digest=column("history_digest"),
            generation=min(batch.generation for batch in batches),
            features={name: _join([batch.features[name] for batch in batches]) for name in batches[0].features},
            counters=tuple(map(CounterCodes.concatenated, zip(*(batch.counters for batch in batches), strict=True))),
        )


def _missing(values: NDArray[Any]) -> float:
    """How a column of features says that a value is missing."""
    return np.nan if values.dtype.kind == "f" else -1


def present_records(
    values: Sequence[bytes | memoryview | None], keys: list[bytes], first: int, spec: RecordSpec
) -> tuple[Int, RawRecords]:
    """Positions of the values that are not None, counted from `first`, and the records that they hold, checked."""
    present = [value for value in values if value is not None]
    if len(present) == len(keys):
        return first + np.arange(len(keys)), read_records(present, keys, spec)
    rows = [row for row, value in enumerate(values) if value is not None]
    return first + np.array(rows, np.int64), read_records(present, [keys[row] for row in rows], spec)


def assembled(num_users: int, parts: Sequence[tuple[Int, RawRecords]], spec: RecordSpec) -> StoredBatch:
    """The batch of B = `num_users` users.

    Args:
        num_users: B.
        parts: positions in the batch, ascending, and the records of the users there; at least one part.
        spec: what the records share.
    """
    rows, headers = _join([positions for positions, _ in parts]), _join([raw.headers for _, raw in parts])
    is_complete = len(rows) == num_users
    if is_complete and len(parts) == 1:
        summary = decode_rows(parts[0][1], spec)
    else:
        summary = np.zeros((num_users, spec.num_tokens, spec.dim), np.float32)
        for positions, raw in parts:
            summary[positions] = decode_rows(raw, spec)
    event_count, last_event_ts, created_at = (
        headers[name].astype(np.int64) for name in ("event_count", "last_event_ts", "created_at")
    )
    found = StoredBatch(
        found=np.ones(len(rows), np.bool_),
        summary=np.empty((len(rows), 0, spec.dim), np.float32),  # the large part, which is already in its place
        tail=Tail.concatenated([raw.tail for _, raw in parts]),
        event_count=event_count,
        last_event_ts=last_event_ts,
        created_at=created_at,
        history_digest=headers["history_digest"].astype(np.uint64),
        generation=spec.generation,
        features={name: _join([raw.features[name] for _, raw in parts]) for name in parts[0][1].features},
        counters=tuple(map(CounterCodes.concatenated, zip(*(raw.counters for _, raw in parts), strict=True))),
    )
    return replace(found if is_complete else found.spread(rows, num_users), summary=summary)


def _join(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


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


def read_user_features(
    records: JoinedRecords, first: int, columns: Sequence[UserColumn], keys: Sequence[bytes]
) -> dict[str, NDArray[Any]]:
    """The features of B records whose lengths were checked; int32 codes, -1 for a missing one, or float32 numbers [B].

    Args:
        records: B records.
        first: place of the section in each record.
        columns: of the generation.
        keys: the B users' keys, for errors.

    Raises:
        RecordError: a category has a value that the generation does not know, or a number is infinite; the message
            names the user.
    """
    features = {}
    for column in columns:
        last = first + column.dtype.itemsize
        stored = np.ascontiguousarray(records.cut(first, last)).reshape(-1).view(column.dtype)
        name = f"feature {column.name!r} of the user"
        if column.size is None:
            check_field(~np.isinf(stored), keys, stored, name, "a finite number")
        else:
            check_field(stored <= column.size, keys, stored, name, f"at most {column.size}")
        features[column.name] = column.read(stored)
        first = last
    return features


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


def _entries(counters: CounterCodes, key_bytes: int, code_bytes: int) -> NDArray[np.uint8]:
    """The bytes of each key and its codes, [E, k + c]."""
    key = counters.key.astype("<u4")[:, None].view(np.uint8)
    shifted = counters.codes.astype("<u8") << CODE_BITS * np.arange(counters.codes.shape[1], dtype=np.uint64)
    packed = np.bitwise_or.reduce(shifted, axis=1, keepdims=True).view(np.uint8)
    return np.concatenate([key[:, :key_bytes], packed[:, :code_bytes]], axis=1)


def _widened(number: NDArray[np.uint8], width: int) -> NDArray[Any]:
    """Little-endian numbers [E, bytes] as unsigned integers of `width` bytes, [E]."""
    wide = np.zeros((len(number), width), np.uint8)
    wide[:, : number.shape[1]] = number
    return wide.view(f"<u{width}")[:, 0]
