"""The bytes of one user's state, from which the summary is read (docs/reference/file-formats.md, "States").

N users, L layers, H heads, D head dim, r width of pooled vectors. All numbers are little-endian: a header of 120 bytes;
n and removed, float32 [H]; for float16 only, scales float32 [L, H]; z [L, H, D, D]; the sum of the vectors of items,
float64 [r]; the exact counters, if the model has counters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config.checks import StateDtype
from vista.counters.counters import CounterCodes, CounterRows, CounterSpec, CounterTable
from vista.errors import RecordError
from vista.store.keys import user_id
from vista.store.record import CHECKSUM_BYTES, JoinedRecords, Tail

_HEAD = np.dtype([("clock", "<i8"), ("num_events", "<i8"), ("size", "<u4")])


def tables_bytes(spec: CounterSpec, num_keys: Sequence[int]) -> int:
    """Bytes of the counters of a user with `num_keys[f]` keys of each field f."""
    return len(spec.fields) * _HEAD.itemsize + sum(num_keys) * _entry(spec).itemsize


def encode_tables(tables: Sequence[CounterTable], num_users: int) -> list[bytes]:
    """The counters of each of N users: per field a head, then the entries. Raises ValueError if the tables are of
    another number of users."""
    if any(len(table.clock) != num_users for table in tables):
        raise ValueError(f"counters: expected tables of {num_users} users")
    blocks = [b""] * num_users
    for table in tables:
        heads = np.empty(num_users, _HEAD)
        heads["clock"], heads["num_events"], heads["size"] = table.clock, table.num_events, np.diff(table.offsets)
        entries = np.empty(len(table.rows.key), _entry(table.spec))
        for name in entries.dtype.names or ():
            entries[name] = getattr(table.rows, name)
        head, content, entry_bytes = heads.tobytes(), entries.tobytes(), entries.itemsize
        for user, (first, last) in enumerate(pairwise(table.offsets.tolist())):
            own = head[_HEAD.itemsize * user : _HEAD.itemsize * (user + 1)]
            blocks[user] += own + content[entry_bytes * first : entry_bytes * last]
    return blocks


def read_tables(
    records: JoinedRecords, first: int, spec: CounterSpec
) -> tuple[tuple[CounterTable, ...], NDArray[np.bool_]]:
    """The tables of N users, one per field of `spec`, and whether each user's tables fill the block exactly, [N].

    Args:
        records: the N states.
        first: place of the block in each state.
        spec: of the generation.
    """
    entry = _entry(spec)
    stop = records.stops - records.starts
    at, tables, fits = np.full(len(stop), first, np.int64), [], np.ones(len(stop), bool)
    for _ in spec.fields:
        fits &= at + _HEAD.itemsize <= stop
        at = np.where(fits, at, stop - _HEAD.itemsize)  # Any bytes of the record: its tables are not used.
        heads = np.ascontiguousarray(records.cut(at, at + _HEAD.itemsize)).reshape(-1).view(_HEAD)
        at = at + _HEAD.itemsize
        size = heads["size"].astype(np.int64)
        fits &= at + size * entry.itemsize <= stop
        size = np.where(fits, size, 0)
        entries = np.ascontiguousarray(records.cut(at, at + size * entry.itemsize)).reshape(-1).view(entry)
        at = at + size * entry.itemsize
        key, count, last, position = (
            entries[name].astype(np.int64) for name in ("key", "count", "last", "last_position")
        )
        rows = CounterRows(key, count, np.ascontiguousarray(entries["decayed"]), last, position)
        offsets = offsets_of(size)
        clock, num_events = (heads[name].astype(np.int64) for name in ("clock", "num_events"))
        tables.append(CounterTable(spec, rows, offsets, clock, num_events))
    return tuple(tables), fits & (at == stop)


def _entry(spec: CounterSpec) -> np.dtype[np.void]:
    return np.dtype(
        [
            ("key", "<u4"),
            ("count", "<u4"),
            ("decayed", "<f8", (spec.num_horizons,)),
            ("last", "<i8"),
            ("last_position", "<i8"),
        ]
    )


MAGIC = b"VSTA"
FORMAT_VERSION = 3
HEADER = np.dtype(
    [
        ("magic", "S4"),
        ("format_version", "<u2"),
        ("header_length", "<u2"),
        ("dtype", "<u2"),
        ("layers", "<u2"),
        ("heads", "<u2"),
        ("head_dim", "<u2"),
        ("payload_length", "<u4"),
        ("counters_length", "<u4"),
        ("generation", "<u8"),
        ("summarizer_id", "u1", (32,)),
        ("key_hash", "<u8"),
        ("created_at", "<i8"),
        ("clock", "<i8"),
        ("num_events", "<i8"),
        ("applied_segment", "<u8"),
        ("history_digest", "<u8"),
        ("checksum", "<u8"),
    ]
)
assert HEADER.itemsize == 120
_DTYPE_NUMBERS = {StateDtype.float32: 0, StateDtype.float16: 1}
_SHARED_FIELDS = (*("magic", "format_version", "header_length", "dtype", "layers", "heads", "head_dim", "generation"),)


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What all states of one generation share."""

    summarizer_id: bytes
    generation: int
    num_layers: int
    num_heads: int
    head_dim: int
    dtype: StateDtype
    created_at: int = 0
    """Start of the refresh in ms. Written, not checked."""
    counters: CounterSpec | None = None
    """What the counters count; None without counters."""
    pooled_dim: int = 0
    """r; 0 without pooled vectors."""

    @property
    def fixed_bytes(self) -> int:
        """Bytes between the header and the counters."""
        cells, pooled = self.num_layers * self.num_heads, 8 * self.pooled_dim
        half = self.dtype is StateDtype.float16
        return 8 * self.num_heads + (4 * cells if half else 0) + cells * self.head_dim**2 * (2 if half else 4) + pooled

    @property
    def least_bytes(self) -> int:
        """Bytes per user, without the key and the counters."""
        return HEADER.itemsize + self.fixed_bytes


@dataclass(frozen=True, slots=True)
class StateArrays:
    """States of N users (`vista.model.summarizer`), and which events they cover."""

    z: NDArray[np.float32]
    """[N, L, H, D, D]."""
    n: NDArray[np.float32]
    """[N, H] sums of the events' weights."""
    removed: NDArray[np.float32]
    """[N, H] weight subtracted since the last computation from events."""
    clock: NDArray[np.int64]
    """[N] the time to which the weights are decayed."""
    num_events: NDArray[np.int64]
    """[N]."""
    applied_segment: NDArray[np.int64]
    """[N] newest segment of the log that each state covers."""
    history_digest: NDArray[np.uint64]
    """[N]."""
    pooled: NDArray[np.float64]
    """[N, r] sums of the vectors of the histories' items (`vista.examples.item_spaces`)."""
    counters: tuple[CounterTable, ...] = ()
    """One per field; empty without counters."""

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> StateArrays:
        users = np.arange(len(self.n))[rows]
        columns = {name: getattr(self, name)[users] for name in _COLUMNS}
        return StateArrays(**columns, counters=tuple(table.select(users) for table in self.counters))

    @staticmethod
    def concatenated(parts: Sequence[StateArrays]) -> StateArrays:
        """The states of all parts, end to end."""
        columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in _COLUMNS}
        fields = zip(*(part.counters for part in parts), strict=True)
        return StateArrays(**columns, counters=tuple(map(CounterTable.concatenated, fields)))


FoundStates = tuple[NDArray[Any], StateArrays]
"""Rows of the users who have a state, and these states."""

_COLUMNS = ("z", "n", "removed", "clock", "num_events", "applied_segment", "history_digest", "pooled")


def encode_states(keys: Sequence[bytes], states: StateArrays, spec: StateSpec) -> list[bytes]:
    """Encode the states of N users.

    Args:
        keys: N keys from `vista.store.keys.user_keys`.
        states: of the N users; all values finite.
        spec: what the generation's states share.
    """
    count = len(keys)
    headers = np.full(count, _template(spec))
    headers["key_hash"] = [xxhash.xxh3_64_intdigest(key) for key in keys]
    headers["created_at"] = spec.created_at
    for name in ("clock", "num_events", "applied_segment", "history_digest"):
        headers[name] = getattr(states, name)
    z, parts = states.z, list[NDArray[np.floating[Any]]]([states.n, states.removed])
    if spec.dtype is StateDtype.float16:
        # One scale per matrix: sums over a million events overflow float16, and those of a few events underflow it.
        scale = np.abs(z).max(axis=(-2, -1), initial=0)
        scaled = z / np.where(scale > 0, scale, 1)[..., None, None]
        parts += [scale, scaled.astype("<f2")]
    else:
        parts += [z]
    parts.append(states.pooled)
    fixed, size = np.concatenate([_rows(part) for part in parts], axis=1).tobytes(), spec.fixed_bytes
    counters = encode_tables(states.counters, count)
    headers["counters_length"] = list(map(len, counters))
    headers["payload_length"] = size + headers["counters_length"]
    return _sealed(headers, [[fixed[size * i : size * (i + 1)], block] for i, block in enumerate(counters)])


def rounded(states: StateArrays, spec: StateSpec) -> StateArrays:
    """The states as the store returns them after a round trip."""
    if spec.dtype is StateDtype.float32:
        return states
    keys = [b"ui"] * len(states.n)
    return decode_states(encode_states(keys, states, spec), keys, spec)


def decode_states(values: Sequence[bytes | memoryview], keys: Sequence[bytes], spec: StateSpec) -> StateArrays:
    """Check and decode stored states; the values need not stay valid afterwards. Raises RecordError if a state is
    truncated, corrupt, or of another model or generation; the message names the user."""
    lengths = np.fromiter(map(len, values), np.int64, len(values))
    _check(lengths >= spec.least_bytes, keys, "length")
    records = JoinedRecords(values, lengths, HEADER)
    headers, template = records.headers, _template(spec)
    for name in _SHARED_FIELDS:
        _check(headers[name] == template[name], keys, name)
    _check(headers["payload_length"] == lengths - HEADER.itemsize, keys, "payload_length")
    _check(headers["counters_length"] == lengths - spec.least_bytes, keys, "counters_length")
    _check((headers["summarizer_id"] == template["summarizer_id"]).all(-1), keys, "summarizer_id")
    _check(headers["key_hash"] == [xxhash.xxh3_64_intdigest(key) for key in keys], keys, "key_hash")
    checksums = [xxhash.xxh3_64_intdigest(view) for view in records.views()]
    _check(headers["checksum"] == np.array(checksums, np.uint64), keys, "checksum")
    counters: tuple[CounterTable, ...] = ()
    if spec.counters is None:
        _check(headers["counters_length"] == 0, keys, "counters_length")
    else:
        counters, fits = read_tables(records, spec.least_bytes, spec.counters)
        _check(fits, keys, "counters")
    count, L, H, D = len(values), spec.num_layers, spec.num_heads, spec.head_dim
    payload, at = records.cut(HEADER.itemsize, spec.least_bytes).reshape(count, spec.fixed_bytes), 0

    def take(dtype: str, *shape: int) -> NDArray[Any]:
        nonlocal at
        width = int(np.prod(shape)) * np.dtype(dtype).itemsize
        part = np.ascontiguousarray(payload[:, at : at + width]).view(dtype).reshape(count, *shape)
        at += width
        return part

    n, removed = take("<f4", H), take("<f4", H)
    if spec.dtype is StateDtype.float16:
        scale = take("<f4", L, H)
        z = take("<f2", L, H, D, D).astype(np.float32) * scale[..., None, None]
    else:
        z = take("<f4", L, H, D, D)
    pooled = take("<f8", spec.pooled_dim)
    clock, num_events, applied = (headers[name].astype(np.int64) for name in ("clock", "num_events", "applied_segment"))
    digest = headers["history_digest"].astype(np.uint64)
    return StateArrays(z, n, removed, clock, num_events, applied, digest, pooled, counters)


def restamp_states(values: Sequence[bytes], generation: int) -> list[bytes]:
    """Move checked states to another generation: only its number and the checksum change."""
    if not values:
        return []
    headers = np.frombuffer(b"".join([value[: HEADER.itemsize] for value in values]), HEADER).copy()
    headers["generation"], headers["checksum"] = generation, 0
    return _sealed(headers, [[memoryview(value)[HEADER.itemsize :]] for value in values])


def _template(spec: StateSpec) -> np.void:
    header = np.zeros(1, dtype=HEADER)
    header["magic"], header["format_version"], header["header_length"] = MAGIC, FORMAT_VERSION, HEADER.itemsize
    header["dtype"] = _DTYPE_NUMBERS[spec.dtype]
    header["layers"], header["heads"], header["head_dim"] = spec.num_layers, spec.num_heads, spec.head_dim
    header["generation"] = spec.generation
    header["summarizer_id"] = np.frombuffer(spec.summarizer_id, np.uint8)
    template: np.void = header[0]
    return template


def _sealed(headers: NDArray[np.void], payloads: Sequence[Sequence[bytes | memoryview]]) -> list[bytes]:
    """States of N headers, whose checksums are 0 and are filled in, and the parts of the N payloads."""
    content, size, sealed = headers.tobytes(), HEADER.itemsize, []
    for index, payload in enumerate(payloads):
        header = content[size * index : size * (index + 1)]
        checksum = xxhash.xxh3_64(header)
        for part in payload:
            checksum.update(part)
        digest = checksum.intdigest().to_bytes(CHECKSUM_BYTES, "little")
        sealed.append(b"".join((header[:-CHECKSUM_BYTES], digest, *payload)))
    return sealed


def _rows(part: NDArray[Any]) -> NDArray[np.uint8]:
    """The bytes of each of N rows: [N, bytes]."""
    return np.ascontiguousarray(part).view(np.uint8).reshape(len(part), -1)


def _check(ok: Any, keys: Sequence[bytes], field: str) -> None:
    wrong = np.flatnonzero(~np.asarray(ok, dtype=bool))
    if len(wrong):
        raise RecordError(
            f"the state of user {user_id(keys[int(wrong[0])])!r} is corrupt or of another format ({field}); run a "
            "full refresh, which recomputes all states"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSummaries:
    """Everything that the records and states of N users hold, before encoding."""

    keys: list[bytes]
    """N keys from `vista.store.keys.user_keys`."""
    summary: NDArray[np.float32]
    """[N, K, d]."""
    tail: Tail
    """The last events of the N users, items as rows of the model."""
    event_count: NDArray[np.int64]
    """[N] events that each record covers."""
    last_event_ts: NDArray[np.int64]
    """[N] time of the newest of these events; NO_TIMESTAMP without events."""
    history_digest: NDArray[np.uint64]
    """[N] digests of these events, from `vista.store.keys.history_digests`."""
    counters: tuple[CounterCodes, ...] = ()
    """The counters of the N users, one for each field; empty if the model has no counters."""
    features: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Of the N users, [N] by name: the model's codes int32, -1 for a missing value, or float32 numbers, NaN for a
    missing one."""
    states: StateArrays | None = None
    """The states of the N users; None if the store keeps no states."""

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, row: int) -> UserSummaries:
        """The summary of one user (N = 1)."""
        one = slice(row, row + 1)
        return UserSummaries(
            keys=self.keys[one],
            summary=self.summary[one],
            tail=self.tail.of_user(row),
            event_count=self.event_count[one],
            last_event_ts=self.last_event_ts[one],
            history_digest=self.history_digest[one],
            counters=tuple(one.select(np.array([row])) for one in self.counters),
            features={name: values[one] for name, values in self.features.items()},
            states=None if self.states is None else self.states[one],
        )
