"""Reads stored records: checks them, and copies what they hold into arrays.

The C++ library does so if it was built (`vista_kernels.cpp_backend.records`). Records that it does not accept, and
those with authentication codes, are read by `vista.store.record`, which names what is wrong. B users, K summary tokens,
d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import Int, offsets_of
from vista.counters.counters import CounterCodes
from vista.store.record import (
    CHECKSUM_BYTES,
    CHECKSUM_OFFSET,
    CODEC_NUMBERS,
    HEADER,
    HEADER_BYTES,
    MAX_RECORD_BYTES,
    JoinedRecords,
    RecordSpec,
    Tail,
    check_records,
    dequantize_rows,
    key_hash_bytes,
    read_counters,
    read_features,
    read_tails,
    record_template,
)
from vista_kernels.cpp_backend.library import LibraryError
from vista_kernels.cpp_backend.records import RecordDecoder


@dataclass(frozen=True, slots=True)
class RawRecords:
    """Records copied out of the store and checked."""

    headers: NDArray[np.void]
    """[B] of dtype HEADER."""
    summary: NDArray[np.float32]
    """[B, K, d]."""
    tail: Tail
    counters: tuple[CounterCodes, ...]
    """One per field; empty if the generation has no counters."""
    features: dict[str, NDArray[Any]]
    """Of the users, [B] by name: codes or numbers; empty if the generation has none."""


@dataclass(frozen=True, slots=True)
class StoredRecord:
    """A record as it is stored, which nothing has checked."""

    value: bytes
    """At least a header."""
    key: bytes
    """Of the user."""
    spec: RecordSpec
    """Of the generation."""

    @property
    def last_event_ts(self) -> int:
        return int.from_bytes(self.value[_LAST_EVENT_BYTES], "little", signed=True)

    def digests(self) -> tuple[bytes, bytes]:
        """Checksums that the record must hold, of itself and of the key: 8 bytes each, big-endian."""
        parts = self.value[:CHECKSUM_OFFSET], bytes(CHECKSUM_BYTES), self.value[HEADER_BYTES:]
        return xxhash.xxh3_64_digest(b"".join(parts)), key_hash_bytes([self.key])


assert HEADER.fields is not None
_LAST_EVENT = HEADER.fields["last_event_ts"][1]
_LAST_EVENT_BYTES = slice(_LAST_EVENT, _LAST_EVENT + 8)


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
    decoder = record_decoder(spec)
    decoded = None if decoder is None else _decoded(decoder, values, keys, spec)
    return checked_records(values, keys, spec) if decoded is None else decoded


def checked_records(values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec) -> RawRecords:
    """`read_records` without the library."""
    records, sizes = check_records(values, keys, spec)
    headers, user_at = records.headers, HEADER_BYTES + spec.rows_bytes
    rows = records.cut(HEADER_BYTES, user_at)
    rows = np.ascontiguousarray(rows).reshape(len(values) * spec.num_tokens, spec.row_bytes)
    summary = dequantize_rows(rows, spec.codec, spec.dim).reshape(len(values), spec.num_tokens, spec.dim)
    features = read_features(records, user_at, 1, spec.user_columns, keys, " of the user")
    first = user_at + spec.user_bytes
    counters = () if spec.counters is None else read_counters(records, first, spec.counters, sizes)
    tail_at = first + headers["counters_length"].astype(np.int64)
    tails = read_tails(records, tail_at, headers["tail_length"].astype(np.int64), spec.tail_columns, keys)
    return RawRecords(headers, summary, tails, counters, features)


def present_records(
    values: Sequence[bytes | memoryview | None], keys: list[bytes], first: int, spec: RecordSpec
) -> tuple[Int, RawRecords]:
    """Positions of the values that are not None, counted from `first`, and the records that they hold, checked."""
    present = [value for value in values if value is not None]
    if len(present) == len(keys):
        return first + np.arange(len(keys)), read_records(present, keys, spec)
    rows = [row for row, value in enumerate(values) if value is not None]
    return first + np.array(rows, np.int64), read_records(present, [keys[row] for row in rows], spec)


@lru_cache(maxsize=16)
def record_decoder(spec: RecordSpec) -> RecordDecoder | None:
    """A decoder of the generation's records; None without the library, and for records with authentication codes."""
    if spec.key is not None:
        return None
    layout = spec.counters
    try:
        return RecordDecoder(
            record_template(spec).tobytes(),
            codec=CODEC_NUMBERS[spec.codec],
            tokens=spec.num_tokens,
            dim=spec.dim,
            user_columns=[column.size or 0 for column in spec.user_columns],
            tail_columns=[column.size or 0 for column in spec.tail_columns],
            key_bytes=() if layout is None else layout.key_bytes,
            most_keys=() if layout is None else layout.spec.keys,
            values=0 if layout is None else layout.spec.num_columns,
        )
    except LibraryError:
        return None


def _decoded(
    decoder: RecordDecoder, values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: RecordSpec
) -> RawRecords | None:
    """What the records hold; None if one of them is not accepted."""
    lengths = np.fromiter(map(len, values), dtype=np.int64, count=len(values))
    if not len(values) or lengths.min() < HEADER_BYTES or lengths.max() > MAX_RECORD_BYTES:
        return None
    records = JoinedRecords(values, lengths, HEADER)
    checksums = b"".join(map(xxhash.xxh3_64_digest, records.views()))
    made = decoder.decode(records.content, offsets_of(lengths), records.headers, checksums, key_hash_bytes(keys))
    if made is None:
        return None
    tail_columns, user_columns = spec.tail_columns, spec.user_columns
    features = {column.name: part for column, part in zip(tail_columns, made.tail, strict=True)}
    tail = Tail(made.items, made.times, made.actions, offsets_of(made.num_events), features)
    counters: tuple[CounterCodes, ...] = ()
    if spec.counters is not None:
        of_spec, clock = spec.counters.spec, records.headers["last_event_ts"].astype(np.int64)
        counters = tuple(
            CounterCodes(of_spec, key, codes, offsets_of(made.num_keys[:, field]), clock)
            for field, (key, codes) in enumerate(zip(made.keys, made.codes, strict=True))
        )
    of_users = {column.name: part for column, part in zip(user_columns, made.user, strict=True)}
    return RawRecords(records.headers, made.summary, tail, counters, of_users)
