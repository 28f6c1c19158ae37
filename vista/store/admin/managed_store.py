"""What operations on whole generations need of a store, in a folder or on a server."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol, TypeVar

from vista.store.admin.folder_store import FolderStore
from vista.store.admin.whole_generation import NewGeneration, WholeGeneration
from vista.store.erased_users import ErasedUsers
from vista.store.layout import store_address
from vista.store.lmdb.permissions import Permissions
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl

T = TypeVar("T")


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
        from vista.store.admin.server_store import ServerStore

        return ServerStore.connect(address)
    return FolderStore(address)
