"""A generation's LMDB environments, open for writing: its summaries, and its states if the store keeps any.

The states of a batch are committed before its records. So a record never covers more events than its state, and a
resumed refresh sees from a state's `applied_segment` that the same events must not be added again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lmdb

from vista.errors import StoreError
from vista.files import sync
from vista.store.erased_users import ErasedUsers
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY
from vista.store.format.record_spec import HEADER_BYTES
from vista.store.format.state_record import StateSpec
from vista.store.layout import environment_path, generation_path, state_path
from vista.store.lmdb.data_file import REMEDY
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.flock import WAIT_S
from vista.store.lmdb.permissions import Permissions, make_folder
from vista.store.lmdb.transactions import walk
from vista.store.local_generation import read_states
from vista.store.locks import cannot_write
from vista.store.manifest import Manifest, read_cursor
from vista.store.open_generation import FoundStates
from vista.store.tombstones import Tombstones


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
