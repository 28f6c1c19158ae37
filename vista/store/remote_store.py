"""A store on a Valkey or Redis server: its generations, CURRENT, and tombstones."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
import xxhash

from vista.arrays import Int
from vista.errors import (
    RecordError,
    StoreClosedError,
    StoreError,
    StoreLockedError,
    StoreUnavailableError,
    StoreWriteError,
    UnfinishedError,
    shown,
)
from vista.files import checked_path, make_folders
from vista.store.layout import PRIVATE, make_folder, parse_pointer
from vista.store.lmdb_environment import SharedEnvironment
from vista.store.local_generation import FoundStates, OpenGeneration
from vista.store.manifest import CHECKSUM_DIGITS, Manifest
from vista.store.record import RawRecords, check_records, present_records
from vista.store.record_spec import HEADER_BYTES, RecordSpec, user_of
from vista.store.server_connection import Command, GenerationKeys, KeyNames, ServerConnection, evicting
from vista.store.state_record import StateSpec, decode_states
from vista.store.store_url import StoreUrl
from vista.store.tombstones import digests_of

# Records of a store on a server that this host has read, in LMDB, for all processes of the host.
#
# An entry's key is the XXH3-128 of the version of the records and the user's key. A change of any record gives another
# version, so an entry is never out of date, and those of older versions are evicted like all others.

_KEY_BYTES = 16
_WAIT_S = 0.05
"""Longest time that a read waits for another process that writes the cache."""

logger = logging.getLogger(__name__)


class RecordCache:
    """Bounded; if it is full, new entries replace random ones. If the disk fails, reads continue without it.

    Args:
        folder: of this store alone; made with its parents when it is first used.
        max_bytes: of the pages in use, exceeded by at most one batch.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._environment: SharedEnvironment | None = None
        self._failed = False

    def get(self, version: bytes, keys: Sequence[bytes]) -> list[bytes | None]:
        """Records of this version; None where it holds none."""
        names = [xxhash.xxh3_128_digest(version + key) for key in keys]

        def copy(transaction: lmdb.Transaction[memoryview]) -> list[bytes | None]:
            values = [transaction.get(name) for name in names]
            return [None if value is None else bytes(value) for value in values]

        try:
            return [None] * len(keys) if self._failed else self._open().read(copy)
        except (StoreError, OSError) as error:
            self._fail(error)
            return [None] * len(keys)

    def put(self, version: bytes, records: Mapping[bytes, bytes]) -> None:
        """Add records of this version, and evict others if there are too many."""

        def replace(transaction: lmdb.Transaction[memoryview]) -> None:
            if is_full:
                _evict(transaction, 2 * len(records))
            for key, record in records.items():
                transaction.put(xxhash.xxh3_128_digest(version + key), record)

        if self._failed or not records:
            return
        try:
            environment = self._open()
            is_full = environment.live_bytes() > self._max_bytes
            environment.write(replace, _WAIT_S)
        except StoreLockedError:
            return  # Another process is writing; a later read adds them.
        except (StoreError, OSError, lmdb.Error) as error:
            self._fail(error)

    def forget(self, version: bytes, keys: Sequence[bytes]) -> None:
        """Remove the records of some users, because one of them is damaged."""

        def remove(transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                transaction.delete(xxhash.xxh3_128_digest(version + key))

        try:
            self._open().write(remove, _WAIT_S)
        except StoreLockedError:
            return
        except (StoreError, OSError, lmdb.Error) as error:
            self._fail(error)

    def close(self) -> None:
        """Close the files; the next use opens them again."""
        if self._environment is not None:
            self._environment.release()
            self._environment = None

    def _open(self) -> SharedEnvironment:
        if self._environment is None or self._environment.inherited:
            make_folders(self._folder.parent)
            with suppress(FileExistsError):
                make_folder(self._folder, PRIVATE)
            self._environment = SharedEnvironment.acquire(self._folder, writable=True)
        return self._environment

    def _fail(self, error: Exception) -> None:
        self._failed = True
        logger.warning("%s: records are no longer cached here: %s", self._folder, error)


def _evict(transaction: lmdb.Transaction[memoryview], count: int) -> None:
    """Remove `count` entries, starting at a random place; entries are in the order of their hashes."""
    cursor = transaction.cursor()
    for start in (secrets.token_bytes(_KEY_BYTES), b"\0"):
        found = cursor.set_range(start)
        while found and count:
            found = cursor.delete()
            count -= 1


# The records of one generation on a server.

BATCH_BYTES = 1 << 23
"""About how many bytes one command reads or writes."""
_BATCH_RECORDS = 1024
_EVENT_BYTES = 13
_PART_BYTES = 1 << 20
"""Fits the processor's cache, so that the copy of large records costs little after their arrival."""


class RemoteRecords:
    """Reads records in bounded batches, one round trip per batch.

    Args:
        cache: of this host, for readers; None always asks the server.
        stamp: what the generation's key `!complete` holds. A read fails if it has changed, because the records may then
            have been removed. None does not check.
    """

    def __init__(
        self,
        server: ServerConnection,
        names: GenerationKeys,
        manifest: Manifest,
        stamp: bytes | None,
        cache: RecordCache | None = None,
    ) -> None:
        self.stamp = stamp
        self._cache = cache
        self._version = b""
        """Of the records, as last seen: the stamp and the checksum of the manifest, which every write changes."""
        self._server = server
        self._names = names
        self._number = manifest.generation
        spec = dataclasses.replace(manifest, key_id=None).spec()
        size = HEADER_BYTES + spec.rows_bytes + spec.user_bytes + _EVENT_BYTES * manifest.tail_len
        self.batch_size = min(max(BATCH_BYTES // size, 1), _BATCH_RECORDS)
        """Most records per read."""
        self.part_size = max(_PART_BYTES // size, 1)
        """Records that are checked and copied at once."""

    def get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Values of at most `batch_size` keys, unchecked; None for a user without a record.

        Raises:
            StoreClosedError: the generation was removed.
        """
        return self.get_from_server(keys) if self._cache is None else self._get_cached(self._cache, keys)

    def get_from_server(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """As `get`, without the cache."""
        return self._values([self._names.record(key) for key in keys])

    def states(self, keys: Sequence[bytes], spec: StateSpec) -> FoundStates:
        """Rows of the keys that have a state, and these states.

        Raises:
            RecordError: a state is damaged; the message names the user.
            StoreClosedError: the generation was removed.
        """
        rows: list[int] = []
        values: list[bytes] = []
        for first, part in self._state_parts(keys, spec):
            rows += [row for row, value in enumerate(part, first) if value is not None]
            values += [value for value in part if value is not None]
        return np.array(rows, np.int64), decode_states(values, [keys[row] for row in rows], spec)

    def state_batches(self, spec: StateSpec) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and states of all users who have one, ascending; errors as of `states`."""
        for keys in self.key_batches():
            for first, part in self._state_parts(keys, spec):
                found = {keys[row]: value for row, value in enumerate(part, first) if value is not None}
                decode_states([*found.values()], [*found], spec)
                yield [*found], [*found.values()]

    def forget_cached(self, keys: Sequence[bytes]) -> bool:
        """Remove users from the cache, because a record is damaged; False if there is no cache."""
        if self._cache is None:
            return False
        self._cache.forget(self._version, keys)
        return True

    def key_batches(self, after: bytes = b"u") -> Iterator[list[bytes]]:
        """Keys beyond `after` of the users who have a record, ascending."""
        while True:
            listed = ("ZRANGEBYLEX", self._names.users, b"(" + after, "+", "LIMIT", 0, self.batch_size)
            keys, stamp = self._server.pipeline([listed, ("GET", self._names.complete)])
            self._require_stamp(stamp)
            if not keys:
                return
            after = keys[-1]
            yield keys

    def batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys beyond `after` and their unchecked values, ascending.

        Raises:
            RecordError: the server has lost a record.
        """
        for keys in self.key_batches(after):
            values = self.get(keys)
            missing = [key for key, value in zip(keys, values, strict=True) if value is None]
            if missing:  # Erased since they were listed, or lost.
                scores = self._server.command("ZMSCORE", self._names.users, *missing)
                lost = [key for key, score in zip(missing, scores, strict=True) if score is not None]
                if lost:
                    raise RecordError(
                        f"{self._server.url}: gen-{self._number} lists {user_of(lost[0])}, but the server has lost the "
                        "record; check that nothing else deletes its keys, then refresh the store again"
                    )
            present = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
            if present:
                yield [key for key, _ in present], [value for _, value in present]

    def _state_parts(self, keys: Sequence[bytes], spec: StateSpec) -> Iterator[tuple[int, list[bytes | None]]]:
        """The unchecked states of some users in bounded parts, each with the position of its first user."""
        size = max(BATCH_BYTES // spec.least_bytes, 1)
        for first in range(0, len(keys), size):
            yield first, self._values([self._names.state(key) for key in keys[first : first + size]])

    def _values(self, names: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = self._server.command("MGET", *names, self._names.complete)
        self._require_stamp(values.pop())
        return values

    def _get_cached(self, cache: RecordCache, keys: Sequence[bytes]) -> list[bytes | None]:
        """One round trip, which also tells whether the cached records are still those of the server."""
        version = self._version
        held = cache.get(version, keys)
        while True:
            wanted = [key for key, value in zip(keys, held, strict=True) if value is None]
            # The version first: records that are read after it may be newer, but never older.
            checksum, values = self._server.pipeline(
                [
                    ("GETRANGE", self._names.manifest, 0, CHECKSUM_DIGITS - 1),
                    ("MGET", *map(self._names.record, wanted), self._names.complete),
                ]
            )
            stamp = values.pop()
            self._require_stamp(stamp)
            seen, version = version, stamp + checksum
            if seen == version or len(wanted) == len(keys):
                break
            held = [None] * len(keys)  # Records have changed since they were cached.
        fetched = dict(zip(wanted, values, strict=True))
        self._version = version  # Other threads may set a newer one, to which these records do not belong.
        cache.put(version, {key: value for key, value in fetched.items() if value is not None})
        return [fetched.get(key) if value is None else value for key, value in zip(keys, held, strict=True)]

    def _require_stamp(self, stamp: bytes | None) -> None:
        if self.stamp is not None and stamp != self.stamp:
            raise StoreClosedError(
                f"{self._server.url}: gen-{self._number} was removed from the server while it was in use; open the "
                "store again"
            )


@dataclass(frozen=True, slots=True)
class RemoteGeneration:
    """As `OpenGeneration` says. The connections belong to the store, so there is nothing to release."""

    records: RemoteRecords
    manifest: Manifest
    spec: RecordSpec
    read_current: Callable[[], tuple[int, Manifest, bytes]]
    """Number, manifest and stamp of the published generation."""

    def read(self, keys: list[bytes]) -> list[tuple[Int, RawRecords]]:
        """Positions of the keys that have a record, and the records, a round trip per batch."""
        size = self.records.batch_size
        batches = [self._read_batch(keys[first : first + size], first) for first in range(0, max(len(keys), 1), size)]
        return [part for batch in batches for part in batch]

    def _read_batch(self, keys: list[bytes], first: int) -> list[tuple[Int, RawRecords]]:
        """Parts of a batch that one command reads; it has position `first` in the request."""
        try:
            return self._parts(self.records.get(keys), keys, first)
        except RecordError:
            if not self.records.forget_cached(keys):
                raise
            return self._parts(self.records.get_from_server(keys), keys, first)

    def _parts(self, values: list[bytes | None], keys: list[bytes], first: int) -> list[tuple[Int, RawRecords]]:
        size = self.records.part_size
        return [
            present_records(values[start : start + size], keys[start : start + size], first + start, self.spec)
            for start in range(0, max(len(keys), 1), size)
        ]

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""
        return self.records.key_batches()

    def value(self, key: bytes) -> bytes | None:
        """A user's unchecked record; None without one."""
        return self.records.get([key])[0]

    def raw_batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys beyond `after` and their unchecked records, ascending."""
        return self.records.batches(after)

    def batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """As `raw_batches`, with every record checked.

        Raises:
            RecordError: a record is corrupt or lost; the message names the user.
        """
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def state_batches(self) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and states, ascending, checked; nothing if the generation keeps no states."""
        return iter(()) if (spec := self.manifest.state_spec()) is None else self.records.state_batches(spec)

    def other_keys(self) -> list[bytes]:
        """Nothing: keys under a generation's prefix cannot be listed without looking at all keys of the server."""
        return []

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """The stored states of some users; None if the generation keeps no states."""
        return None if (spec := self.manifest.state_spec()) is None else self.records.states(keys, spec)

    def is_same(self, other: OpenGeneration) -> bool:
        """Whether both hold the same records."""
        return isinstance(other, RemoteGeneration) and other.records.stamp == self.records.stamp

    def is_published(self) -> bool:
        """Whether CURRENT names this generation."""
        return self.read_current()[2] == self.records.stamp

    def reread(self) -> RemoteGeneration:
        """The same generation with the manifest as an incremental refresh has left it."""
        _, manifest, stamp = self.read_current()
        return dataclasses.replace(self, manifest=manifest) if stamp == self.records.stamp else self

    def reopen(self) -> None:
        """Nothing to do: the client opens new connections after a fork."""

    def release(self) -> None:
        """Nothing to do."""


class RemoteTombstones:
    """See `vista.store.tombstones.ErasedUsers`."""

    def __init__(self, server: ServerConnection, name: bytes) -> None:
        self.name = name
        self._server = server

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""
        return [bool(reply) for reply in self._server.command(*self.question(keys))] if keys else []

    def question(self, keys: Sequence[bytes]) -> Command:
        """The command that replies with a 1 for each of these users, at least one, who is erased."""
        return "SMISMEMBER", self.name, *digests_of(keys).tolist()

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures."""
        self._server.command("SADD", self.name, *digests_of(keys).tolist())

    def __len__(self) -> int:
        return int(self._server.command("SCARD", self.name))


class RemoteStore:
    """One store on a server (`vista.store.local_generation.Generations`)."""

    def __init__(self, server: ServerConnection, cache: RecordCache | None = None) -> None:
        self.server = server
        self._cache = cache
        self.url = server.url
        self.names = KeyNames(server.url.name)
        self.tombstones = RemoteTombstones(server, self.names.tombstones)

    @classmethod
    def connect(cls, url: StoreUrl, *, cached: bool = False) -> RemoteStore:
        """Connect to the server; errors as of `ServerConnection.check` and `command`.

        Args:
            url: of the store.
            cached: read through the cache that the URL names, if it names one.
        """
        server = ServerConnection(url)
        server.check()
        if not cached or url.cache is None:
            return cls(server)
        folder = checked_path(url.cache, StoreError) / xxhash.xxh3_64_hexdigest(str(url).encode())
        return cls(server, RecordCache(folder.absolute(), int(1e6 * url.cache_mb)))

    def current(self) -> int:
        """Number of the published generation.

        Raises:
            StoreError: nothing is published, or CURRENT is damaged.
        """
        value = self.server.command("GET", self.names.current)
        if value is None:
            raise StoreError(
                f"{self.url} holds no published generation; check the store's name, or run `vista refresh "
                f"store={self.url}` or `vista store copy to={self.url}` first"
            )
        try:
            return parse_pointer(value)
        except ValueError as error:
            raise StoreError(
                f"{self.url}: CURRENT {error}; publish a generation with `vista store rollback store={self.url} to=N`, "
                "or refresh the store again"
            ) from None

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        try:
            return self.current()
        except StoreUnavailableError:
            raise
        except StoreError:
            return None

    def last_complete(self) -> int:
        """The highest generation number that was ever complete; 0 if there was none.

        Raises:
            StoreWriteError: LAST is damaged.
        """
        value = self.server.command("GET", self.names.last)
        try:
            return 0 if value is None else parse_pointer(value)
        except ValueError as error:
            raise StoreWriteError(
                f"{self.url}: LAST {error}; remove the key {self.names.last.decode()} from the server, and numbering "
                f"continues after gen-{max(self.numbers(), default=0)}, the newest generation there"
            ) from None

    def numbers(self) -> list[int]:
        """Numbers of all generations, finished or not, ascending."""
        name = self.names.generations
        return sorted(self.whole_number(member, name) for member in self.server.command("SMEMBERS", name))

    def whole_number(self, value: bytes, name: bytes) -> int:
        """The number above 0 in a key of this name.

        Raises:
            StoreError: there is none.
        """
        if not 0 < len(value) < 19 or not value.isdigit() or not int(value):
            raise StoreError(
                f"{self.url}: the key {name.decode()} holds {shown(value, 40)}; check whether other programs write to "
                "the keys of this store, and mend it, or refresh into a store of another name"
            )
        return int(value)

    def next_number(self, least: int = 1) -> int:
        """A generation number above all existing ones, above all that were ever complete, and not below `least`."""
        return max(least, 1 + max([self.last_complete(), *self.numbers()]))

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""
        return self._complete(number)[0]

    def open(self, number: int, key: bytes | None) -> RemoteGeneration:
        """Open a complete generation.

        Raises:
            StoreError: missing, unfinished, damaged, or of another key.
        """
        manifest, stamp = self._complete(number)
        records = RemoteRecords(self.server, self.names.generation(number), manifest, stamp, self._cache)
        return RemoteGeneration(records, manifest, manifest.spec(key), self._current_and_stamp)

    def make_durable(self) -> None:
        """Wait until all that was written so far is on the server's disk, if it keeps an append-only file."""
        self.server.make_durable(self.names.synced)

    def close(self) -> None:
        """Close the connections and the cache."""
        self.server.close()
        if self._cache is not None:
            self._cache.close()

    def _current_and_stamp(self) -> tuple[int, Manifest, bytes]:
        number = self.current()
        return number, *self._complete(number)

    def _complete(self, number: int) -> tuple[Manifest, bytes]:
        """Manifest and stamp of a complete generation."""
        names = self.names.generation(number)
        commands: list[Command] = [("MGET", names.manifest, names.complete), ("PTTL", names.complete)]
        (manifest, stamp), left_ms = self.server.pipeline(commands)
        if manifest is None or stamp is None:
            numbers = self.numbers()
            existing = ", ".join(f"gen-{each}" for each in numbers) or "none"
            if number not in numbers:
                raise StoreError(
                    f"{self.url} has no gen-{number}; name an existing generation: {existing}. If it has expired "
                    "(ttl_days), run a full refresh"
                )
            reason = "was never finished" if manifest is not None else "has expired (ttl_days) or was removed"
            raise UnfinishedError(f"{self.url}: gen-{number} {reason}; refresh the store again")
        if left_ms >= 0:
            self.require_no_eviction()
        return self.parsed(manifest, number), stamp

    def require_no_eviction(self) -> None:
        """Raise StoreError if the server could evict the records of a generation that expires."""
        if self.server.evicts_expiring:
            raise evicting(self.url, "volatile-…")

    def parsed(self, value: bytes, number: int) -> Manifest:
        """A generation's manifest from its bytes.

        Raises:
            StoreError: it is damaged.
        """
        manifest = Manifest.from_bytes(value, self.url)
        if manifest.generation != number:
            raise StoreError(
                f"{self.url}: the manifest of gen-{number} is that of gen-{manifest.generation}; publish another "
                "generation (`vista store rollback`), or refresh the store again"
            )
        return manifest
