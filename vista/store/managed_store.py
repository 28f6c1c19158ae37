"""What operations on whole generations need of a store, in a folder or on a server."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

import lmdb

from vista.errors import StoreError, StoreUnavailableError, UnfinishedError
from vista.store.admin_generations import (
    Batch,
    GenerationBuilder,
    GenerationReader,
    open_generation,
    read_settled,
    settled,
)
from vista.store.keys import MANIFEST_KEY
from vista.store.layout import (
    PARTIAL_PREFIX,
    PRIVATE,
    TOMBSTONES,
    Permissions,
    entries_like_generations,
    environment_path,
    environments_of,
    generation_path,
    last_complete,
    list_generations,
    next_number,
    published_or_none,
    read_current,
    remove_store_leftovers,
    store_address,
)
from vista.store.lmdb_environment import SharedEnvironment, check_structure
from vista.store.locked_folder import Tally, publish_generation
from vista.store.manifest import Manifest, read_cursor, read_manifest
from vista.store.record_spec import RecordSpec
from vista.store.remote_store import RemoteGeneration, RemoteStore, RemoteTombstones
from vista.store.server_writer import GenerationCopy, GenerationOnServer, LockedServer
from vista.store.shards import check_place
from vista.store.store_url import StoreUrl
from vista.store.tombstones import ErasedUsers, Tombstones, locked

# A store in a folder, as operations on whole generations use it (`vista.store.managed_store.ManagedStore`).

T = TypeVar("T")


class FolderStore:
    """Delegates to the functions for folders."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self._permissions = PRIVATE

    @property
    def erased_users(self) -> Tombstones:
        """The store's tombstones."""
        return Tombstones(self.address)

    def current(self) -> int:
        """Number of the published generation."""
        return read_current(self.address)

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        return published_or_none(self.address)

    def numbers(self) -> list[int]:
        """Numbers of all generations; none if the folder does not exist."""
        return list_generations(self.address) if self.address.is_dir() else []

    def open(self, number: int, key: bytes | None) -> AbstractContextManager[GenerationReader]:
        """Open a complete generation."""
        return open_generation(self.address, number, key)

    def check_structure(self, number: int) -> None:
        """Check the files of a generation before LMDB opens them."""
        for environment in environments_of(self.address, number):
            check_structure(environment)

    def settled(self, number: int, read: Callable[[], T]) -> T:
        """See `read_settled`."""
        return read_settled(self.address, number, read)

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer; `permissions` also makes the folder."""
        if permissions is None:
            if not self.numbers():
                self.current()  # raises, so that no lock file is made in a folder that is not a store
        else:
            check_place(self.address)
            self._permissions = permissions
        with locked(self.address, permissions):
            yield

    def number_for(self, manifest: Manifest) -> int:
        """The manifest's number if it is above all that ever were complete; otherwise the next one."""
        return next_number(self.address, least=manifest.generation)

    def remove_leftovers(self, except_for: int) -> None:
        """Remove temporary folders of killed processes, except for that of a copy."""
        remove_store_leftovers(self.address, except_for=f"{PARTIAL_PREFIX}gen-{except_for}")

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> GenerationBuilder:
        """Make a generation in a temporary folder, or resume there."""
        return GenerationBuilder(self.address, manifest, key, self._permissions, resume=resume)

    def publish(self, number: int, keep: Collection[int]) -> None:
        """See `publish_generation`."""
        publish_generation(self.address, number, list(keep))

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        path = environment_path(self.address, number)
        environment = SharedEnvironment.acquire(path)
        try:
            return environment.read(lambda transaction: _progress(transaction, path))
        finally:
            environment.release()

    def expires_at(self, number: int) -> int | None:
        """None: files do not expire."""
        return None

    def size_bytes(self, number: int) -> int:
        """Size of the generation's files."""
        files = generation_path(self.address, number).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def problems(self) -> list[str]:
        """What is wrong with LAST, the tombstones, and the names in the folder."""
        problems = []
        try:
            last_complete(self.address)
        except StoreError as error:
            problems.append(str(error))
        if os.access(self.address / TOMBSTONES, os.R_OK):  # Another account cannot read them.
            try:
                len(self.erased_users)
            except StoreError as error:
                problems.append(str(error))
        for name in entries_like_generations(self.address):
            problems.append(
                f"{self.address / name} is ignored, because it is not the folder of a generation; rename or remove it"
            )
        return problems


def _progress(transaction: lmdb.Transaction[memoryview], path: Path) -> tuple[Manifest, bool, int]:
    """Manifest, whether the generation is complete, and the number of records or of users done."""
    try:
        manifest = read_manifest(transaction, path)
        return manifest, True, manifest.count
    except UnfinishedError:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise
        manifest = Manifest.from_bytes(bytes(value), path)
        return manifest, False, read_cursor(transaction, manifest, path)


# One generation, to be read or filled from its first record to its last, in a folder or on a server.


class WholeGeneration(Protocol):
    """One complete generation, to be read from its first record to its last."""

    @property
    def manifest(self) -> Manifest:
        """As it was when the generation was opened."""

    @property
    def spec(self) -> RecordSpec:
        """What each record holds."""

    def value(self, key: bytes) -> bytes | None:
        """A user's unchecked record; None without one."""

    def raw_batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """Keys beyond `after` and their unchecked values, ascending."""

    def batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """As `raw_batches`, with every record checked."""

    def state_batches(self) -> Iterator[Batch]:
        """Keys and states, ascending, checked; nothing if the generation keeps no states."""

    def other_keys(self) -> list[bytes]:
        """The first keys that are not user keys."""


class NewGeneration(Protocol):
    """A generation that is filled with existing records."""

    tally: Tally
    """Of the records that it holds."""
    last_key: bytes
    """Of the last record; only larger keys can be added."""

    @property
    def spec(self) -> RecordSpec:
        """What each record must hold."""

    @property
    def manifest(self) -> Manifest:
        """Complete once `finish` has returned."""

    def put(self, keys: Sequence[bytes], records: Sequence[bytes]) -> None:
        """Append checked records."""

    def held_batches(self) -> Iterator[Batch]:
        """Keys and values that it holds so far, ascending."""

    def finish(self) -> Manifest:
        """Read all records back, and mark the generation as complete; it is not published."""

    def close(self) -> None:
        """Close it; closing twice is allowed."""

    def discard(self) -> None:
        """Remove what was built."""


class ManagedStore(Protocol):
    """A store and its generations."""

    @property
    def address(self) -> Path | StoreUrl:
        """Folder or URL."""

    @property
    def erased_users(self) -> ErasedUsers:
        """Users that no write brings back."""

    def current(self) -> int:
        """Number of the published generation; an error if there is none."""

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""

    def numbers(self) -> list[int]:
        """Numbers of all generations, finished or not, ascending."""

    def open(self, number: int, key: bytes | None) -> AbstractContextManager[WholeGeneration]:
        """Open a complete generation."""

    def check_structure(self, number: int) -> None:
        """Check the files of a generation without opening them."""

    def settled(self, number: int, read: Callable[[], T]) -> T:
        """Result of a function that reads a whole generation; called again if the generation was written meanwhile."""

    def locked(self, permissions: Permissions | None = None) -> AbstractContextManager[None]:
        """Context of the one writer; `permissions` also makes the store."""

    def number_for(self, manifest: Manifest) -> int:
        """Number for a copy: that of an interrupted one, or the manifest's if it is above all that ever were."""

    def remove_leftovers(self, except_for: int) -> None:
        """Remove what interrupted operations left, except for a copy of this number; only under `locked`."""

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> NewGeneration:
        """Make a generation, or with `resume` continue an interrupted copy; only under `locked`."""

    def publish(self, number: int, keep: Collection[int]) -> None:
        """Publish a complete generation, and remove all others except those in `keep`; only under `locked`."""

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""

    def expires_at(self, number: int) -> int | None:
        """When a generation expires, in ms; None if it does not."""

    def size_bytes(self, number: int) -> int:
        """Bytes that a generation takes, about."""

    def problems(self) -> list[str]:
        """What is wrong outside of the generations, apart from CURRENT."""


def managed_store(store: str | Path | StoreUrl) -> ManagedStore:
    """The store in a folder, whether it exists or not, or on a server.

    Raises:
        StoreError: the server cannot be used.
    """
    address = store_address(store)
    if isinstance(address, StoreUrl):
        return ServerStore.connect(address)
    return FolderStore(address)


# A store on a server, as operations on whole generations use it (`vista.store.managed_store.ManagedStore`).

_SAMPLE = 1000


class ServerStore:
    """Delegates to `RemoteStore` and `LockedServer`."""

    def __init__(self, store: RemoteStore) -> None:
        self.address = store.url
        self._store = store
        self._locked: LockedServer | None = None

    @classmethod
    def connect(cls, url: StoreUrl) -> ServerStore:
        """Connect to the server."""
        return cls(RemoteStore.connect(url))

    @property
    def erased_users(self) -> RemoteTombstones:
        """The store's tombstones."""
        return self._store.tombstones

    def current(self) -> int:
        """Number of the published generation."""
        return self._store.current()

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        return self._store.published_or_none()

    def numbers(self) -> list[int]:
        """Numbers of all generations."""
        return self._store.numbers()

    @contextmanager
    def open(self, number: int, key: bytes | None) -> Iterator[RemoteGeneration]:
        """Open a complete generation."""
        yield self._store.open(number, key)

    def check_structure(self, number: int) -> None:
        """Nothing to do: there are no files."""

    def settled(self, number: int, read: Callable[[], T]) -> T:
        """Result of a function that reads a whole generation; called again if the generation was written meanwhile."""
        name = self._store.names.generation(number).manifest
        return settled(lambda: self._store.server.command("GET", name), read, f"{self.address}: gen-{number}")

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer."""
        if permissions is None and not self.numbers():
            self.current()  # raises, so that a mistyped name does not lock anything
        self._locked = LockedServer.lock(self.address)
        try:
            yield
        finally:
            self._locked.release()
            self._locked = None

    def number_for(self, manifest: Manifest) -> int:
        """The number of an unfinished generation with the manifest's identity; otherwise as in a folder."""
        return self._writer().number_for(manifest)

    def remove_leftovers(self, except_for: int) -> None:
        """Remove unfinished generations, except for a copy."""
        self._writer().remove_unfinished(except_for)

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> GenerationCopy:
        """Make a generation, or resume it."""
        return GenerationCopy(self._writer(), manifest, key, resume=resume)

    def publish(self, number: int, keep: Collection[int]) -> None:
        """Publish a complete generation without the users who were erased, and remove all others except `keep`."""
        self._writer().publish_existing(number)
        self._writer().remove_others((number, *keep))

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        generation = GenerationOnServer(self._store, number, None)
        manifest, complete = generation.manifest, generation.complete
        return manifest, complete, manifest.count if complete else generation.read_cursor()

    def expires_at(self, number: int) -> int | None:
        """When the generation expires by the server's clock, in ms; None if it does not."""
        time_ms = int(self._store.server.command("PEXPIRETIME", self._store.names.generation(number).manifest))
        return None if time_ms < 0 else time_ms

    def size_bytes(self, number: int) -> int:
        """Size of records and states, from the mean of the first 1,000 users."""
        server, names = self._store.server, self._store.names.generation(number)
        keys = server.command("ZRANGE", names.users, 0, _SAMPLE - 1)
        if not keys:
            return 0
        sizes = server.pipeline([("STRLEN", name) for name in names.values(keys)])
        return int(sum(sizes) / len(keys) * int(server.command("ZCARD", names.users)))

    def problems(self) -> list[str]:
        """What is wrong with LAST."""
        try:
            self._store.last_complete()
            return []
        except StoreUnavailableError:
            raise
        except StoreError as error:
            return [str(error)]

    def _writer(self) -> LockedServer:
        assert self._locked is not None, "only under `locked`"
        return self._locked


@dataclass(frozen=True, slots=True)
class PublishReport:
    """Result of a compaction, rollback, copy, export or import."""

    path: Path | StoreUrl
    generation: int
    num_records: int
    size_bytes: int
    """Of the generation's files; on a server, of its records, about."""
    published: bool = True
    num_resumed: int = 0
    """Records of a copy that an earlier, interrupted run had copied."""

    def __str__(self) -> str:
        resumed = f" ({self.num_resumed:,} of them by an earlier run)" if self.num_resumed else ""
        state = "is published" if self.published else "is complete and verified, but not published yet"
        return (
            f"generation {self.generation} of {self.path} {state}: {self.num_records:,} records{resumed}, "
            f"{self.size_bytes:,} bytes"
        )
