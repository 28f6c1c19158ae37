"""What readers and writers need of the place that holds a store's generations: a folder, or a server of its own.

`local_generation.py` and `locked_folder.py` are the folder; `vista/store/remote/` is Valkey or Redis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from vista.arrays import Int
from vista.store.format.record import RawRecords
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateArrays, StateSpec
from vista.store.manifest import Manifest
from vista.store.remote.store_url import StoreUrl

FoundStates = tuple[NDArray[Any], StateArrays]
"""Rows of the users who have a state, and these states."""


class OpenGeneration(Protocol):
    """One complete generation, open for reading."""

    @property
    def manifest(self) -> Manifest:
        """As it was when the generation was opened."""

    @property
    def spec(self) -> RecordSpec:
        """What each record holds."""

    def read(self, keys: list[bytes]) -> list[tuple[Int, RawRecords]]:
        """Parts of a batch: positions of the keys that have a record, ascending, and their records; at least one part.

        Raises:
            StoreClosedError: the generation was closed, or was removed and is unreadable since.
        """

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """The stored states of some users; None if the generation keeps no states."""

    def is_same(self, other: OpenGeneration) -> bool:
        """Whether both are the same records, and not only generations of one number."""

    def is_published(self) -> bool:
        """Whether CURRENT names this generation."""

    def reread(self) -> OpenGeneration:
        """The same generation with its manifest as it is now."""

    def reopen(self) -> None:
        """Make it usable after a fork; nothing happens in the process that opened it.

        Raises:
            StoreError: the generation was removed meanwhile.
        """

    def release(self) -> None:
        """Close it once its last reader has."""


class Generations(Protocol):
    """The generations of one store."""

    def current(self) -> int:
        """Number of the published one.

        Raises:
            StoreError: nothing is published, or CURRENT is damaged.
        """

    def numbers(self) -> list[int]:
        """Numbers of all of them, finished or not, ascending."""

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation."""

    def open(self, number: int, key: bytes | None) -> OpenGeneration:
        """Open a complete generation.

        Raises:
            StoreError: missing, unfinished, damaged, or of another key.
        """

    def close(self) -> None:
        """Close what generations share; closing twice is allowed."""


class ErasedUsers(Protocol):
    """The erased users of a store."""

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""

    def __len__(self) -> int: ...


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
