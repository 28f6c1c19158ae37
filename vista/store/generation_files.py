"""A generation's two environments as writers see them: summaries, and states where they are kept.

A batch's states are committed before its records. So a record never speaks of more than its state does, and a refresh
that is resumed finds by a state's `applied_segment` that it need not add the same events again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreError, StoreWriteError
from vista.files import sync
from vista.store.environment import MAX_READERS, REMEDY, SharedEnvironment
from vista.store.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY
from vista.store.layout import (
    Manifest,
    WriterLock,
    environment_path,
    generation_path,
    prepare_root,
    remove_leftovers,
    set_store_modes,
    state_path,
)
from vista.store.permissions import Modes, make_folder
from vista.store.record import RecordSpec, check_records
from vista.store.tombstones import Tombstones

_SCAN_RECORDS = 1024


class GenerationFiles:
    """Opened for writing; `manifest` follows every transaction."""

    def __init__(self, root: Path, summary: SharedEnvironment, state: SharedEnvironment | None) -> None:
        self.path = root
        self._closed = False
        self.summary = summary
        self.state = state
        self._parsed: tuple[bytes, Manifest] | None = None
        self.manifest = self.read_manifest()
        self.complete: bool = summary.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)

    @classmethod
    def open(cls, root: Path, generation: int, *, max_readers: int = MAX_READERS) -> GenerationFiles:
        """Open what is there.

        Raises:
            StoreError: missing, truncated or foreign; the message has the remedy.
        """
        summary = SharedEnvironment.acquire(environment_path(root, generation), max_readers, writable=True)
        state = None
        try:
            if state_path(root, generation).is_dir():
                state = SharedEnvironment.acquire(state_path(root, generation), max_readers, writable=True)
            return cls(root, summary, state)
        except BaseException:
            for environment in (summary, state):
                if environment is not None:
                    environment.release()
            raise

    @classmethod
    def create(cls, root: Path, manifest: Manifest, max_readers: int, modes: Modes) -> GenerationFiles:
        """Make an empty generation."""
        folder = generation_path(root, manifest.generation)
        make_folder(folder, modes)
        kept = manifest.state_spec() is not None
        paths = [environment_path(root, manifest.generation)] + ([state_path(root, manifest.generation)] * kept)
        for path in paths:
            make_folder(path, modes)
        opened = [SharedEnvironment.acquire(path, max_readers, writable=True) for path in paths]

        def begin(transaction: lmdb.Transaction[memoryview]) -> None:
            transaction.put(MANIFEST_KEY, manifest.to_bytes())
            transaction.put(CURSOR_KEY, b"0")

        opened[0].write(begin)
        for path in (*paths, folder, root, root.parent):
            sync(path)
        return cls(root, opened[0], opened[1] if kept else None)

    def put(
        self,
        tombstones: Tombstones,
        keys: Sequence[bytes],
        records: Sequence[bytes],
        states: Sequence[bytes],
        meta: Mapping[bytes, bytes],
    ) -> None:
        """Write a batch durably, without the erased users: states first, then records, manifest and `meta` at once."""
        if (self.state is not None) != bool(states) and keys:
            raise ValueError(f"{len(states)} states for {len(keys)} records of {self.path}")

        def put_states(transaction: lmdb.Transaction[memoryview]) -> None:
            erased = tombstones.erased(keys)
            for key, state, gone in zip(keys, states, erased, strict=True):
                if not gone:
                    transaction.put(key, state)

        def put_records(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            # An erasure that began earlier is seen here; a later one deletes once this transaction has ended.
            erased = tombstones.erased(keys)
            kept = [place for place, gone in enumerate(erased) if not gone]
            put_keys, put_values = [keys[place] for place in kept], [records[place] for place in kept]
            old = [transaction.replace(key, value) for key, value in zip(put_keys, put_values, strict=True)]
            manifest = self._manifest_in(transaction).with_records(
                [value for value in old if value is not None], put_keys, put_values
            )
            for key, value in meta.items():
                transaction.put(key, value)
            return self._put_manifest(transaction, manifest)

        if self.state is not None and keys:
            self._write(self.state, put_states)
        self.manifest = self._write(self.summary, put_records)

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users durably, wherever they are; returns how many had a record."""

        def remove_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
            old = [bytes(value) for key in keys if (value := transaction.pop(key)) is not None]
            manifest = self._manifest_in(transaction).with_records(old, [], [])
            return self._put_manifest(transaction, manifest), len(old)

        if not keys:
            return 0
        # Records first: what readers see goes at once.
        count: int
        self.manifest, count = self._write(self.summary, remove_records)
        self.remove_states(keys)
        return count

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Remove the users' states alone, durably."""

        def remove(transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                transaction.delete(key)

        if self.state is not None and keys:
            self._write(self.state, remove)

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest durably."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            return self._put_manifest(transaction, change(self._manifest_in(transaction)))

        self.manifest = self._write(self.summary, put)

    def read_manifest(self) -> Manifest:
        """As it is stored now."""
        return self.summary.read(self._manifest_in)

    def scan(self, spec: RecordSpec) -> Iterator[NDArray[np.void]]:
        """Headers of all records, checked, some at a time; each in a transaction of its own."""
        first = b"u"

        def chunk(transaction: lmdb.Transaction[memoryview], first: bytes) -> tuple[NDArray[np.void], bytes] | None:
            cursor = transaction.cursor()
            if not cursor.set_range(first):
                return None
            items = list(islice(cursor.iternext(), _SCAN_RECORDS))
            keys = [bytes(key) for key, _ in items]
            return check_records([value for _, value in items], keys, spec), keys[-1] + b"\0"

        while (found := self.summary.read(lambda transaction, first=first: chunk(transaction, first))) is not None:  # type: ignore[misc]
            headers, first = found
            yield headers

    def close(self) -> None:
        """Let both go."""
        if not self._closed:
            self._closed = True
            for environment in (self.summary, self.state):
                if environment is not None:
                    environment.release()

    def _manifest_in(self, transaction: lmdb.Transaction[memoryview]) -> Manifest:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise StoreError(f"{self.path}: a generation without a manifest; {REMEDY}")
        if self._parsed is None or value != self._parsed[0]:  # first look, or another process has erased users
            self._parsed = bytes(value), Manifest.from_bytes(bytes(value), self.path)
        return self._parsed[1]

    def _put_manifest(self, transaction: lmdb.Transaction[memoryview], manifest: Manifest) -> Manifest:
        value = manifest.to_bytes()
        transaction.put(MANIFEST_KEY, value)
        self._parsed = value, manifest
        return manifest

    def _write(self, environment: SharedEnvironment, function: Callable[[lmdb.Transaction[memoryview]], Any]) -> Any:
        if self._closed or environment.inherited:
            raise StoreError(f"{self.path}: the writer is closed, or was opened before a fork; open another")
        try:
            return environment.write(function)
        except lmdb.Error as error:
            raise write_error(self.path, error) from error


def lock_store(root: Path, modes: Modes | None = None) -> WriterLock:
    """Become the one writer of a store, and clear away what a killed one was removing.

    Args:
        root: the store's folder.
        modes: make it if it is not there, and give all that lies in it these; None leaves all as it is.

    Raises:
        StoreLockedError: another writer holds the store; the message names its process if known.
        StoreError: the path cannot be written, or is not there.
    """
    try:
        if modes is not None:
            prepare_root(root, modes)
        lock = WriterLock(root)
    except OSError as error:
        raise StoreError(f"{root} cannot be written: {error}; choose another folder or its permissions") from error
    try:
        if modes is not None:
            set_store_modes(root, modes)
        remove_leftovers(root)
    except OSError as error:
        lock.release()
        raise StoreError(f"{root} cannot be written: {error}; choose another folder or its permissions") from error
    return lock


def write_error(root: Path, error: Exception) -> StoreWriteError:
    """What a failed write of a store is called."""
    return StoreWriteError(
        f"{root} cannot be written: {error}; check free space and permissions, then run the refresh again: it goes on "
        "after the last batch that was written"
    )
