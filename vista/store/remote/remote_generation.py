"""One complete generation on a server, open for reading."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from vista.arrays import Int
from vista.errors import RecordError
from vista.store.batch_assembly import present_records
from vista.store.format.record import RawRecords, check_records
from vista.store.format.record_spec import RecordSpec
from vista.store.manifest import Manifest
from vista.store.open_generation import FoundStates, OpenGeneration
from vista.store.remote.remote_records import RemoteRecords


@dataclass(frozen=True, slots=True)
class RemoteGeneration:
    """As `OpenGeneration` says. The connections belong to the store, so there is nothing to release."""

    records: RemoteRecords
    manifest: Manifest
    spec: RecordSpec
    read_current: Callable[[], tuple[int, Manifest, bytes]]
    """Number, manifest and stamp of the published generation."""

    def read(self, keys: list[bytes]) -> list[tuple[Int, RawRecords]]:
        """Positions of the keys that have a record, and the records, a round trip per batch."""
        size = self.records.batch_size
        batches = [self._read_batch(keys[first : first + size], first) for first in range(0, max(len(keys), 1), size)]
        return [part for batch in batches for part in batch]

    def _read_batch(self, keys: list[bytes], first: int) -> list[tuple[Int, RawRecords]]:
        """Parts of a batch that one command reads; it has position `first` in the request."""
        try:
            return self._parts(self.records.get(keys), keys, first)
        except RecordError:
            if not self.records.forget_cached(keys):
                raise
            return self._parts(self.records.get_from_server(keys), keys, first)

    def _parts(self, values: list[bytes | None], keys: list[bytes], first: int) -> list[tuple[Int, RawRecords]]:
        size = self.records.part_size
        return [
            present_records(values[start : start + size], keys[start : start + size], first + start, self.spec)
            for start in range(0, max(len(keys), 1), size)
        ]

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order."""
        return self.records.key_batches()

    def value(self, key: bytes) -> bytes | None:
        """A user's unchecked record; None without one."""
        return self.records.get([key])[0]

    def raw_batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys beyond `after` and their unchecked records, ascending."""
        return self.records.batches(after)

    def batches(self, after: bytes = b"u") -> Iterator[tuple[list[bytes], list[bytes]]]:
        """As `raw_batches`, with every record checked.

        Raises:
            RecordError: a record is corrupt or lost; the message names the user.
        """
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def state_batches(self) -> Iterator[tuple[list[bytes], list[bytes]]]:
        """Keys and states, ascending, checked; nothing if the generation keeps no states."""
        return iter(()) if (spec := self.manifest.state_spec()) is None else self.records.state_batches(spec)

    def other_keys(self) -> list[bytes]:
        """Nothing: keys under a generation's prefix cannot be listed without looking at all keys of the server."""
        return []

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """The stored states of some users; None if the generation keeps no states."""
        return None if (spec := self.manifest.state_spec()) is None else self.records.states(keys, spec)

    def is_same(self, other: OpenGeneration) -> bool:
        """Whether both hold the same records."""
        return isinstance(other, RemoteGeneration) and other.records.stamp == self.records.stamp

    def is_published(self) -> bool:
        """Whether CURRENT names this generation."""
        return self.read_current()[2] == self.records.stamp

    def reread(self) -> RemoteGeneration:
        """The same generation with the manifest as an incremental refresh has left it."""
        _, manifest, stamp = self.read_current()
        return dataclasses.replace(self, manifest=manifest) if stamp == self.records.stamp else self

    def reopen(self) -> None:
        """Nothing to do: the client opens new connections after a fork."""

    def release(self) -> None:
        """Nothing to do."""
