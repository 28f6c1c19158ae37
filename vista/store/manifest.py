"""The manifest of a generation: what its records share, and which part of the log they cover."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lmdb
import xxhash

from vista.config.checks import Codec, StateDtype
from vista.errors import ConfigError, StoreError, UnfinishedError, shown
from vista.files import TABLE, FieldRule, check_fields, either, hexadecimal, list_of, one_of, text, whole
from vista.store.folder_files import REMEDY
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, KINDS, MANIFEST_KEY, common_kind, kinds_of
from vista.store.layout import MAX_GENERATION, StoreUrl
from vista.store.record import (
    FORMAT_VERSION,
    HEADER_BYTES,
    MAX_RECORD_BYTES,
    MAX_VALUES,
    CounterLayout,
    RecordSpec,
    TailColumn,
    UserColumn,
    sum_of_checksums,
)
from vista.store.record_encoding import key_id
from vista.store.state_record import StateSpec

C = TypeVar("C", bound=TailColumn)

NOT_IDENTITY = (
    *("generation", "created_at", "refreshed_at", "log_digest", "going_to", "going_to_digest"),
    *("count", "user_kind", "records_digest", "items_digest"),
)
"""Fields of a manifest that may differ between two runs of the same refresh."""

OF_SEVERAL_LOGS = 0
"""The `applied_segment` of a store that was merged from several logs, until one log continues it."""

CHECKSUM_DIGITS = 16
"""Hexadecimal digits with which the bytes of a manifest begin."""

_MOST_MS = 253_402_300_799_999
"""End of the year 9999, the last that can be shown."""
_RULES = {
    "generation": whole(1, MAX_GENERATION),
    "created_at": whole(0, _MOST_MS),
    "summarizer_id": hexadecimal(64),
    "num_tokens": whole(0, 65_535),
    "dim": whole(1, 65_535),
    "codec": one_of(*(codec.value for codec in Codec)),
    "tail_len": whole(0, MAX_RECORD_BYTES),
    "until": either(text(), whole(-(2**63), 2**63 - 1), one_of(None)),
    "applied_segment": whole(),
    "total_users": whole(),
    "run_digest": text(),
    "key_id": either(hexadecimal(16), one_of(None)),
    "format_version": one_of(FORMAT_VERSION),
    "state_dtype": one_of(*(dtype.value for dtype in StateDtype)),
    "state_shape": list_of(whole(0, 65_535), 3, 3),
    "pooled_dim": whole(0, 65_535),
    "counters": either(TABLE, one_of(None)),
    "user_columns": list_of(TABLE),
    "tail_columns": list_of(TABLE),
    "log_digest": text(),
    "going_to": whole(),
    "going_to_digest": text(),
    "refreshed_at": whole(0, _MOST_MS),
    "count": whole(),
    "user_kind": one_of(*KINDS.values(), "mixed", None),
    "records_digest": hexadecimal(16),
    "items_digest": either(hexadecimal(CHECKSUM_DIGITS), one_of("")),
}
"""Rules of the fields as JSON."""


def start_of_run(created_at: int | None) -> int:
    """`created_at`, or by default now, ms.

    Raises:
        ConfigError: nobody could read a manifest with that time.
    """
    now = time.time_ns() // 1_000_000 if created_at is None else created_at
    if not 0 <= now <= _MOST_MS:
        raise ConfigError(f"created_at={now}: is not a time from 1970 to 9999, in ms; correct the clock, then rerun")
    return now


_TAIL_COLUMN = {"name": text(), "size": either(whole(1, MAX_VALUES), one_of(None))}
_USER_COLUMN = {**_TAIL_COLUMN, "values": either(hexadecimal(64), one_of(""))}
"""Rules of the fields of a `TailColumn` and of a `UserColumn`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a generation is, as stored under `!manifest`.

    A refresh describes what it will write with a manifest; `StoreWriter.open` then sets `generation` and `key_id`.
    """

    generation: int = 0
    """Number of the generation; 0 before a writer has assigned one."""
    created_at: int
    """Start of the run, ms."""
    summarizer_id: str
    """SHA-256 in hex."""
    num_tokens: int
    """K."""
    dim: int
    """d."""
    codec: str
    """How summary rows are stored."""
    tail_len: int
    """Most events of a stored tail."""
    until: str | int | None = None
    """Which events the summaries may cover, as given to the refresh."""
    applied_segment: int
    """Newest segment of the log that all records cover; an unfinished incremental refresh is already beyond it."""
    total_users: int
    """Users of the run, in its fixed order; `!cursor` counts them."""
    run_digest: str
    """Digest of the log's content and of the order of the users; a cursor is valid only together with it."""
    key_id: str | None = None
    """Id of the key of the records' authentication codes (`record_encoding.key_id`); None without codes."""
    format_version: int = FORMAT_VERSION
    state_dtype: str = StateDtype.none.value
    state_shape: tuple[int, int, int] = (0, 0, 0)
    """Layers, heads and head dim of a state."""
    pooled_dim: int = 0
    """Width of the sums of item vectors in a state; 0 without states or pooled vectors."""
    counters: dict[str, Any] | None = None
    """How counters are stored, from `CounterLayout.to_dict`; None if the generation has no counters."""
    user_columns: list[dict[str, Any]] = field(default_factory=list)
    """Features of the users, as fields of a `UserColumn`."""
    tail_columns: list[dict[str, Any]] = field(default_factory=list)
    """Features of the tail's events, as fields of a `TailColumn`."""
    log_digest: str = ""
    """Digest of the log's sources up to `applied_segment` (`EventLog.sources_digest`); another log is refused.

    Of several logs, the digest of their event sources (`digests_of_events`); empty if no log continues them.
    """
    going_to: int = 0
    """Segment that an unfinished incremental refresh is bringing records to; 0 if there is none."""
    going_to_digest: str = ""
    """Digest of the log's sources up to `going_to`."""
    refreshed_at: int = 0
    """Start of the last finished refresh, full or incremental, ms: all users were current at that time."""
    count: int = 0
    """Records. Every transaction updates it, like the two below."""
    user_kind: str | None = None
    """Type of the user ids: int, str or mixed; None without records."""
    records_digest: str = f"{0:016x}"
    """Sum mod 2^64 of all records' checksums, in hex."""
    items_digest: str = ""
    """Checksum with which the values of items begin (`ItemValues`); empty if the generation has none."""

    def identity(self) -> dict[str, Any]:
        """The fields that must be equal for an unfinished generation to be resumed."""
        fields = dataclasses.asdict(self)
        for name in NOT_IDENTITY:
            del fields[name]
        return fields

    def spec(self, key: bytes | None = None) -> RecordSpec:
        """What each record of the generation must hold.

        Args:
            key: 32 bytes, if the records are authenticated.

        Raises:
            StoreError: the generation was written without a key or with another one, or `key` is missing.
        """
        given = None if key is None else key_id(key)
        if given != self.key_id:
            raise _key_error(self.generation, self.key_id, given)
        return RecordSpec(
            summarizer_id=bytes.fromhex(self.summarizer_id),
            generation=self.generation,
            num_tokens=self.num_tokens,
            dim=self.dim,
            codec=Codec(self.codec),
            created_at=self.created_at,
            applied_segment=self.applied_segment,
            counters=self.counter_layout(),
            user_columns=self.user_layout(),
            tail_columns=self.tail_layout(),
            key=key,
        )

    def counter_layout(self) -> CounterLayout | None:
        """How counters are stored; None without counters."""
        return None if self.counters is None else CounterLayout.from_dict(self.counters)

    def user_layout(self) -> tuple[UserColumn, ...]:
        """Features of the users.

        Raises:
            ValueError: a field is missing, unknown, or invalid, or a name comes twice; the message names it.
        """
        return _columns("user_columns", self.user_columns, _USER_COLUMN, UserColumn)

    def tail_layout(self) -> tuple[TailColumn, ...]:
        """Features of the tail's events; errors as of `user_layout`."""
        return _columns("tail_columns", self.tail_columns, _TAIL_COLUMN, TailColumn)

    def state_spec(self) -> StateSpec | None:
        """What each state of the generation must hold; None if it keeps no states."""
        dtype = StateDtype(self.state_dtype)
        if dtype is StateDtype.none:
            return None
        layout, summarizer_id = self.counter_layout(), bytes.fromhex(self.summarizer_id)
        counters = None if layout is None else layout.spec
        shape = self.state_shape
        return StateSpec(summarizer_id, self.generation, *shape, dtype, self.created_at, counters, self.pooled_dim)

    def without_states(self) -> Manifest:
        """Manifest of the same records without states, for copies and imports, which are never refreshed in place."""
        return dataclasses.replace(self, state_dtype=StateDtype.none.value, state_shape=(0, 0, 0), pooled_dim=0)

    def with_records(
        self,
        old: Sequence[bytes | memoryview],
        keys: Sequence[bytes],
        new: Sequence[bytes],
        others: Callable[[], Iterable[bytes | memoryview]],
    ) -> Manifest:
        """The manifest after `old` records were replaced by `new` ones under `keys`.

        Args:
            old: records that are gone; only their headers are used.
            keys: of the new records.
            new: complete records.
            others: headers of all other records. It is called only if an old record is too short to hold a checksum, so
                that the digest must be computed from the others.
        """
        if all(len(record) >= HEADER_BYTES for record in old):
            digest = int(self.records_digest, 16) - sum_of_checksums(old)
        else:
            digest = sum(sum_of_checksums([header]) for header in others() if len(header) >= HEADER_BYTES)
        digest += sum_of_checksums(new)
        return dataclasses.replace(
            self,
            count=self.count + len(new) - len(old),
            user_kind=common_kind([self.user_kind, *kinds_of(keys)]),
            records_digest=f"{digest % (1 << 64):016x}",
        )

    def with_items(self, value: bytes) -> Manifest:
        """The manifest after these values of items were put (`ItemValues.to_bytes`)."""
        return dataclasses.replace(self, items_digest=value[:CHECKSUM_DIGITS].decode())

    def to_bytes(self) -> bytes:
        """JSON after its own XXH3-64 in hex, so that a flipped bit is detected."""
        content = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return xxhash.xxh3_64_hexdigest(content).encode() + b"\n" + content

    @staticmethod
    def from_bytes(value: bytes, path: Path | StoreUrl) -> Manifest:
        """Parse and check the bytes of `to_bytes`; `path` names the store in errors.

        Raises:
            StoreError: corrupt, or of another format version.
        """
        checksum, _, content = value.partition(b"\n")
        if checksum.decode(errors="replace") != xxhash.xxh3_64_hexdigest(content):
            raise StoreError(f"{path}: the manifest is corrupt; {REMEDY}")
        try:
            fields = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise StoreError(f"{path}: the manifest is corrupt ({error}); {REMEDY}") from None
        return Manifest.from_dict(fields, path)

    @staticmethod
    def from_dict(fields: object, path: Path | StoreUrl) -> Manifest:
        """Check the fields of a manifest that is stored outside of a generation, such as in an export.

        Raises:
            StoreError: of another format version, or not a manifest.
        """
        version = fields.get("format_version") if isinstance(fields, dict) else None
        if version != FORMAT_VERSION:
            raise StoreError(
                f"{path}: has format version {shown(version)}, but this version of vista reads {FORMAT_VERSION}; use "
                "the version that wrote it, or refresh the store again"
            )
        try:
            check_fields(fields, _RULES)
            assert isinstance(fields, dict)
            manifest = Manifest(**{**fields, "state_shape": tuple(fields["state_shape"])})
            Manifest.spec(dataclasses.replace(manifest, key_id=None))
            manifest.state_spec()
        except ValueError as error:
            raise StoreError(
                f"{path}: the manifest was written by another version of vista, or is damaged ({error}); {REMEDY}"
            ) from error
        return manifest


@dataclass(slots=True)
class Tally:
    """What a manifest says about all records, accumulated batch by batch."""

    count: int = 0
    digest: int = 0
    user_kind: str | None = None
    """int, str, mixed, or None without records."""

    def add(self, keys: Sequence[bytes], records: Sequence[bytes | memoryview]) -> None:
        """Count a batch."""
        self.count += len(keys)
        self.digest = (self.digest + sum_of_checksums(records)) % (1 << 64)
        self.user_kind = common_kind([self.user_kind, *kinds_of(keys)])

    @property
    def records_digest(self) -> str:
        """Sum mod 2^64 of the checksums, in hex."""
        return f"{self.digest:016x}"


def _columns(name: str, given: Sequence[Any], rules: Mapping[str, FieldRule], kind: type[C]) -> tuple[C, ...]:
    for fields in given:
        check_fields(fields, rules)
    if len({fields["name"] for fields in given}) < len(given):
        raise ValueError(f"{name}: column names must be unique")
    return tuple(kind(**fields) for fields in given)


def read_manifest(transaction: lmdb.Transaction[memoryview], path: Path) -> Manifest:
    """Read the manifest of a complete generation; `path` names it in errors.

    Raises:
        UnfinishedError: the generation is not complete.
        StoreError: the manifest is corrupt.
    """
    value = transaction.get(MANIFEST_KEY)
    if value is None or transaction.get(COMPLETE_KEY) is None:
        raise UnfinishedError(f"{path} was never finished; {REMEDY}")
    return Manifest.from_bytes(bytes(value), path)


def read_cursor(transaction: lmdb.Transaction[memoryview], manifest: Manifest, path: Path) -> int:
    """Users that the run of a generation has done; `path` names it in errors.

    Raises:
        StoreError: it is not a number up to the users of the run.
    """
    return parse_cursor(bytes(transaction.get(CURSOR_KEY, b"0")), manifest, path)


def parse_cursor(value: bytes, manifest: Manifest, path: Path | StoreUrl) -> int:
    """The number that a cursor's bytes hold; errors as of `read_cursor`."""
    if len(value) > 19 or not value.isdigit() or int(value) > manifest.total_users:
        raise StoreError(f"{path}: the cursor {shown(value, 40)} is corrupt; {REMEDY}")
    return int(value)


def _key_error(generation: int, written: str | None, given: str | None) -> StoreError:
    name = f"gen-{generation}"
    if written is None:
        return StoreError(
            f"{name} was written without an authentication key, so nothing proves where its records come from; refresh "
            "the store with this key, or open it without one (authentication_key_file=null) if you trust its folder"
        )
    need = f"{name} was written with authentication key {written}"
    if given is None:
        return StoreError(
            f"{need}; pass it: key=… (32 bytes) in Python, authentication_key_file=… or VISTA_AUTHENTICATION_KEY on "
            "the command line"
        )
    return StoreError(f"{need}, but the given key is {given}; pass the key that wrote it, or refresh with this one")
