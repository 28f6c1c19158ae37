"""A store on a server whose one writer is this process (`vista.store.writable_store.WritableStore`)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection

from vista.errors import ConfigError, RecordError, StoreBusyError, StoreError, StoreUnavailableError
from vista.store.format.record_spec import RecordSpec
from vista.store.manifest import Manifest
from vista.store.remote.generation_on_server import GenerationOnServer
from vista.store.remote.remote_store import RemoteStore
from vista.store.remote.remote_tombstones import RemoteTombstones
from vista.store.remote.server_connection import Command
from vista.store.remote.server_lock import ServerLock
from vista.store.remote.store_url import DAY_MS, StoreUrl

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
