"""What holds a store: a folder (LMDB), or a Valkey or Redis server. Readers, writers, and operators go through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

from vista.errors import StoreBusyError, StoreError
from vista.store.folder import Folder
from vista.store.layout import Permissions, StoreUrl, store_address
from vista.store.lmdb_environment import ATTEMPTS
from vista.store.manifest import Manifest
from vista.store.record_spec import RecordSpec

if TYPE_CHECKING:
    from vista.store.folder_generation import FolderBuilder, FolderGeneration, FolderWriter
    from vista.store.server import ServerBuilder, ServerTombstones
    from vista.store.server_generation import ServerGeneration, ServerWriter
    from vista.store.tombstones import Tombstones

    Generation = FolderGeneration | ServerGeneration
    """One complete generation, open for reading."""
    GenerationWriter = FolderWriter | ServerWriter
    """One generation, open for writing; every write is atomic and updates `manifest`."""
    GenerationBuilder = FolderBuilder | ServerBuilder
    """A generation that is filled with existing records."""

T = TypeVar("T")


class StoreBackend(Protocol):
    """A store and its generations. `Folder` and `vista.store.server.Server` implement it.

    What writes generations works only between `lock` and `release`, or within `locked`.
    """

    @property
    def address(self) -> Path | StoreUrl:
        """Folder or URL."""

    @property
    def erased_users(self) -> Tombstones | ServerTombstones:
        """Users that no write brings back."""

    def current(self) -> int:
        """Number of the published generation.

        Raises:
            StoreError: nothing is published, or CURRENT is damaged.
        """

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""

    def numbers(self) -> list[int]:
        """Numbers of all generations, finished or not, ascending."""

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""

    def open(self, number: int, key: bytes | None) -> Generation:
        """Open a complete generation.

        Raises:
            StoreError: missing, unfinished, damaged, or of another key.
        """

    def close(self) -> None:
        """Close what generations share; closing twice is allowed."""

    def check_structure(self, number: int) -> None:
        """Check the files of a generation without opening them."""

    def version(self, number: int) -> object:
        """A value that every write of the generation changes."""

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""

    def expires_at(self, number: int) -> int | None:
        """When a generation expires, in ms; None if it does not."""

    def size_bytes(self, number: int) -> int:
        """Bytes that a generation takes, about."""

    def problems(self) -> list[str]:
        """What is wrong outside of the generations, apart from CURRENT."""

    def lock(self, permissions: Permissions | None = None) -> None:
        """Become the one writer; `permissions`, if given, are set on the folder, which is made if it does not exist.

        Raises:
            StoreLockedError: another writer holds the store.
            StoreError: it cannot be written, or without `permissions`, it does not exist.
        """

    def release(self) -> None:
        """Close what is open and let other writers in; releasing twice is allowed."""

    def locked(self, permissions: Permissions | None = None) -> AbstractContextManager[None]:
        """Context from `lock` to `release`."""

    def start(self, wanted: Manifest) -> GenerationWriter:
        """Resume the newest unfinished generation if it has the identity of `wanted`; otherwise start a new one."""

    def published(self) -> GenerationWriter:
        """Open the published generation, to write it in place."""

    def publish_written(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record of the generation of `start`, publish it, and keep only the one published before."""

    def number_for(self, manifest: Manifest) -> int:
        """Number for a copy: that of an interrupted one, or the manifest's if it is above all that ever were."""

    def remove_leftovers(self, except_for: int = 0) -> None:
        """Remove what interrupted operations left, except for a copy of this number."""

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> GenerationBuilder:
        """Make a generation from existing records, or with `resume` continue an interrupted copy."""

    def publish(self, number: int, keep: Collection[int]) -> None:
        """Publish a complete generation, and remove all others except those in `keep`."""

    def erase(self, keys: Sequence[bytes], wait_s: float) -> int:
        """Erase users, without the writer's lock; returns how many had a record in the published generation.

        Args:
            keys: of the users.
            wait_s: seconds to wait for other erasures, publications, and batches of a writer in a folder.
        """


def open_backend(store: str | Path | StoreUrl, *, cached: bool = False) -> StoreBackend:
    """The store in a folder, whether it exists or not, or on a server.

    Args:
        store: folder or URL.
        cached: read records through the cache that the URL names, if it names one.

    Raises:
        MissingDependencyError: the store is on a server, and the extra `redis` is not installed.
        StoreError: the server cannot be used.
    """
    address = store_address(store)
    if isinstance(address, StoreUrl):
        from vista.store.server import Server

        return Server.connect(address, cached=cached)
    return Folder(address)


def settled(store: StoreBackend, number: int, read: Callable[[], T]) -> T:
    """Result of a function that reads a whole generation; called again if it failed while the generation was written.

    Raises:
        StoreBusyError: it failed three times, and the generation was written each time.
        StoreError: it failed, and nobody wrote the generation meanwhile.
    """
    for _ in range(ATTEMPTS):
        before = store.version(number)
        try:
            return read()
        except StoreError as error:
            if store.version(number) == before:
                raise
            last = error
    raise StoreBusyError(
        f"{store.address}: gen-{number} is being written by a refresh or an erasure; try again when that has ended"
    ) from last
