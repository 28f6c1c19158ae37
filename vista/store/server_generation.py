"""One generation of a store on a server: open for reading, or open for writing."""

from __future__ import annotations

import dataclasses
import secrets
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from copy import copy
from functools import partial
from itertools import chain, pairwise
from typing import TYPE_CHECKING

import numpy as np

from vista.arrays import Int
from vista.errors import RecordError, StoreClosedError, StoreWriteError
from vista.store.folder_generation import Batch
from vista.store.layout import pointer_to
from vista.store.manifest import Manifest, Tally, parse_cursor
from vista.store.record import HEADER_BYTES, RecordSpec, check_records, user_of
from vista.store.record_reading import RawRecords, present_records
from vista.store.server_connection import Command, GenerationKeys, ServerConnection, ServerLock
from vista.store.state_record import FoundStates, StateSpec, decode_states

if TYPE_CHECKING:
    from vista.store.server import Server

BATCH_BYTES = 1 << 23
"""About how many bytes one command reads or writes."""
_BATCH_RECORDS = 1024
_EVENT_BYTES = 13
_PART_BYTES = 1 << 20
"""Fits the processor's cache, so that the copy of large records costs little after their arrival."""
Plan = tuple[Manifest, dict[bytes, bytes], list[Command], int]
"""The manifest after a write, other values to set by name, other commands, and a number to return."""
RECHECKED_S = 1.0
"""While users are missing, a reader checks again after this time that the server does not evict records."""


class ServerGeneration:
    """A complete generation on a server, open for reading in bounded batches, one round trip per batch.

    The connections belong to the store, so `release` does nothing.

    Args:
        server: connection to it.
        names: of the generation's keys.
        manifest: as it was when the generation was opened.
        spec: what each record holds.
        stamp: what the generation's key `!complete` holds. A read fails if it has changed, because the records may then
            have been removed. None does not check.
        read_current: for readers, tells manifest and stamp of the published generation.
    """

    def __init__(
        self,
        server: ServerConnection,
        names: GenerationKeys,
        manifest: Manifest,
        spec: RecordSpec,
        stamp: bytes | None = None,
        read_current: Callable[[], tuple[Manifest, bytes]] | None = None,
    ) -> None:
        self.manifest, self.spec, self.stamp = manifest, spec, stamp
        self._server, self._names = server, names
        self._read_current = read_current
        size = HEADER_BYTES + spec.rows_bytes + spec.user_bytes + _EVENT_BYTES * manifest.tail_len
        self.batch_size = min(max(BATCH_BYTES // size, 1), _BATCH_RECORDS)
        """Most records per read."""
        self._part_size = max(_PART_BYTES // size, 1)
        """Records that are checked and copied at once."""

    def read(self, keys: list[bytes]) -> list[tuple[Int, RawRecords]]:
        """Positions of the keys that have a record, ascending, and the records. Raises StoreClosedError if the
        generation was removed."""
        parts = []
        for first in range(0, max(len(keys), 1), self.batch_size):
            batch = keys[first : first + self.batch_size]
            parts += self._parts(self._get(batch), batch, first)
        lacks_users = sum(len(rows) for rows, _ in parts) < len(keys)
        if lacks_users and time.monotonic() - self._server.checked_at > RECHECKED_S:
            self._server.check()  # It may have begun to evict records.
        return parts

    def value(self, key: bytes) -> bytes | None:
        """A user's unchecked record; None without one."""
        return self._get([key])[0]

    def items(self) -> bytes | None:
        """The unchecked values of items; None without any."""
        return self._values([self._names.items])[0]

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

    def raw_batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """Keys beyond `after` and their unchecked records, ascending. Raises RecordError if the server has lost a
        record."""
        for keys in self.key_batches(after):
            values = self._get(keys)
            missing = [key for key, value in zip(keys, values, strict=True) if value is None]
            if missing:  # Erased since they were listed, or lost.
                scores = self._server.command("ZMSCORE", self._names.users, *missing)
                lost = [key for key, score in zip(missing, scores, strict=True) if score is not None]
                if lost:
                    raise RecordError(
                        f"{self._server.url}: gen-{self.manifest.generation} lists {user_of(lost[0])}, but the server "
                        "has lost the record; check that nothing else deletes its keys, then refresh the store again"
                    )
            present = [(key, value) for key, value in zip(keys, values, strict=True) if value is not None]
            if present:
                yield [key for key, _ in present], [value for _, value in present]

    def batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """As `raw_batches`, with every record checked. Raises RecordError if a record is corrupt or lost; the message
        names the user."""
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states.

        Raises:
            RecordError: a state is damaged; the message names the user.
            StoreClosedError: the generation was removed.
        """
        spec = self.manifest.state_spec()
        if spec is None:
            return None
        values = [value for part in self._state_parts(keys, spec) for _, value in part]
        rows = [row for row, value in enumerate(values) if value is not None]
        present = [value for value in values if value is not None]
        return np.array(rows, np.int64), decode_states(present, [keys[row] for row in rows], spec)

    def state_batches(self) -> Iterator[Batch]:
        """Keys and states of all users who have one, ascending, checked; errors as of `states`."""
        spec = self.manifest.state_spec()
        if spec is None:
            return
        for keys in self.key_batches():
            for part in self._state_parts(keys, spec):
                found = {key: value for key, value in part if value is not None}
                decode_states([*found.values()], [*found], spec)
                yield [*found], [*found.values()]

    def other_keys(self) -> list[bytes]:
        """Nothing: keys under a generation's prefix cannot be listed without looking at all keys of the server."""
        return []

    def is_same(self, other: object) -> bool:
        """Whether both hold the same records."""
        return isinstance(other, ServerGeneration) and other.stamp == self.stamp

    def is_published(self) -> bool:
        """Whether CURRENT names this generation."""
        return self._published()[1] == self.stamp

    def reread(self) -> ServerGeneration:
        """The same generation with the manifest as an incremental refresh has left it."""
        manifest, stamp = self._published()
        reread = copy(self)
        reread.manifest = manifest if stamp == self.stamp else self.manifest
        return reread

    def reopen(self) -> None:
        """Nothing to do: the client opens new connections after a fork."""

    def release(self) -> None:
        """Nothing to do."""

    def __enter__(self) -> ServerGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def _published(self) -> tuple[Manifest, bytes]:
        assert self._read_current is not None, "only of readers"
        return self._read_current()

    def _parts(self, values: list[bytes | None], keys: list[bytes], first: int) -> list[tuple[Int, RawRecords]]:
        """The records of a batch, which has position `first` in the request."""
        size = self._part_size
        return [
            present_records(values[start : start + size], keys[start : start + size], first + start, self.spec)
            for start in range(0, max(len(keys), 1), size)
        ]

    def _state_parts(self, keys: Sequence[bytes], spec: StateSpec) -> Iterator[list[tuple[bytes, bytes | None]]]:
        """The users with their unchecked states, in bounded parts."""
        size = max(BATCH_BYTES // spec.least_bytes, 1)
        for part in (keys[first : first + size] for first in range(0, len(keys), size)):
            yield list(zip(part, self._values([self._names.state(key) for key in part]), strict=True))

    def _get(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Unchecked records of at most `batch_size` keys; None for a user without a record."""
        return self._values([self._names.record(key) for key in keys])

    def _values(self, names: Sequence[bytes]) -> list[bytes | None]:
        values: list[bytes | None] = self._server.command("MGET", *names, self._names.complete)
        self._require_stamp(values.pop())
        return values

    def _require_stamp(self, stamp: bytes | None) -> None:
        if self.stamp is not None and stamp != self.stamp:
            raise StoreClosedError(
                f"{self._server.url}: gen-{self.manifest.generation} was removed from the server while it was in use; "
                "open the store again"
            )


class ServerWriter:
    """One generation, open for writing; `manifest` is updated by every write.

    Every write is one atomic change of records, the list of users, and the manifest, so that all three always agree.

    Args:
        lock: of the writer; None for an erasure, which works alongside a writer.
    """

    def __init__(self, store: Server, number: int, lock: ServerLock | None) -> None:
        self.names = store.names.generation(number)
        self._store = store
        self._server = store.connection
        self._number = number
        self._lock = lock
        self.manifest = self.read_manifest()
        spec = dataclasses.replace(self.manifest, key_id=None).spec()
        self.records = ServerGeneration(self._server, self.names, self.manifest, spec)

    @classmethod
    def create(cls, store: Server, manifest: Manifest, lock: ServerLock) -> ServerWriter:
        """Make an empty generation."""
        names = store.names.generation(manifest.generation)

        def plan() -> tuple[list[Command], None]:
            lock.require(store.connection.command("GET", lock.name))
            return [
                ("SADD", store.names.generations, manifest.generation),
                ("MSET", names.manifest, manifest.to_bytes(), names.cursor, b"0"),
                lock.next_write(),
            ], None

        store.connection.change([lock.name], plan)
        lock.wrote()
        return cls(store, manifest.generation, lock)

    @property
    def complete(self) -> bool:
        """Whether all its records are written and checked."""
        return bool(self._server.command("EXISTS", self.names.complete))

    def put(
        self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes], meta: Mapping[bytes, bytes]
    ) -> int:
        """Write a batch as `FolderWriter.put` does, but in bounded parts; the last part also puts `meta`."""
        if keys and bool(states) != self._keeps_states:
            raise ValueError(f"states: got {len(states)} for {len(keys)} records of {self._store.address}")
        parts = _parts([*map(len, records)] if not states else [*map(_both_lengths, records, states)])
        return sum(
            self._put(keys[part], records[part], states[part], meta if part == parts[-1] else {}) for part in parts
        )

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users; returns how many had a record."""
        size = self.records.batch_size
        return sum(self._remove(keys[first : first + size]) for first in range(0, len(keys), size))

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove users' states alone."""
        if self._keeps_states and keys:
            self._write([], lambda manifest: (manifest, {}, [("UNLINK", *map(self.names.state, keys))], 0))

    def remove_erased(self) -> int:
        """Remove erased users who still have a record, because their erasure was interrupted; returns how many."""
        if not len(self._store.erased_users):
            return 0
        count = 0
        for keys in self.key_batches():
            erased = self._store.erased_users.erased(keys)
            count += self.remove([key for key, gone in zip(keys, erased, strict=True) if gone])
        return count

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest."""
        self._write([], lambda manifest: (change(manifest), {}, [], 0))

    def items(self) -> bytes | None:
        """The unchecked values of items; None without any."""
        return self.records.items()

    def put_items(self, value: bytes) -> None:
        """Replace the values of items (`ItemValues.to_bytes`)."""
        self._write([], lambda manifest: (manifest.with_items(value), {self.names.items: value}, [], 0))

    def mark_complete(self, wanted: Manifest, num_erased: int, *, publish: bool) -> bool:
        """Let readers open the generation once CURRENT names it, and make CURRENT name it with `publish`, atomically.

        Args:
            wanted: what the manifest must be now, because the records were compared with it.
            num_erased: number of erased users that the records were checked for.
            publish: change CURRENT too.

        Returns:
            False if users were erased meanwhile; nothing is changed then.
        """

        def plan(manifest: Manifest) -> Plan:
            if manifest != wanted or len(self._store.erased_users) != num_erased:
                return manifest, {}, [], 0
            pointer, commands = pointer_to(self._number), list[Command]()
            values = {} if self.complete else {self.names.complete: secrets.token_hex(8).encode()}
            if self._store.last_complete() < self._number:
                commands.append(("SET", self._store.names.last, pointer))
            if publish:
                commands.append(("SET", self._store.names.current, pointer))
            refreshed_at = manifest.refreshed_at or manifest.created_at
            return dataclasses.replace(manifest, refreshed_at=refreshed_at), values, commands, 1

        return bool(self._write([self._store.erased_users.name], plan))

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Header of each user's record; None without a record."""
        if not keys:
            return []
        replies = self._server.pipeline([self._header(key) for key in keys])
        empty = [row for row, reply in enumerate(replies) if not reply]  # without a record, or with an empty one
        if empty:
            stored = self._server.pipeline([("EXISTS", self.names.record(keys[row])) for row in empty])
            for row, exists in zip(empty, stored, strict=True):
                replies[row] = replies[row] if exists else None
        return replies

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""
        return self.records.key_batches()

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states."""
        return self.records.states(keys)

    def num_states(self) -> int:
        """How many users have a state."""
        return sum(
            int(self._server.command("EXISTS", *map(self.names.state, keys)))
            for keys in (self.key_batches() if self._keeps_states else ())
        )

    def tally(self, spec: RecordSpec) -> Tally:
        """Check and count all records. Raises RecordError if a record is corrupt or lost; the message names the
        user."""
        tally = Tally()
        for keys, records in self.records.raw_batches():
            check_records(records, keys, spec)
            tally.add(keys, records)
        return tally

    def read_manifest(self) -> Manifest:
        """The manifest as it is stored now."""
        return self._parsed(self._server.command("GET", self.names.manifest))

    def read_cursor(self) -> int:
        """Users done, in the run's fixed order."""
        value = self._server.command("GET", self.names.cursor)
        return parse_cursor(value or b"0", self.manifest, self._store.address)

    @property
    def _keeps_states(self) -> bool:
        return self.manifest.state_spec() is not None

    def _put(
        self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes], meta: Mapping[bytes, bytes]
    ) -> int:
        def plan(manifest: Manifest) -> Plan:
            erased = self._store.erased_users.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            put_keys, put_records = [keys[place] for place in remaining], [records[place] for place in remaining]
            old = [header for header in self.headers(put_keys) if header is not None]
            values = {self.names.prefix + key: value for key, value in meta.items()}
            values.update(zip(map(self.names.record, put_keys), put_records, strict=True))
            if states:
                values.update((self.names.state(keys[place]), states[place]) for place in remaining)
            listed: Command = ("ZADD", self.names.users, *(part for key in put_keys for part in (0, key)))
            commands = [listed] if put_keys else []
            manifest = manifest.with_records(old, put_keys, put_records, partial(self._other_headers, set(put_keys)))
            return manifest, values, commands, len(put_keys)

        return self._write([self._store.erased_users.name], plan)

    def _remove(self, keys: Sequence[bytes]) -> int:
        def plan(manifest: Manifest) -> Plan:
            old = [header for header in self.headers(keys) if header is not None]
            commands: list[Command] = [("UNLINK", *self.names.values(keys)), ("ZREM", self.names.users, *keys)]
            manifest = manifest.with_records(old, [], [], partial(self._other_headers, set(keys)))
            return manifest, {}, commands, len(old)

        return self._write([], plan) if keys else 0

    def _write(self, watched: list[bytes], plan: Callable[[Manifest], Plan]) -> int:
        """Change the manifest and other keys atomically, under the lock if this is its holder."""
        lock = self._lock

        def planned() -> tuple[list[Command], tuple[Manifest, int]]:
            if lock is not None:
                lock.require(self._server.command("GET", lock.name))
            manifest, values, commands, count = plan(self.read_manifest())
            values[self.names.manifest] = manifest.to_bytes()
            counted = [] if lock is None else [lock.next_write()]
            return [*commands, ("MSET", *chain.from_iterable(values.items())), *counted], (manifest, count)

        keys = [self.names.manifest, *watched, *([] if lock is None else [lock.name])]
        self.manifest, count = self._server.change(keys, planned)
        if lock is not None:
            lock.wrote()
        return count

    def _other_headers(self, keys: Collection[bytes]) -> Iterator[bytes]:
        """Headers of the records of all users except `keys`."""
        for batch in self.key_batches():
            headers = self.headers([key for key in batch if key not in keys])
            yield from (header for header in headers if header is not None)

    def _header(self, key: bytes) -> Command:
        return "GETRANGE", self.names.record(key), 0, HEADER_BYTES - 1

    def _parsed(self, value: bytes | None) -> Manifest:
        if value is None:
            raise StoreWriteError(
                f"{self._store.address}: gen-{self._number} is missing: another writer removed it, or the server lost "
                "it; rerun the command, or run a full refresh if nothing else is "
                "published"
            )
        return self._store.parsed(value, self._number)


def _both_lengths(record: bytes, state: bytes) -> int:
    return len(record) + len(state)


def _parts(lengths: Sequence[int]) -> list[slice]:
    """Parts of about BATCH_BYTES, each of at least one user; an empty part if there are no users."""
    bounds, size = [0], 0
    for place, length in enumerate(lengths):
        if size and size + length > BATCH_BYTES:
            bounds.append(place)
            size = 0
        size += length
    return [slice(first, end) for first, end in pairwise([*bounds, len(lengths)])]
