"""One generation on a server, open for writing (`vista.store.writable_store.WritableGeneration`)."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise

from vista.errors import StoreWriteError
from vista.store.erased_users import ErasedUsers
from vista.store.format.record import check_records
from vista.store.format.record_spec import HEADER_BYTES, RecordSpec
from vista.store.format.state_record import StateSpec
from vista.store.layout import pointer_to
from vista.store.manifest import Manifest, parse_cursor
from vista.store.open_generation import FoundStates
from vista.store.remote.remote_records import BATCH_BYTES, RemoteRecords
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.server_connection import Command
from vista.store.remote.server_lock import ServerLock
from vista.store.tally import Tally

Plan = tuple[Manifest, dict[bytes, bytes], list[Command], int]
"""The manifest after a write, other values to set by name, other commands, and a number to return."""
_RENEWED_AFTER = 0.1
"""Share of the time to live after which a refresh renews it, so that frequent refreshes need not visit all users."""


class GenerationOnServer:
    """Every write is one atomic change of records, the list of users, and the manifest, so that all three always agree.

    Args:
        lock: of the writer; None for an erasure, which works alongside a writer.
    """

    def __init__(self, store: RemoteStore, number: int, lock: ServerLock | None) -> None:
        self.names = store.names.generation(number)
        self._store = store
        self._server = store.server
        self._number = number
        self._lock = lock
        manifest, ttl = self._server.command("MGET", self.names.manifest, self.names.ttl)
        self.manifest = self._parsed(manifest)
        self.ttl_ms = None if ttl is None else store.whole_number(ttl, self.names.ttl)
        """Time from the last refresh until the generation expires; None if it does not."""
        self.records = RemoteRecords(self._server, self.names, self.manifest, None)

    @classmethod
    def create(cls, store: RemoteStore, manifest: Manifest, lock: ServerLock) -> GenerationOnServer:
        """Make an empty generation, which expires if the store's URL says so."""
        names, ttl_ms = store.names.generation(manifest.generation), store.url.ttl_ms
        values: dict[bytes, bytes] = {names.manifest: manifest.to_bytes(), names.cursor: b"0"}
        expires_at = None
        if ttl_ms is not None:
            store.require_no_eviction()
            values[names.ttl] = b"%d" % ttl_ms
            expires_at = store.server.now_ms() + ttl_ms

        def plan() -> tuple[list[Command], None]:
            lock.require(store.server.command("GET", lock.name))
            return [
                ("SADD", store.names.generations, manifest.generation),
                ("MSET", *chain.from_iterable(values.items())),
                *_expiries(values, expires_at),
                lock.next_write(),
            ], None

        store.server.change([lock.name], plan)
        lock.wrote()
        return cls(store, manifest.generation, lock)

    @property
    def complete(self) -> bool:
        """Whether all its records are written and checked."""
        return bool(self._server.command("EXISTS", self.names.complete))

    def renew(self) -> None:
        """Let the time to live begin now, if the generation expires; not if a tenth of it has not passed yet.

        The generation's own keys come last: as long as they exist, so do the users'.
        """
        if self.ttl_ms is None:
            return
        expires_at = self._server.now_ms() + self.ttl_ms
        if expires_at - self._server.command("PEXPIRETIME", self.names.manifest) < _RENEWED_AFTER * self.ttl_ms:
            return
        for keys in self.key_batches():
            names = self.names.values(keys) if self._keeps_states else [*map(self.names.record, keys)]
            self._expire(names, expires_at)
        self._expire(self.names.own, expires_at)

    def put(
        self,
        erased_users: ErasedUsers,
        keys: Sequence[bytes],
        records: Sequence[bytes],
        states: Sequence[bytes],
        meta: Mapping[bytes, bytes],
    ) -> int:
        """Add or replace users without the erased ones, in bounded parts; the last part also puts `meta`.

        Args:
            erased_users: of this store.
            keys: N user keys.
            records: N records.
            states: N states, or none if the generation keeps no states.
            meta: further keys of the generation and their values.

        Returns:
            How many users were written.
        """
        if keys and bool(states) != self._keeps_states:
            raise ValueError(f"states: got {len(states)} for {len(keys)} records of {self._store.url}")
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
        if not len(self._store.tombstones):
            return 0
        count = 0
        for keys in self.key_batches():
            erased = self._store.tombstones.erased(keys)
            count += self.remove([key for key, gone in zip(keys, erased, strict=True) if gone])
        return count

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest."""
        self._write([], lambda manifest: (change(manifest), {}, [], 0))

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
            if manifest != wanted or len(self._store.tombstones) != num_erased:
                return manifest, {}, [], 0
            pointer, commands = pointer_to(self._number), list[Command]()
            values = {} if self.complete else {self.names.complete: secrets.token_hex(8).encode()}
            if self._store.last_complete() < self._number:
                commands.append(("SET", self._store.names.last, pointer))
            if publish:
                commands.append(("SET", self._store.names.current, pointer))
            refreshed_at = manifest.refreshed_at or manifest.created_at
            return dataclasses.replace(manifest, refreshed_at=refreshed_at), values, commands, 1

        return bool(self._write([self._store.tombstones.name], plan))

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Header of each user's record; None without a record."""
        replies = self._server.pipeline([self._header(key) for key in keys]) if keys else []
        return [reply or None for reply in replies]

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""
        return self.records.key_batches()

    def states(self, keys: Sequence[bytes], spec: StateSpec) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states."""
        return self.records.states(keys, spec) if self._keeps_states else None

    def num_states(self) -> int:
        """How many users have a state."""
        return sum(
            int(self._server.command("EXISTS", *map(self.names.state, keys)))
            for keys in (self.key_batches() if self._keeps_states else ())
        )

    def tally(self, spec: RecordSpec) -> Tally:
        """Check and count all records.

        Raises:
            RecordError: a record is corrupt or lost; the message names the user.
        """
        tally = Tally()
        for keys, records in self.records.batches():
            check_records(records, keys, spec)
            tally.add(keys, records)
        return tally

    def read_manifest(self) -> Manifest:
        """The manifest as it is stored now."""
        return self._parsed(self._server.command("GET", self.names.manifest))

    def read_cursor(self) -> int:
        """Users done, in the run's fixed order."""
        value = self._server.command("GET", self.names.cursor)
        return parse_cursor(value or b"0", self.manifest, self._store.url)

    @property
    def _keeps_states(self) -> bool:
        return self.manifest.state_spec() is not None

    def _put(
        self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes], meta: Mapping[bytes, bytes]
    ) -> int:
        def plan(manifest: Manifest) -> Plan:
            erased = self._store.tombstones.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            put_keys, put_records = [keys[place] for place in remaining], [records[place] for place in remaining]
            old = [header for header in self.headers(put_keys) if header is not None]
            values = {self.names.prefix + key: value for key, value in meta.items()}
            values.update(zip(map(self.names.record, put_keys), put_records, strict=True))
            if states:
                values.update((self.names.state(keys[place]), states[place]) for place in remaining)
            listed: Command = ("ZADD", self.names.users, *(part for key in put_keys for part in (0, key)))
            commands = [listed] if put_keys else []
            return manifest.with_records(old, put_keys, put_records), values, commands, len(put_keys)

        return self._write([self._store.tombstones.name], plan)

    def _expire(self, names: Sequence[bytes], expires_at: int) -> None:
        self._write([], lambda manifest: (manifest, {}, _expiries(names, expires_at), 0))

    def _remove(self, keys: Sequence[bytes]) -> int:
        def plan(manifest: Manifest) -> Plan:
            old = [header for header in self.headers(keys) if header is not None]
            commands: list[Command] = [
                ("UNLINK", *self.names.values(keys)),
                ("ZREM", self.names.users, *keys),
            ]
            return manifest.with_records(old, [], []), {}, commands, len(old)

        return self._write([], plan) if keys else 0

    def _write(self, watched: list[bytes], plan: Callable[[Manifest], Plan]) -> int:
        """Change the manifest and other keys atomically, under the lock if this is its holder."""
        lock = self._lock

        def planned() -> tuple[list[Command], tuple[Manifest, int]]:
            if lock is not None:
                lock.require(self._server.command("GET", lock.name))
            value, expires_at = self._server.pipeline(
                [("GET", self.names.manifest), ("PEXPIRETIME", self.names.manifest)]
            )
            manifest, values, commands, count = plan(self._parsed(value))
            commands = [*commands, ("SET", self.names.manifest, manifest.to_bytes(), "KEEPTTL")]
            if values:
                commands.append(("MSET", *chain.from_iterable(values.items())))
                # The list of users too, because this write may have made it.
                commands += _expiries([*values, self.names.users], expires_at if expires_at >= 0 else None)
            counted = [] if lock is None else [lock.next_write()]
            return [*commands, *counted], (manifest, count)

        keys = [self.names.manifest, *watched, *([] if lock is None else [lock.name])]
        self.manifest, count = self._server.change(keys, planned)
        if lock is not None:
            lock.wrote()
        return count

    def _header(self, key: bytes) -> Command:
        return "GETRANGE", self.names.record(key), 0, HEADER_BYTES - 1

    def _parsed(self, value: bytes | None) -> Manifest:
        if value is None:
            raise StoreWriteError(
                f"{self._store.url}: gen-{self._number} is missing: it has expired (ttl_days), another writer removed "
                "it, or the server lost it; rerun the command, or run a full refresh if nothing else is published"
            )
        return self._store.parsed(value, self._number)


def _both_lengths(record: bytes, state: bytes) -> int:
    return len(record) + len(state)


def _expiries(names: Iterable[bytes], expires_at: int | None) -> list[Command]:
    """Commands that let keys expire at a time in ms by the server's clock; None lets them stay."""
    return [] if expires_at is None else [("PEXPIREAT", name, expires_at) for name in names]


def _parts(lengths: Sequence[int]) -> list[slice]:
    """Parts of about BATCH_BYTES, each of at least one user; an empty part if there are no users."""
    bounds, size = [0], 0
    for place, length in enumerate(lengths):
        if size and size + length > BATCH_BYTES:
            bounds.append(place)
            size = 0
        size += length
    return [slice(first, end) for first, end in pairwise([*bounds, len(lengths)])]
