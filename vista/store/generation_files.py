"""A generation's two environments as writers see them: summaries, and states where they are kept.

A batch's states are committed before its records. So a record never speaks of more than its state does, and a refresh
that is resumed finds by a state's `applied_segment` that it need not add the same events again.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import lmdb

from vista.errors import StoreError
from vista.files import sync
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY, MANIFEST_KEY, walk
from vista.store.layout import (
    Manifest,
    environment_path,
    generation_path,
    list_generations,
    remove_generation,
    state_path,
    write_current,
)
from vista.store.lmdb.data_file import MAX_READERS, REMEDY
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.locks import cannot_write, erasing
from vista.store.lmdb.permissions import Modes, make_folder
from vista.store.tombstones import Tombstones

TURNS = 3
"""What an erasure has come between is done anew this often; then erasures wait for it."""

logger = logging.getLogger(__name__)


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
    ) -> int:
        """Write a batch durably, without the erased users: states first, then records, manifest and `meta` at once.

        Returns:
            How many were written.
        """
        if (self.state is not None) != bool(states) and keys:
            raise ValueError(f"{len(states)} states for {len(keys)} records of {self.path}")

        def put_states(transaction: lmdb.Transaction[memoryview]) -> None:
            erased = tombstones.erased(keys)
            for key, state, gone in zip(keys, states, erased, strict=True):
                if not gone:
                    transaction.put(key, state)

        def put_records(transaction: lmdb.Transaction[memoryview]) -> tuple[Manifest, int]:
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
            return self._put_manifest(transaction, manifest), len(kept)

        if self.state is not None and keys:
            self._write(self.state, put_states)
        count: int
        self.manifest, count = self._write(self.summary, put_records)
        return count

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

    def remove_erased(self, tombstones: Tombstones) -> None:
        """Remove whoever is erased and still there, of whom an erasure that did not end here has left something."""
        for environment, remove in ((self.summary, self.remove), (self.state, self.remove_states)):
            if environment is not None and len(tombstones):
                for keys, erased in walk(environment.read, lambda keys, _: tombstones.erased(keys)):
                    remove([key for key, gone in zip(keys, erased, strict=True) if gone])

    def mark_complete(self, refreshed_at: int) -> None:
        """All records are there: durably; readers may open the generation once CURRENT names it."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            transaction.put(COMPLETE_KEY, b"1")
            manifest = dataclasses.replace(self._manifest_in(transaction), refreshed_at=refreshed_at)
            return self._put_manifest(transaction, manifest)

        self.manifest = self._write(self.summary, put)

    def put_manifest(self, change: Callable[[Manifest], Manifest]) -> None:
        """Change the manifest durably."""

        def put(transaction: lmdb.Transaction[memoryview]) -> Manifest:
            return self._put_manifest(transaction, change(self._manifest_in(transaction)))

        self.manifest = self._write(self.summary, put)

    def read_manifest(self) -> Manifest:
        """As it is stored now."""
        return self.summary.read(self._manifest_in)

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
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error


def flip(root: Path, generation: int, keep: Sequence[int]) -> None:
    """Publish a complete, verified generation, then remove all others but those to keep.

    Erasures wait only for the flip itself. Whoever is erased, by one that was killed half-way too, is out of the
    generation before.

    Raises:
        StoreLockedError: an erasure does not end; the generation stays, unpublished.
    """
    tombstones, num_erased = Tombstones(root), 0  # nobody is erased, or else: swept of nobody yet

    def sweep() -> None:
        with closing(GenerationFiles.open(root, generation)) as files:
            files.remove_erased(tombstones)

    for turn in range(TURNS + 1):
        with erasing(root):
            if turn == TURNS:
                sweep()
            if len(tombstones) == num_erased or turn == TURNS:
                write_current(root, generation)
                break
            num_erased = len(tombstones)
        sweep()
    for number in list_generations(root):
        if number not in (generation, *keep):
            logger.info("%s: gen-%d is removed", root, number)
            remove_generation(root, number)
