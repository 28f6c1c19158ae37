"""One generation, to be read or filled from its first record to its last, in a folder or on a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

from vista.store.admin.generation_reader import Batch
from vista.store.format.record_spec import RecordSpec
from vista.store.manifest import Manifest
from vista.store.tally import Tally


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
