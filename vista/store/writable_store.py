"""What a writer needs of the place that holds a store's generations.

`locked_folder.py` and `generation_files.py` are a folder, and `vista/store/remote/` is a Valkey or Redis server.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from vista.store.erased_users import ErasedUsers
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec
from vista.store.layout import store_address
from vista.store.lmdb.permissions import Permissions
from vista.store.locked_folder import LockedFolder
from vista.store.manifest import Manifest
from vista.store.open_generation import FoundStates
from vista.store.remote.store_url import StoreUrl


class WritableGeneration(Protocol):
    """One generation, open for writing; every write is atomic and updates `manifest`."""

    manifest: Manifest
    """As the last write left it."""

    def put(
        self,
        erased_users: ErasedUsers,
        keys: Sequence[bytes],
        records: Sequence[bytes],
        states: Sequence[bytes],
        meta: Mapping[bytes, bytes],
    ) -> int:
        """Add or replace users, without erased ones, and put further keys; returns how many users were written."""

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users; returns how many had a record."""

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove users' states alone."""

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Header of each user's record; None without a record."""

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""

    def states(self, keys: Sequence[bytes], spec: StateSpec) -> FoundStates | None:
        """The stored states of some users; None if the generation keeps no states."""

    def renew(self) -> None:
        """Let its time to live begin now, if it has one."""

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest."""

    def read_cursor(self) -> int:
        """Users done, in the run's fixed order."""


class WritableStore(Protocol):
    """A store whose one writer is this process."""

    @property
    def path(self) -> Path | StoreUrl:
        """Where the store is, as messages name it."""

    @property
    def erased_users(self) -> ErasedUsers:
        """Users that no write brings back."""

    def start(self, wanted: Manifest) -> WritableGeneration:
        """Resume the unfinished generation with the identity of `wanted`, or create a new one."""

    def published(self) -> WritableGeneration:
        """Open the published generation, to write it in place."""

    def publish(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record of the generation that `start` opened, publish it, and remove those that are not kept."""

    def release(self) -> None:
        """Close what is open and let other writers in; releasing twice is allowed."""


def lock_for_writing(store: str | Path | StoreUrl, permissions: Permissions | None = None) -> WritableStore:
    """Become the one writer of a store.

    Args:
        store: its folder or URL.
        permissions: make the folder if it does not exist, and set these on it; None changes nothing.

    Raises:
        StoreLockedError: another writer holds the store.
        StoreError: it cannot be written; the message has the remedy.
    """
    address = store_address(store)
    if isinstance(address, StoreUrl):
        from vista.store.remote.locked_server import LockedServer

        return LockedServer.lock(address)
    return LockedFolder.lock(address, permissions)
