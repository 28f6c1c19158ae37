"""A store on a server whose one writer is this process (`vista.store.writer.WritableStore`)."""

from __future__ import annotations

import dataclasses
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain, pairwise

from vista.errors import ConfigError, RecordError, StoreBusyError, StoreError, StoreUnavailableError, StoreWriteError
from vista.store.keys import CURSOR_KEY
from vista.store.layout import pointer_to
from vista.store.local_generation import FoundStates
from vista.store.locked_folder import Tally
from vista.store.manifest import Manifest, parse_cursor
from vista.store.record import check_records
from vista.store.record_spec import HEADER_BYTES, RecordSpec
from vista.store.remote_store import BATCH_BYTES, RemoteRecords, RemoteStore, RemoteTombstones
from vista.store.server_connection import Command, ServerLock
from vista.store.state_record import StateSpec
from vista.store.store_url import DAY_MS, StoreUrl
from vista.store.tombstones import ErasedUsers

# One generation on a server, open for writing (`vista.store.writer.WritableGeneration`).

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


_CHECKS_BESIDE_ERASURES = 5
_REMOVED_AT_ONCE = 1000

logger = logging.getLogger(__name__)


class LockedServer:
    """From `lock` to `release`. After a kill, the lock expires within seconds, and the next writer resumes."""

    def __init__(self, store: RemoteStore, lock: ServerLock) -> None:
        self.path = store.url
        self.store = store
        self._lock = lock
        self._published = 0
        self._generation: GenerationOnServer | None = None

    @classmethod
    def lock(cls, url: StoreUrl) -> LockedServer:
        """Become the one writer.

        Raises:
            StoreLockedError: another writer holds the store; the message has its host and process.
            StoreError: the server cannot be used; the message has the remedy.
        """
        store = RemoteStore.connect(url)
        lock = ServerLock(store.server, store.names.writer)
        lock.acquire()
        locked = cls(store, lock)
        try:
            locked._remove_leftovers()
            return locked
        except BaseException:
            locked.release()
            raise

    @property
    def erased_users(self) -> RemoteTombstones:
        """The store's tombstones."""
        return self.store.tombstones

    def start(self, wanted: Manifest) -> GenerationOnServer:
        """Resume the newest unfinished generation if it has the wanted identity; otherwise start a new one."""
        self._published = self._published_or_newest()
        for number in reversed([number for number in self.store.numbers() if number > self._published]):
            generation = self._readable(number)
            if generation is not None and self._is_of(generation, wanted):
                self._generation = generation
                generation.renew()
                return generation
            logger.warning(
                "%s: gen-%d, which was never published, belongs to another run or is damaged; it is removed, and a new "
                "one starts",
                self.path, number,
            )  # fmt: skip
            self.remove(number)
        self._generation = self.create(dataclasses.replace(wanted, generation=self.store.next_number()))
        return self._generation

    def _published_or_newest(self) -> int:
        """The generation that CURRENT names, 0 for none; if CURRENT is damaged, the newest complete one."""
        exists, names = self.store.server.command, self.store.names
        try:
            return self.store.current() if exists("EXISTS", names.current) else 0
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s; this refresh continues after the newest complete generation", error)
        numbers = reversed(self.store.numbers())
        return next((number for number in numbers if exists("EXISTS", names.generation(number).complete)), 0)

    def create(self, manifest: Manifest) -> GenerationOnServer:
        """Make an empty generation."""
        return GenerationOnServer.create(self.store, manifest, self._lock)

    def number_for(self, manifest: Manifest) -> int:
        """Number for a copy: that of an unfinished generation with this identity, or one that was never complete."""
        for number in reversed(self._unfinished()):
            generation = self._readable(number)
            if generation is not None and self._is_of(generation, manifest):
                return number
        self.remove_unfinished(except_for=0)
        return self.store.next_number(manifest.generation)

    def remove_unfinished(self, except_for: int) -> None:
        """Remove unfinished generations, except for one."""
        for number in self._unfinished():
            if number != except_for:
                self.remove(number)

    def _unfinished(self) -> list[int]:
        names, exists = self.store.names, self.store.server.command
        return [number for number in self.store.numbers() if not exists("EXISTS", names.generation(number).complete)]

    def _is_of(self, generation: GenerationOnServer, wanted: Manifest) -> bool:
        """Whether an unfinished generation is what a run with this manifest would write."""
        return generation.manifest.identity() == wanted.identity() and generation.ttl_ms == self.path.ttl_ms

    def _readable(self, number: int) -> GenerationOnServer | None:
        """A generation, open for writing; None if its manifest is damaged, or of another format version."""
        try:
            return self.open(number)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s", error)
            return None

    def published(self) -> GenerationOnServer:
        """Open the published generation, to write it in place.

        Raises:
            ConfigError: the URL names another time to live than the generation has.
        """
        generation = self.open(self.store.current())
        ttl_ms, wanted_ms = generation.ttl_ms, self.path.ttl_ms
        if wanted_ms not in (None, ttl_ms):
            held = "does not expire" if ttl_ms is None else f"has ttl_days={ttl_ms / DAY_MS:g}"
            raise ConfigError(
                f"{self.path}: gen-{generation.manifest.generation} {held}, as the full refresh or the copy that made "
                "it said; leave ttl_days out, or run a full refresh"
            )
        return generation

    def open(self, number: int) -> GenerationOnServer:
        """Open a generation for writing."""
        return GenerationOnServer(self.store, number, self._lock)

    def publish(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record, publish the generation, and remove all others except the one published before.

        Args:
            spec: what each record must hold.
            wait_s: not used: nobody waits for erasures here.

        Raises:
            StoreBusyError: erasures follow one another without a pause; the generation stays.
            StoreWriteError, StoreUnavailableError: the generation stays, and the same run can resume.
            StoreError: the count or a record is wrong; the generation is removed.
        """
        assert self._generation is not None
        manifest = self.finish(self._generation, spec, publish=True)
        self.store.make_durable()
        self.remove_others((manifest.generation, self._published))
        return manifest

    def finish(self, generation: GenerationOnServer, spec: RecordSpec, *, publish: bool) -> Manifest:
        """Check every record of a generation and mark it as complete; with `publish`, CURRENT then names it.

        Raises:
            StoreError: as of `publish`.
        """
        generation.renew()
        for _ in range(_CHECKS_BESIDE_ERASURES):
            num_erased = len(self.store.tombstones)
            generation.remove_erased()
            manifest = generation.read_manifest()
            try:
                tally = generation.tally(spec)
            except RecordError as error:
                self.remove(manifest.generation)
                raise StoreError(
                    f"{error}. gen-{manifest.generation} was removed, and CURRENT is unchanged; rerun the command"
                ) from error
            num_states = generation.num_states()
            agrees = (manifest.count, manifest.records_digest) == (tally.count, tally.records_digest)
            agrees &= manifest.state_spec() is None or num_states == tally.count
            if agrees and generation.mark_complete(manifest, num_erased, publish=publish):
                return generation.manifest
            if not agrees and generation.read_manifest() == manifest:
                self.remove(manifest.generation)
                raise StoreError(
                    f"{self.path}: gen-{manifest.generation} holds {tally.count} records and {num_states} states, but "
                    f"{manifest.count} records, or other ones, were written. It was removed, and CURRENT is unchanged; "
                    "check whether others write to its keys, then rerun the command"
                )
        raise self._busy()

    def remove_others(self, keep: Collection[int]) -> None:
        """Remove all generations except those in `keep`, in short commands, as readers may use the server meanwhile."""
        for number in self.store.numbers():
            if number not in keep:
                logger.info("%s: removing gen-%d", self.path, number)
                self.remove(number)

    def remove(self, number: int) -> None:
        """Remove a generation. Its marker goes first, so readers that use it do not report its users as missing."""
        names = self.store.names.generation(number)
        self._change(lambda: [("DEL", names.manifest, names.complete, names.cursor, names.ttl)])

        def some_records() -> list[Command]:
            keys = self.store.server.command("ZRANGE", names.users, 0, _REMOVED_AT_ONCE - 1)
            if not keys:
                return [("SREM", self.store.names.generations, number)]
            return [("UNLINK", *names.values(keys)), ("ZREM", names.users, *keys)]

        while number in self.store.numbers():
            self._change(some_records)

    def publish_existing(self, number: int) -> None:
        """Make CURRENT name a complete generation, after users were removed from it who have been erased since.

        Raises:
            StoreBusyError: erasures follow one another without a pause.
        """
        generation = self.open(number)
        for _ in range(_CHECKS_BESIDE_ERASURES):
            num_erased = len(self.store.tombstones)
            generation.remove_erased()
            if generation.mark_complete(generation.read_manifest(), num_erased, publish=True):
                return self.store.make_durable()
        raise self._busy()

    def _change(self, plan: Callable[[], list[Command]]) -> None:
        """Run commands atomically, if this process still holds the lock."""
        server, lock = self.store.server, self._lock

        def planned() -> tuple[list[Command], None]:
            lock.require(server.command("GET", lock.name))
            return [*plan(), lock.next_write()], None

        server.change([lock.name], planned)
        lock.wrote()

    def release(self) -> None:
        """Let other writers in; an unpublished generation stays for the next run of the same refresh."""
        self._lock.release()
        self.store.close()

    def _busy(self) -> StoreBusyError:
        return StoreBusyError(f"{self.path}: users are being erased all the time; rerun the command to resume")

    def _remove_leftovers(self) -> None:
        """Finish the removal of generations that a killed writer began to remove."""
        for number in self.store.numbers():
            if not self.store.server.command("EXISTS", self.store.names.generation(number).manifest):
                self.remove(number)


class GenerationCopy:
    """Filled in the order of the keys; `finish` does not publish it."""

    def __init__(self, locked: LockedServer, manifest: Manifest, key: bytes | None, *, resume: bool) -> None:
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        self._locked = locked
        number = manifest.generation
        if number in locked.store.numbers() and not resume:
            locked.remove(number)
        if number in locked.store.numbers():
            self._generation = locked.open(number)
        else:
            empty = Tally()
            self._generation = locked.create(
                dataclasses.replace(
                    manifest, count=empty.count, user_kind=empty.user_kind, records_digest=empty.records_digest
                )
            )

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation.

        Raises:
            StoreError: a key is not larger than the last one.
        """
        if keys and not self.last_key < keys[0]:
            raise StoreError(f"{self._locked.path}: keys must ascend, but {keys[0]!r} follows {self.last_key!r}")
        self._generation.put(self._locked.erased_users, keys, records, [], {})
        self.tally.add(keys, records)
        self.last_key = keys[-1]

    def held_batches(self) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and values that the server holds so far, ascending."""
        return self._generation.records.batches()

    def finish(self) -> Manifest:
        """Read all records back, and mark the generation as complete."""
        source = self.manifest
        cursor = {CURSOR_KEY: b"%d" % source.total_users}
        self._generation.put_manifest(lambda manifest: dataclasses.replace(manifest, refreshed_at=source.refreshed_at))
        self._generation.put(self._locked.erased_users, [], [], [], cursor)
        self.manifest = self._locked.finish(self._generation, self.spec, publish=False)
        return self.manifest

    def close(self) -> None:
        """Nothing to do: the connection is that of the writer."""

    def discard(self) -> None:
        """Remove what was copied."""
        self._locked.remove(self.manifest.generation)
