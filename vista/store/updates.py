"""Changes to the served generation in place: new records and states of some users, and erasures."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreError, SummarizerMismatchError
from vista.store.format.keys import user_keys, walk
from vista.store.format.record import HEADER, HEADER_BYTES
from vista.store.format.state_record import StateArrays, read_states
from vista.store.generation_files import GenerationFiles
from vista.store.layout import (
    Manifest,
    environment_path,
    generation_path,
    list_generations,
    missing_generation,
    read_current,
    remove_leftovers,
    served_or_none,
)
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.locks import WriterLock, erasing, lock_store
from vista.store.reader import read_manifest
from vista.store.tombstones import Tombstones

logger = logging.getLogger(__name__)


class StoreUpdate:
    """The one writer of a store, which replaces, adds and removes records of the served generation in durable batches.

    Readers see each batch as it is committed. A kill loses nothing that was acknowledged: `applied_segments` says
    what of a run is done.
    """

    def __init__(
        self,
        root: Path,
        lock: WriterLock,
        files: GenerationFiles,
        created_at: int,
        applied: int,
        key: bytes | None,
    ) -> None:
        self.path = root
        self._lock = lock
        self._files = files
        self._tombstones = Tombstones(root)
        self.created_at = created_at
        manifest = files.manifest
        self.spec = dataclasses.replace(manifest.spec(key), created_at=created_at, applied_segment=applied)
        """What new records must hold."""
        state_spec = None if files.state is None else manifest.state_spec()
        self.state_spec = None if state_spec is None else dataclasses.replace(state_spec, created_at=created_at)
        self.applied = applied

    @classmethod
    def open(
        cls, path: str | Path, *, summarizer_id: bytes, applied_segment: int, created_at: int, key: bytes | None = None
    ) -> StoreUpdate:
        """Open the generation that CURRENT names for writing.

        Args:
            path: the store's folder.
            summarizer_id: of the model, 32 bytes.
            applied_segment: newest segment of the log that the new records will have seen.
            created_at: start of the run, ms.
            key: 32 bytes, where the store's records have codes.

        Raises:
            StoreLockedError: another writer holds the store.
            SummarizerMismatchError: the generation is of another summarizer.
            StoreError: nothing is published there, or it cannot be written.
        """
        root = Path(path).absolute()
        read_current(root)  # else the lock would be the first thing to miss
        lock = lock_store(root)
        try:
            remove_leftovers(root)
            generation = read_current(root)
            if not generation_path(root, generation).is_dir():
                raise missing_generation(root, generation)
            files = GenerationFiles.open(root, generation)
            try:
                if files.manifest.summarizer_id != summarizer_id.hex():
                    raise SummarizerMismatchError(
                        f"{root} was written by summarizer {files.manifest.summarizer_id}, but the model's is "
                        f"{summarizer_id.hex()}; run a full `vista refresh` with this model"
                    )
                return cls(root, lock, files, created_at, applied_segment, key)
            except BaseException:
                files.close()
                raise
        except BaseException:
            lock.release()
            raise

    @property
    def manifest(self) -> Manifest:
        """Of the generation, as the last transaction left it."""
        return self._files.manifest

    def erased(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        """[N] whether each user is erased."""
        return np.array(self._tombstones.erased(keys), bool)

    def applied_segments(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        """[N] newest segment in each user's record, -1 without one."""

        def read(transaction: lmdb.Transaction[memoryview]) -> list[bytes | None]:
            values = [transaction.get(key) for key in keys]
            return [None if value is None else bytes(value[:HEADER_BYTES]) for value in values]

        applied = np.full(len(keys), -1, np.int64)
        for row, value in enumerate(self._files.summary.read(read)):
            if value is not None:
                applied[row] = np.frombuffer(value, HEADER)[0]["applied_segment"]
        return applied

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users, some at a time, ascending."""
        return (keys for keys, _ in walk(self._files.summary.read, lambda keys, _: None))

    def states(self, keys: Sequence[bytes]) -> tuple[NDArray[np.int64], StateArrays] | None:
        """Rows of the keys that have a state, and these states; None where the generation keeps none.

        Raises:
            RecordError: a state is damaged; the message names the user.
        """
        if self._files.state is None or self.state_spec is None:
            return None
        return read_states(self._files.state, keys, self.state_spec)

    def put_batch(self, keys: Sequence[bytes], records: Sequence[bytes], states: Sequence[bytes] = ()) -> None:
        """Add or replace users durably, states first; erased users are left out.

        Raises:
            StoreError: the records are as before (disk full, input/output error); the message has the remedy.
        """
        self._files.put(self._tombstones, keys, records, states, {})

    def remove(self, keys: Sequence[bytes]) -> int:
        """Remove users durably; returns how many had a record."""
        return self._files.remove(keys)

    def remove_states(self, keys: Sequence[bytes]) -> None:
        """Have users recomputed from the log when they come again."""
        self._files.remove_states(keys)

    def begin(self, log_digest: str) -> None:
        """From here on some records may have seen the log up to `applied_segment`."""
        self._files.put_manifest(
            lambda manifest: dataclasses.replace(manifest, going_to=self.applied, going_to_digest=log_digest)
        )

    def finish(self) -> Manifest:
        """All users are done: the generation has seen `applied_segment`, as of this run's start."""
        self._files.put_manifest(
            lambda manifest: dataclasses.replace(
                manifest,
                applied_segment=self.applied,
                log_digest=manifest.going_to_digest,
                going_to=0,
                going_to_digest="",
                refreshed_at=self.created_at,
            )
        )
        return self.manifest

    def close(self) -> None:
        """Let the store go."""
        self._files.close()
        self._lock.release()

    def __enter__(self) -> StoreUpdate:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def served_manifest(path: str | Path) -> Manifest:
    """What the served generation is; no key is needed.

    Raises:
        StoreError: nothing is served, or it is damaged.
    """
    root = Path(path).absolute()
    environment = SharedEnvironment.acquire(environment_path(root, read_current(root)))
    try:
        return environment.read(lambda transaction: read_manifest(transaction, root))
    finally:
        environment.release()


def erase(path: str | Path, user_ids: Sequence[int] | Sequence[str]) -> int:
    """Erase users: gone at once for readers, and no later refresh of this store brings them back.

    A tombstone is written first, then their records and states go from every generation, one that is being written
    included: a writer is waited for only within a batch. Their bytes stay in free pages until the store is compacted.

    Args:
        path: the store's folder.
        user_ids: ids as in the log; those without a record are kept from getting one.

    Returns:
        How many had a record in the served generation.

    Raises:
        StoreLockedError: another erasure, or a writer within a batch, does not end: the call is to be repeated.
        StoreError: there is no store, or a generation cannot be opened or written; the tombstones stand, and the call
            is to be repeated. So it is after a kill; until then whatever publishes a generation, an incremental refresh
            that meets the user, or a compaction removes what is left.
    """
    root, keys = Path(path).absolute(), list(dict.fromkeys(user_keys(user_ids)))
    if not root.is_dir() or not list_generations(root):
        raise StoreError(f"{root} is no store; check the path")
    count = 0
    with erasing(root):
        Tombstones(root).add(keys)
        served = served_or_none(root)
        # First the served one: whoever stops half-way has done what readers see.
        for generation in sorted(list_generations(root), key=lambda number: number != served):
            try:
                files = GenerationFiles.open(root, generation)
            except StoreError:
                if generation == served:
                    raise
                # Unfinished and without a manifest yet, or damaged: its writer sees the tombstone, or starts afresh.
                logger.warning("%s: gen-%d cannot be opened; its erasure is left to its writer", root, generation)
                continue
            try:
                removed = files.remove(keys)
            except StoreError:
                if generation == served or environment_path(root, generation).exists():
                    raise
                continue  # Removed meanwhile, by the flip that this erasure waited for.
            finally:
                files.close()
            count = removed if generation == served else count
    return count
