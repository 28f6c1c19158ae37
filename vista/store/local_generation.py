"""Generations of a store in a folder, for readers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import StoreError
from vista.files import sync
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY
from vista.store.layout import (
    Permissions,
    environment_path,
    generation_path,
    list_generations,
    make_folder,
    missing_generation,
    read_current,
    state_path,
)
from vista.store.lmdb_environment import REMEDY, WAIT_S, SharedEnvironment, walk
from vista.store.manifest import Manifest, read_cursor, read_manifest
from vista.store.record import RawRecords, check_keys, present_records
from vista.store.record_spec import HEADER_BYTES, RecordSpec
from vista.store.state_record import StateArrays, StateSpec, decode_states
from vista.store.tombstones import ErasedUsers, Tombstones, cannot_write

# What a reader needs of the place that holds a store's generations.
#
# `local_generation.py` is a folder, and `vista/store/remote/` is a Valkey or Redis server.

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


_READ_RECORDS = 1024
"""Most records per read transaction, so that transactions stay short for any batch size."""


@dataclass(frozen=True, slots=True)
class LocalGeneration:
    """One complete generation, open for reading (`vista.store.local_generation.OpenGeneration`)."""

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
    """All generations of a store in a folder (`vista.store.local_generation.Generations`)."""

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


# A generation's LMDB environments, open for writing: its summaries, and its states if the store keeps any.
#
# The states of a batch are committed before its records. So a record never covers more events than its state, and a
# resumed refresh sees from a state's `applied_segment` that the same events must not be added again.


class GenerationFiles:
    """One generation, open for writing; `manifest` is updated by every transaction."""

    def __init__(
        self, root: Path, summary: SharedEnvironment, state: SharedEnvironment | None, wait_s: float = WAIT_S
    ) -> None:
        self.path = root
        self._wait_s = wait_s
        self._closed = False
        self.summary = summary
        self.state = state
        self._parsed: tuple[bytes, Manifest] | None = None
        self.manifest = self.read_manifest()
        self.complete: bool = summary.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)

    @classmethod
    def open(cls, root: Path, generation: int, *, wait_s: float = WAIT_S) -> GenerationFiles:
        """Open an existing generation; its transactions wait up to `wait_s` seconds for one of another process.

        Raises:
            StoreError: missing, truncated, or not of LMDB; the message has the remedy.
        """
        summary = SharedEnvironment.acquire(environment_path(root, generation), writable=True)
        state = None
        try:
            if state_path(root, generation).is_dir():
                state = SharedEnvironment.acquire(state_path(root, generation), writable=True)
            return cls(root, summary, state, wait_s)
        except BaseException:
            for environment in (summary, state):
                if environment is not None:
                    environment.release()
            raise

    @classmethod
    def create(cls, root: Path, manifest: Manifest, permissions: Permissions) -> GenerationFiles:
        """Make an empty generation. All its folders are on the disk before its manifest says what they hold."""
        folder = generation_path(root, manifest.generation)
        make_folder(folder, permissions)
        has_states = manifest.state_spec() is not None
        paths = [environment_path(root, manifest.generation)] + ([state_path(root, manifest.generation)] * has_states)
        for path in paths:
            make_folder(path, permissions)
        opened = [SharedEnvironment.acquire(path, writable=True) for path in paths]
        for path in (*paths, folder, root):
            sync(path)

        def put_first(transaction: lmdb.Transaction[memoryview]) -> None:
            transaction.put(MANIFEST_KEY, manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"0")

        opened[0].write(put_first)
        return cls(root, opened[0], opened[1] if has_states else None)

    def require_states(self) -> None:
        """Refuse a generation that lost its states; to erase users from it, it may stay open.

        Raises:
            StoreError: its manifest names states, but there are none.
        """
        if self.state is None and self.manifest.state_spec() is not None:
            path = state_path(self.path, self.manifest.generation)
            raise StoreError(f"{path}: the states that its manifest names are missing; run a full refresh")

    def put(
        self,
        erased_users: ErasedUsers,
        keys: Sequence[bytes],
        records: Sequence[bytes],
        states: Sequence[bytes],
        meta: Mapping[bytes, bytes],
    ) -> int:
        """Write a batch durably, without erased users: first the states, then records, manifest and `meta` together.

        Args:
            erased_users: of the store.
            keys: N user keys.
            records: N records.
            states: N states, or none if the store keeps no states.
            meta: further keys and values to put.

        Returns:
            How many users were written.
        """
        if (self.state is not None) != bool(states) and keys:
            raise ValueError(f"states: got {len(states)} for {len(keys)} records of {self.path}")

        def put_states(transaction: lmdb.Transaction[memoryview]) -> None:
            erased = erased_users.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            _put(transaction, [keys[place] for place in remaining], [states[place] for place in remaining])

        def put_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
            # An erasure that began earlier is seen here; a later one deletes the user after this transaction.
            erased = erased_users.erased(keys)
            remaining = [place for place, gone in enumerate(erased) if not gone]
            put_keys, put_values = [keys[place] for place in remaining], [records[place] for place in remaining]
            old = _put(transaction, put_keys, put_values)
            manifest = self._manifest_in(transaction).with_records(old, put_keys, put_values)
            for key, value in meta.items():
                transaction.put(key, value)
            return self._put_manifest(transaction, manifest), len(remaining)

        if self.state is not None and keys:
            self._write(self.state, put_states)
        count: int
        self.manifest, count = self._write(self.summary, put_records)
        return count

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users' records and states durably; returns how many had a record."""

        def remove_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
            old = [bytes(value) for key in keys if (value := transaction.pop(key)) is not None]
            manifest = self._manifest_in(transaction).with_records(old, [], [])
            return self._put_manifest(transaction, manifest), len(old)

        if not keys:
            return 0
        # Records first, so that readers miss the users at once.
        count: int
        self.manifest, count = self._write(self.summary, remove_records)
        self.remove_states(keys)
        return count

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove users' states alone, durably."""

        def remove(transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                transaction.delete(key)

        if self.state is not None and keys:
            self._write(self.state, remove)

    def remove_erased(self, tombstones: Tombstones) -> None:
        """Remove erased users who still have a record or state, because their erasure was interrupted."""
        for environment, remove in ((self.summary, self.remove), (self.state, self.remove_states)):
            if environment is not None and len(tombstones):
                for keys, erased in walk(environment.read, lambda keys, _: tombstones.erased(keys)):
                    remove([key for key, gone in zip(keys, erased, strict=True) if gone])

    def mark_complete(self, refreshed_at: int) -> None:
        """Mark durably that all records are written; readers may open the generation once CURRENT names it."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            transaction.put(COMPLETE_KEY, b"1")
            manifest = dataclasses.replace(self._manifest_in(transaction), refreshed_at=refreshed_at)
            return self._put_manifest(transaction, manifest)

        self.manifest = self._write(self.summary, put)

    def renew(self) -> None:
        """Nothing to do: files do not expire."""

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest durably."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            return self._put_manifest(transaction, change(self._manifest_in(transaction)))

        self.manifest = self._write(self.summary, put)

    def headers(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Header of each user's record; None without a record."""

        def read(transaction: lmdb.Transaction[memoryview]) -> list[bytes | None]:
            values = [transaction.get(key) for key in keys]
            return [None if value is None else bytes(value[:HEADER_BYTES]) for value in values]

        return self.summary.read(read)

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order, a batch at a time."""
        return (keys for keys, _ in walk(self.summary.read, lambda keys, _: None))

    def states(self, keys: Sequence[bytes], spec: StateSpec) -> FoundStates | None:
        """Rows of the keys that have a state, and these states; None if the generation keeps no states."""
        return None if self.state is None else read_states(self.state, keys, spec)

    def read_manifest(self) -> Manifest:
        """The manifest as it is stored now."""
        return self.summary.read(self._manifest_in)

    def read_cursor(self) -> int:
        """Users done, in the run's fixed order.

        Raises:
            StoreError: it is not a number up to the users of the run.
        """
        return self.summary.read(lambda transaction: read_cursor(transaction, self.manifest, self.path))

    def close(self) -> None:
        """Close the environments; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            for environment in (self.summary, self.state):
                if environment is not None:
                    environment.release()

    def _manifest_in(self, transaction: lmdb.Transaction[memoryview]) -> Manifest:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise StoreError(f"{self.path}: a generation has no manifest; {REMEDY}")
        if self._parsed is None or value != self._parsed[0]:  # first read, or another process has erased users
            self._parsed = bytes(value), Manifest.from_bytes(bytes(value), self.path)
        return self._parsed[1]

    def _put_manifest(self, transaction: lmdb.Transaction[memoryview], manifest: Manifest) -> Manifest:
        value = manifest.to_bytes()
        transaction.put(MANIFEST_KEY, value)
        self._parsed = value, manifest
        return manifest

    def _write(self, environment: SharedEnvironment, function: Callable[[lmdb.Transaction[memoryview]], Any]) -> Any:
        if self._closed or environment.inherited:
            raise StoreError(f"{self.path}: the writer is closed, or was opened before a fork; open a new one")
        try:
            return environment.write(function, self._wait_s)
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error


def _put(
    transaction: lmdb.Transaction[memoryview], keys: Sequence[bytes], values: Sequence[bytes]
) -> list[bytes | memoryview]:
    """Put values and return those that they replace.

    Keys after the last one are appended. Otherwise LMDB would split the last page in half each time it is full, and
    ascending records of half a page would take a page each.
    """
    cursor = transaction.cursor()
    replaced: list[bytes | memoryview] = []
    last = bytes(cursor.key()) if cursor.last() else b""
    for key, value in zip(keys, values, strict=True):
        if key > last:
            transaction.put(key, value, append=True)
            last = key
        elif (old := transaction.replace(key, value)) is not None:
            replaced.append(old)
    return replaced
