"""What a reader needs of the place that holds a store's generations.

`local_generation.py` is a folder, and `vista/store/remote/` is a Valkey or Redis server.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from numpy.typing import NDArray

from vista.arrays import Int
from vista.store.format.record import RawRecords
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateArrays
from vista.store.manifest import Manifest

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
