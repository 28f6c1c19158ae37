"""Generations of a store in a folder, for readers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.store.batch_assembly import present_records
from vista.store.format.record import RawRecords, check_keys
from vista.store.format.record_spec import RecordSpec
from vista.store.format.state_record import StateSpec, decode_states
from vista.store.layout import (
    environment_path,
    list_generations,
    missing_generation,
    read_current,
    state_path,
)
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.transactions import walk
from vista.store.manifest import Manifest, read_manifest
from vista.store.open_generation import FoundStates, OpenGeneration

_READ_RECORDS = 1024
"""Most records per read transaction, so that transactions stay short for any batch size."""


@dataclass(frozen=True, slots=True)
class LocalGeneration:
    """One complete generation, open for reading (`vista.store.open_generation.OpenGeneration`)."""

    root: Path
    """Folder of the store."""
    environment: SharedEnvironment
    manifest: Manifest
    spec: RecordSpec

    def read(self, keys: list[bytes]) -> list[tuple[NDArray[np.int64], RawRecords]]:
        """Positions of the keys that have a record, and the records, in a part per transaction."""
        return [self._read_part(keys, first) for first in range(0, max(len(keys), 1), _READ_RECORDS)]

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order, checked, each batch from a short transaction."""
        self.environment.retain()
        try:
            for keys, _ in walk(self.environment.read, check_keys):
                yield keys
        finally:
            self.environment.release()

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """The stored states; they are open only during the call, so that scorers never map them."""
        spec = self.manifest.state_spec()
        if spec is None:
            return None
        environment = SharedEnvironment.acquire(state_path(self.root, self.manifest.generation))
        try:
            return read_states(environment, keys, spec)
        finally:
            environment.release()

    def is_same(self, other: OpenGeneration) -> bool:
        """Whether both have the same files open."""
        return isinstance(other, LocalGeneration) and other.environment is self.environment

    def is_published(self) -> bool:
        """Whether CURRENT names this generation, and its folder still has these files."""
        number = self.manifest.generation
        return read_current(self.root) == number and self.environment.is_at(environment_path(self.root, number))

    def reread(self) -> LocalGeneration:
        """The same generation with the manifest as an incremental refresh has left it."""
        manifest = self.environment.read(lambda transaction: read_manifest(transaction, self.root))
        return dataclasses.replace(self, manifest=manifest)

    def reopen(self) -> None:
        """Open the files again in a forked process."""
        if self.environment.inherited:
            self.environment.reopen()

    def release(self) -> None:
        """Release the files."""
        self.environment.release()

    def _read_part(self, all_keys: list[bytes], first: int) -> tuple[NDArray[np.int64], RawRecords]:
        keys = all_keys[first : first + _READ_RECORDS]

        def copy(transaction: lmdb.Transaction[memoryview]) -> tuple[NDArray[np.int64], RawRecords]:
            return present_records([transaction.get(key) for key in keys], keys, first, self.spec)

        return self.environment.read(copy)


@dataclass(frozen=True, slots=True)
class LocalGenerations:
    """All generations of a store in a folder (`vista.store.open_generation.Generations`)."""

    root: Path

    def current(self) -> int:
        """Number of the published generation."""
        return read_current(self.root)

    def numbers(self) -> list[int]:
        """Numbers of all generations, ascending; none if the folder does not exist."""
        return list_generations(self.root) if self.root.is_dir() else []

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""
        environment = self._acquire(number)
        try:
            return environment.read(lambda transaction: read_manifest(transaction, self.root))
        finally:
            environment.release()

    def open(self, number: int, key: bytes | None) -> LocalGeneration:
        """Open a complete generation."""
        environment, path = self._acquire(number), environment_path(self.root, number)
        try:
            manifest = environment.read(lambda transaction: read_manifest(transaction, path))
            return LocalGeneration(self.root, environment, manifest, manifest.spec(key))
        except BaseException:
            environment.release()
            raise

    def close(self) -> None:
        """Nothing to do: each generation closes its own files."""

    def _acquire(self, number: int) -> SharedEnvironment:
        path = environment_path(self.root, number)
        if not path.is_dir():
            raise missing_generation(self.root, number)
        return SharedEnvironment.acquire(path)


def read_states(environment: SharedEnvironment, keys: Sequence[bytes], spec: StateSpec) -> FoundStates:
    """Rows of the keys that have a state, and these states, read in one transaction.

    Raises:
        RecordError: a state is damaged; the message names the user.
    """

    def read(transaction: lmdb.Transaction[memoryview]) -> FoundStates:
        values = [transaction.get(key) for key in keys]
        rows = [row for row, value in enumerate(values) if value is not None]
        present = [value for value in values if value is not None]
        return np.array(rows, np.int64), decode_states(present, [keys[row] for row in rows], spec)

    return environment.read(read)
