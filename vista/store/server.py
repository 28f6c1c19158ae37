"""A store on a Valkey or Redis server, with the methods of `vista.store.backend.Folder`."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.errors import (
    RecordError,
    StoreBusyError,
    StoreError,
    StoreUnavailableError,
    StoreWriteError,
    UnfinishedError,
    shown,
)
from vista.store.folder_files import DIGEST, digests_of
from vista.store.folder_generation import Batch
from vista.store.keys import CURSOR_KEY
from vista.store.layout import Permissions, StoreUrl, parse_pointer
from vista.store.manifest import Manifest, Tally
from vista.store.record import RecordSpec
from vista.store.server_connection import Command, KeyNames, ServerConnection, ServerLock
from vista.store.server_generation import ServerGeneration, ServerWriter

_CHECKS_BESIDE_ERASURES = 5
_REMOVED_AT_ONCE = 1000
_READ_AT_ONCE = 1000
_SAMPLE = 1000

logger = logging.getLogger(__name__)


class Server:
    """The store of a URL, whether it exists or not.

    After a kill of the writer, its lock expires within seconds, and the next writer resumes.

    Raises:
        StoreError: as of `ServerConnection.check` and `command`.
    """

    def __init__(self, url: StoreUrl) -> None:
        self.connection = ServerConnection(url)
        self.connection.check()
        self.address = url
        self.names = KeyNames(url.name)
        self.erased_users = ServerTombstones(self.connection, self.names.tombstones)
        self._lock: ServerLock | None = None
        self._published = 0
        self._writer: ServerWriter | None = None

    def current(self) -> int:
        """Number of the published generation. Raises StoreError if nothing is published, or CURRENT is damaged."""
        value = self.connection.command("GET", self.names.current)
        if value is None:
            raise StoreError(
                f"{self.address} holds no published generation; check the store's name, or run `vista refresh "
                f"store={self.address}` or `vista store copy to={self.address}` first"
            )
        try:
            return parse_pointer(value)
        except ValueError as error:
            raise StoreError(
                f"{self.address}: CURRENT {error}; publish a generation with `vista store rollback "
                f"store={self.address} to=N`, or refresh the store again"
            ) from None

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        try:
            return self.current()
        except StoreUnavailableError:
            raise
        except StoreError:
            return None

    def numbers(self) -> list[int]:
        """Numbers of all generations, finished or not, ascending."""
        name = self.names.generations
        return sorted(self.whole_number(member, name) for member in self.connection.command("SMEMBERS", name))

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""
        return self._complete(number)[0]

    def open(self, number: int, key: bytes | None) -> ServerGeneration:
        """Open a complete generation. Raises StoreError if it is missing, unfinished, damaged, or of another key."""
        manifest, stamp = self._complete(number)
        names, spec = self.names.generation(number), manifest.spec(key)
        return ServerGeneration(self.connection, names, manifest, spec, stamp, self._read_current)

    def close(self) -> None:
        """Close the connections; the next command opens new ones."""
        self.connection.close()

    def check_structure(self, number: int) -> None:
        """Nothing to do: there are no files."""

    def version(self, number: int) -> bytes | None:
        """The generation's manifest, which every write changes."""
        value: bytes | None = self.connection.command("GET", self.names.generation(number).manifest)
        return value

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        generation = ServerWriter(self, number, None)
        manifest, complete = generation.manifest, generation.complete
        return manifest, complete, manifest.count if complete else generation.read_cursor()

    def size_bytes(self, number: int) -> int:
        """Size of records and states, from the mean of the first 1,000 users."""
        server, names = self.connection, self.names.generation(number)
        keys = server.command("ZRANGE", names.users, 0, _SAMPLE - 1)
        if not keys:
            return 0
        sizes = server.pipeline([("STRLEN", name) for name in names.values(keys)])
        return int(sum(sizes) / len(keys) * int(server.command("ZCARD", names.users)))

    def problems(self) -> list[str]:
        """What is wrong with LAST."""
        try:
            self.last_complete()
            return []
        except StoreUnavailableError:
            raise
        except StoreError as error:
            return [str(error)]

    def lock(self, permissions: Permissions | None = None) -> None:
        """Become the one writer, and finish the removal of generations that a killed writer began to remove."""
        if permissions is None and not self.numbers():
            self.current()  # raises, so that a mistyped name does not lock anything
        self._lock = ServerLock(self.connection, self.names.writer)
        self._lock.acquire()
        try:
            for number in self.numbers():
                if not self.connection.command("EXISTS", self.names.generation(number).manifest):
                    self.remove(number)
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        """Let other writers in; an unpublished generation stays for the next run of the same refresh."""
        if self._lock is not None:
            self._lock.release()
        self.close()

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer."""
        self.lock(permissions)
        try:
            yield
        finally:
            self.release()

    def start(self, wanted: Manifest) -> ServerWriter:
        """Resume the newest unfinished generation if it has the wanted identity; otherwise start a new one."""
        self._published = self._published_or_newest()
        for number in reversed([number for number in self.numbers() if number > self._published]):
            generation = self._readable(number)
            if generation is not None and self._is_of(generation, wanted):
                self._writer = generation
                return generation
            logger.warning(
                "%s: gen-%d, which was never published, belongs to another run or is damaged; it is removed, and a new "
                "one starts",
                self.address, number,
            )  # fmt: skip
            self.remove(number)
        self._writer = self.create(dataclasses.replace(wanted, generation=self.next_number()))
        return self._writer

    def published(self) -> ServerWriter:
        """Open the published generation, to write it in place."""
        return self.open_writer(self.current())

    def publish_written(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record, publish the generation of `start`, and remove all others except the one published before.

        Args:
            spec: what each record must hold.
            wait_s: not used: nobody waits for erasures here.

        Raises:
            StoreBusyError: erasures follow one another without a pause; the generation stays.
            StoreWriteError, StoreUnavailableError: the generation stays, and the same run can resume.
            StoreError: the count or a record is wrong; the generation is removed.
        """
        assert self._writer is not None
        manifest = self.finish(self._writer, spec, publish=True)
        self.make_durable()
        self._remove_others((manifest.generation, self._published))
        return manifest

    def number_for(self, manifest: Manifest) -> int:
        """Number for a copy: that of an unfinished generation with this identity, or one that was never complete."""
        for number in reversed(self._unfinished()):
            generation = self._readable(number)
            if generation is not None and self._is_of(generation, manifest):
                return number
        self.remove_leftovers()
        return self.next_number(manifest.generation)

    def remove_leftovers(self, except_for: int = 0) -> None:
        """Remove unfinished generations, except for one."""
        for number in self._unfinished():
            if number != except_for:
                self.remove(number)

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> ServerBuilder:
        """Make a generation, or resume it."""
        return ServerBuilder(self, manifest, key, resume=resume)

    def publish(self, number: int, keep: Collection[int]) -> None:
        """Publish a complete generation without the users who were erased since, and remove all others except `keep`.
        Raises StoreBusyError if erasures follow one another without a pause."""
        writer = self.open_writer(number)
        for _ in range(_CHECKS_BESIDE_ERASURES):
            num_erased = len(self.erased_users)
            writer.remove_erased()
            if writer.mark_complete(writer.read_manifest(), num_erased, publish=True):
                self.make_durable()
                return self._remove_others((number, *keep))
        raise self._busy()

    def erase(self, keys: Sequence[bytes], wait_s: float) -> int:
        """Erase users, with tombstones; returns how many had a record in the published generation.

        The tombstones come first, so that no later write brings the users back. Writers are not stopped: if a
        writer and an erasure collide, the later one repeats its own atomic change. So `wait_s` is not used.
        """
        if not self.numbers():
            raise StoreError(f"{self.address} holds no store; check the store's name")
        if not keys:
            return 0
        self.erased_users.add(keys)
        # Generations that are created from now on leave the users out; those that were created before are listed now.
        numbers, published, count = self.numbers(), self.published_or_none(), 0
        for number in sorted(numbers, key=lambda number: number != published):  # the one that readers see comes first
            try:
                removed = ServerWriter(self, number, None).remove(keys)
            except StoreWriteError:
                if self.connection.command("EXISTS", self.names.generation(number).manifest):
                    raise
                self._remove_remains(number, keys)  # of a generation that is being removed, or whose removal was killed
                continue
            count = removed if number == published else count
        self.make_durable()
        return count

    def last_complete(self) -> int:
        """The highest generation number that was ever complete; 0 if there was none. Raises StoreWriteError if LAST is
        damaged."""
        value = self.connection.command("GET", self.names.last)
        try:
            return 0 if value is None else parse_pointer(value)
        except ValueError as error:
            raise StoreWriteError(
                f"{self.address}: LAST {error}; remove the key {self.names.last.decode()} from the server, and "
                f"numbering continues after gen-{max(self.numbers(), default=0)}, the newest generation there"
            ) from None

    def next_number(self, least: int = 1) -> int:
        """A generation number above all existing ones, above all that were ever complete, and not below `least`."""
        return max(least, 1 + max([self.last_complete(), *self.numbers()]))

    def whole_number(self, value: bytes, name: bytes) -> int:
        """The number above 0 in a key of this name. Raises StoreError if there is none."""
        if not 0 < len(value) < 19 or not value.isdigit() or not int(value):
            raise StoreError(
                f"{self.address}: the key {name.decode()} holds {shown(value, 40)}; check whether other programs write "
                "to the keys of this store, and mend it, or refresh into a store of another name"
            )
        return int(value)

    def parsed(self, value: bytes, number: int) -> Manifest:
        """A generation's manifest from its bytes. Raises StoreError if it is damaged."""
        manifest = Manifest.from_bytes(value, self.address)
        if manifest.generation != number:
            raise StoreError(
                f"{self.address}: the manifest of gen-{number} is that of gen-{manifest.generation}; publish another "
                "generation (`vista store rollback`), or refresh the store again"
            )
        return manifest

    def make_durable(self) -> None:
        """Wait until all that was written so far is on the server's disk, if it keeps an append-only file."""
        self.connection.make_durable(self.names.synced)

    def create(self, manifest: Manifest) -> ServerWriter:
        """Make an empty generation."""
        return ServerWriter.create(self, manifest, self._require_lock())

    def open_writer(self, number: int) -> ServerWriter:
        """Open a generation for writing."""
        return ServerWriter(self, number, self._require_lock())

    def finish(self, generation: ServerWriter, spec: RecordSpec, *, publish: bool) -> Manifest:
        """Check every record of a generation and mark it as complete; with `publish`, CURRENT then names it. Raises
        StoreError as of `publish_written`."""
        for _ in range(_CHECKS_BESIDE_ERASURES):
            num_erased = len(self.erased_users)
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
                    f"{self.address}: gen-{manifest.generation} holds {tally.count} records and {num_states} states, "
                    f"but {manifest.count} records, or other ones, were written. It was removed, and CURRENT is "
                    "unchanged; check whether others write to its keys, then rerun the command"
                )
        raise self._busy()

    def remove(self, number: int) -> None:
        """Remove a generation. Its marker goes first, so readers that use it do not report its users as missing."""
        names = self.names.generation(number)
        self._change(lambda: [("DEL", names.manifest, names.complete, names.cursor)])

        def some_records() -> list[Command]:
            keys = self.connection.command("ZRANGE", names.users, 0, _REMOVED_AT_ONCE - 1)
            if not keys:
                return [("SREM", self.names.generations, number)]
            return [("UNLINK", *names.values(keys)), ("ZREM", names.users, *keys)]

        while number in self.numbers():
            self._change(some_records)

    def _read_current(self) -> tuple[Manifest, bytes]:
        """For open readers, who check here that the server still has the store and has not begun to evict records."""
        self.connection.check()
        if not self.connection.command("EXISTS", self.names.current):
            raise StoreUnavailableError(
                f"{self.address}: the server has lost the store that was open, and may have restarted without its "
                "data; restore the data, or run a full refresh"
            )
        return self._complete(self.current())

    def _complete(self, number: int) -> tuple[Manifest, bytes]:
        """Manifest and stamp of a complete generation."""
        names = self.names.generation(number)
        manifest, stamp = self.connection.command("MGET", names.manifest, names.complete)
        if manifest is None or stamp is None:
            numbers = self.numbers()
            existing = ", ".join(f"gen-{each}" for each in numbers) or "none"
            if number not in numbers:
                raise StoreError(f"{self.address} has no gen-{number}; name an existing generation: {existing}")
            reason = "was never finished" if manifest is not None else "was removed"
            raise UnfinishedError(f"{self.address}: gen-{number} {reason}; refresh the store again")
        return self.parsed(manifest, number), stamp

    def _published_or_newest(self) -> int:
        """The generation that CURRENT names, 0 for none; if CURRENT is damaged, the newest complete one."""
        exists, names = self.connection.command, self.names
        try:
            return self.current() if exists("EXISTS", names.current) else 0
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s; this refresh continues after the newest complete generation", error)
        numbers = reversed(self.numbers())
        return next((number for number in numbers if exists("EXISTS", names.generation(number).complete)), 0)

    def _unfinished(self) -> list[int]:
        names, exists = self.names, self.connection.command
        return [number for number in self.numbers() if not exists("EXISTS", names.generation(number).complete)]

    def _is_of(self, generation: ServerWriter, wanted: Manifest) -> bool:
        """Whether an unfinished generation is what a run with this manifest would write."""
        return generation.manifest.identity() == wanted.identity()

    def _readable(self, number: int) -> ServerWriter | None:
        """A generation, open for writing; None if its manifest is damaged, or of another format version."""
        try:
            return self.open_writer(number)
        except StoreUnavailableError:
            raise
        except StoreError as error:
            logger.warning("%s", error)
            return None

    def _remove_others(self, keep: Collection[int]) -> None:
        """Remove all generations except those in `keep`, in short commands, as readers may use the server meanwhile."""
        for number in self.numbers():
            if number not in keep:
                logger.info("%s: removing gen-%d", self.address, number)
                self.remove(number)

    def _remove_remains(self, number: int, keys: Sequence[bytes]) -> None:
        """Remove users from a generation that has no manifest, so that nothing counts them."""
        names = self.names.generation(number)
        for first in range(0, len(keys), _REMOVED_AT_ONCE):
            part = keys[first : first + _REMOVED_AT_ONCE]
            self.connection.pipeline([("UNLINK", *names.values(part)), ("ZREM", names.users, *part)])

    def _change(self, plan: Callable[[], list[Command]]) -> None:
        """Run commands atomically, if this process still holds the lock."""
        connection, lock = self.connection, self._require_lock()

        def planned() -> tuple[list[Command], None]:
            lock.require(connection.command("GET", lock.name))
            return [*plan(), lock.next_write()], None

        connection.change([lock.name], planned)
        lock.wrote()

    def _require_lock(self) -> ServerLock:
        assert self._lock is not None, "only under the writer's lock"
        return self._lock

    def _busy(self) -> StoreBusyError:
        return StoreBusyError(f"{self.address}: users are being erased all the time; rerun the command to resume")


class ServerBuilder:
    """A generation that is filled with existing records, in the order of their keys; `finish` does not publish it."""

    def __init__(self, server: Server, manifest: Manifest, key: bytes | None, *, resume: bool) -> None:
        self.manifest = manifest
        self.spec = manifest.spec(key)
        self.tally = Tally()
        self.last_key = b"u"
        self._server = server
        number = manifest.generation
        if number in server.numbers() and not resume:
            server.remove(number)
        if number in server.numbers():
            self._writer = server.open_writer(number)
        else:
            empty = Tally()
            self._writer = server.create(
                dataclasses.replace(
                    manifest, count=empty.count, user_kind=empty.user_kind, records_digest=empty.records_digest
                )
            )

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records of this generation. Raises StoreError if a key is not larger than the last one."""
        if keys and not self.last_key < keys[0]:
            raise StoreError(f"{self._server.address}: keys must ascend, but {keys[0]!r} follows {self.last_key!r}")
        self._writer.put(keys, records, [], {})
        self.tally.add(keys, records)
        self.last_key = keys[-1]

    def put_items(self, value: bytes) -> None:
        """Put the values of items of the generation."""
        self._writer.put_items(value)

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that the server holds so far, ascending."""
        return self._writer.records.raw_batches()

    def finish(self) -> Manifest:
        """Read all records back, and mark the generation as complete."""
        source = self.manifest
        cursor = {CURSOR_KEY: b"%d" % source.total_users}
        self._writer.put_manifest(lambda manifest: dataclasses.replace(manifest, refreshed_at=source.refreshed_at))
        self._writer.put([], [], [], cursor)
        self.manifest = self._server.finish(self._writer, self.spec, publish=False)
        return self.manifest

    def close(self) -> None:
        """Nothing to do: the connection is that of the writer."""

    def discard(self) -> None:
        """Remove what was copied."""
        self._server.remove(self.manifest.generation)


class ServerTombstones:
    """The erased users of a store."""

    def __init__(self, server: ServerConnection, name: bytes) -> None:
        self.name = name
        self._server = server

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""
        if not keys:
            return []
        return [bool(reply) for reply in self._server.command("SMISMEMBER", self.name, *digests_of(keys).tolist())]

    def digests(self) -> NDArray[Any]:
        """Digests of all erased users, ascending (`digests_of`)."""
        found: set[bytes] = set()
        cursor = None
        while cursor != 0:  # A reply with all members of a large set would block the server.
            cursor, some = self._server.command("SSCAN", self.name, cursor or 0, "COUNT", _READ_AT_ONCE)
            found.update(some)
        return np.array(sorted(found), DIGEST)

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures."""
        self._server.command("SADD", self.name, *digests_of(keys).tolist())

    def __len__(self) -> int:
        return int(self._server.command("SCARD", self.name))
