"""Write side of a store: one writer fills a new generation in durable batches and publishes it; resumable."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import lmdb

from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreWriteError
from vista.files import sync
from vista.store.format.authentication import key_id
from vista.store.format.keys import COMPLETE_KEY, CURSOR_KEY
from vista.store.generation_files import GenerationFiles
from vista.store.layout import (
    CURRENT,
    environment_path,
    environments_of,
    generation_path,
    list_generations,
    missing_generation,
    next_number,
    read_current,
    record_complete,
    remove_generation,
    remove_store_leftovers,
    store_path,
)
from vista.store.lmdb.data_file import check_structure
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.flock import WAIT_S
from vista.store.lmdb.permissions import GROUP, PRIVATE, Permissions
from vista.store.locks import WriterLock, cannot_write, erasure_lock, lock_store
from vista.store.manifest import Manifest
from vista.store.publication import ATTEMPTS_BESIDE_ERASURES, publish_generation
from vista.store.tally import Tally, tally_of
from vista.store.tombstones import Tombstones

logger = logging.getLogger(__name__)


class StoreWriter:
    """The one writer of a store: fills a new generation in durable batches, resumes it after a kill, publishes it.

    Open it with `StoreWriter.open`. As a context manager it closes on exit, and an unpublished generation stays for the
    next run of the same refresh.
    """

    def __init__(self, root: Path, lock: WriterLock, published: int, files: GenerationFiles, key: bytes | None) -> None:
        self.path = root
        self._published = published
        self._lock = lock
        self._files = files
        self.manifest = files.manifest
        self.spec = self.manifest.spec(key)
        """What each record must hold."""
        self.state_spec = self.manifest.state_spec()
        """What each state must hold; None if the generation keeps no states."""
        self._tombstones = Tombstones(root)
        self._cursor = files.read_cursor()

    @classmethod
    def open(
        cls,
        path: str | Path,
        manifest: Manifest,
        *,
        key: bytes | None = None,
        shared_with_group: bool = False,
    ) -> StoreWriter:
        """Resume the unfinished generation with the same identity, or start a new one.

        Args:
            path: the store's folder; made if it does not exist.
            manifest: what to write; its `generation` and `key_id` are assigned here. A resumed generation keeps its own
                `created_at`. Two manifests have the same identity if all their fields are equal except `NOT_IDENTITY`.
            key: 32 bytes, to give records codes that only holders of the key can make.
            shared_with_group: let the group of the store's folder read it (folders 2750, files 0640, lock.mdb 0660).

        Raises:
            StoreLockedError: another writer holds the store; the message has its process id if known.
            StoreError: the path cannot be written; the message has the remedy.
        """
        root = store_path(path)
        permissions = GROUP if shared_with_group else PRIVATE
        lock = lock_store(root, permissions)
        try:
            remove_store_leftovers(root)
            published = _published(root)
            wanted = dataclasses.replace(manifest, key_id=None if key is None else key_id(key))
            files = _resume_or_create(root, wanted, published, permissions)
            return cls(root, lock, published, files, key)
        except (OSError, lmdb.Error) as error:
            lock.release()
            raise cannot_write(root, error) from error
        except BaseException:
            lock.release()
            raise

    @property
    def generation(self) -> int:
        """Number of the generation being written."""
        return self.manifest.generation

    @property
    def cursor(self) -> int:
        """Users done, in the run's fixed order; 0 in a new generation."""
        return self._cursor

    def put_batch(
        self, keys: Sequence[bytes], records: Sequence[bytes], cursor: int, states: Sequence[bytes] = ()
    ) -> int:
        """Write a batch and the cursor durably: after this returns, a kill or power loss keeps both.

        Args:
            keys: from `vista.store.format.keys.user_keys`.
            records: from `vista.store.format.record.encode_records` with this writer's `spec`, one per key.
            cursor: users done after this batch, including those without a record.
            states: from `encode_states` with `state_spec`, one per key, if the generation keeps states.

        Returns:
            How many records were written: erased users are left out.

        Raises:
            StoreError: nothing was written (disk full, input/output error); the message has the remedy.
        """
        if len(keys) != len(records) or not self._cursor <= cursor <= self.manifest.total_users:
            raise ValueError(
                f"put_batch: got {len(keys)} keys, {len(records)} records and cursor {cursor}, after cursor "
                f"{self._cursor} of {self.manifest.total_users}"
            )
        written = self._files.put(self._tombstones, keys, records, states, {CURSOR_KEY: b"%d" % cursor})
        self._cursor, self.manifest = cursor, self._files.manifest
        return written

    def publish(self, *, wait_s: float = WAIT_S) -> Manifest:
        """Check every record, publish the generation, and remove all others except the one published before.

        Args:
            wait_s: seconds to wait for an erasure to end.

        Raises:
            StoreWriteError: the disk is full or fails; the generation stays, and the same run can resume.
            StoreLockedError, StoreBusyError: an erasure does not end, or erasures follow one another without a pause;
                the generation stays likewise.
            StoreError: the run is not finished (it can be resumed); or the count, a record or the file's structure is
                wrong (the generation is removed, and CURRENT does not change).
        """
        if self._cursor != self.manifest.total_users:
            raise StoreError(
                f"{self.path}: {self._cursor} of {self.manifest.total_users} users are done; run the refresh again to "
                "resume"
            )
        try:
            self._check_records(wait_s)
            self._files.mark_complete(self.manifest.created_at)
            self.manifest = self._files.manifest
            self._files.close()
            folder = generation_path(self.path, self.generation)
            environments = environments_of(self.path, self.generation)
            for path in environments:
                check_structure(path)
            for path in (*environments, folder, self.path):
                sync(path)
            publish_generation(self.path, self.generation, (self._published,), wait_s=wait_s)
            return self.manifest
        except (StoreWriteError, StoreLockedError, StoreBusyError):
            raise
        except StoreError as error:
            self._files.close()
            with suppress(OSError):  # The next writer removes it otherwise.
                remove_generation(self.path, self.generation)
            raise StoreError(
                f"{error}. The generation was removed, and CURRENT is unchanged; check the disk, then refresh again"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error

    def close(self) -> None:
        """Close the store; an unpublished generation stays for the next run of the same refresh."""
        self._files.close()
        self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check_records(self, wait_s: float) -> None:
        """Check every record, and their number; repeated if users are erased meanwhile, as erasures do not wait."""
        for _ in range(ATTEMPTS_BESIDE_ERASURES):
            num_erased = self._tombstones.count(wait_s)
            self._files.remove_erased(self._tombstones)
            tally = self._count_records()
            with erasure_lock(self.path, wait_s):
                if len(self._tombstones) == num_erased:
                    return self._compare(tally)
        with erasure_lock(self.path, wait_s):  # Users are erased one after the other without a pause.
            self._files.remove_erased(self._tombstones)
            self._compare(self._count_records())

    def _count_records(self) -> Tally:
        return tally_of(self._files.summary.read, self.spec)

    def _compare(self, tally: Tally) -> None:
        manifest, folder = self._files.read_manifest(), generation_path(self.path, self.generation)
        if (manifest.count, manifest.records_digest) != (tally.count, tally.records_digest):
            raise StoreError(
                f"{folder} holds {tally.count} records, but {manifest.count} records, or other ones, were written"
            )
        if self._files.state is not None:
            num_states = self._files.state.read(_num_entries)
            if num_states != manifest.count:
                raise StoreError(f"{folder} holds {num_states} states for {manifest.count} records")


def _published(root: Path) -> int:
    """The generation that CURRENT names, 0 for none; if CURRENT is damaged, the newest complete one."""
    if not os.path.lexists(root / CURRENT):
        return 0
    try:
        current = read_current(root)
        if environment_path(root, current).is_dir():
            return current
        raise missing_generation(root, current)
    except StoreError as error:
        logger.warning("%s; this refresh continues after the newest complete generation", error)
    return next((generation for generation in reversed(list_generations(root)) if _is_complete(root, generation)), 0)


def _is_complete(root: Path, generation: int) -> bool:
    try:
        shared = SharedEnvironment.acquire(environment_path(root, generation))
    except StoreError:
        return False
    try:
        return shared.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)
    except StoreError:
        return False
    finally:
        shared.release()


def _resume_or_create(root: Path, wanted: Manifest, published: int, permissions: Permissions) -> GenerationFiles:
    """The newest generation after the published one if it has the wanted identity; otherwise a new generation.

    All others after the published one are removed. A number that was ever complete is not used again.
    """
    for generation in reversed([number for number in list_generations(root) if number > published]):
        try:
            files = GenerationFiles.open(root, generation)
            try:
                files.require_states()
                files.read_cursor()
            except StoreError:
                files.close()
                raise
        except StoreError as error:
            logger.warning("%s; it is unfinished and starts over", error)
            remove_generation(root, generation)
            continue
        if files.manifest.identity() == wanted.identity():
            return files
        if files.complete:
            record_complete(root, generation)
        files.close()
        logger.warning(
            "%s: the unfinished gen-%d belongs to another run; it is removed, and a new one starts", root, generation
        )
        remove_generation(root, generation)
    return GenerationFiles.create(root, dataclasses.replace(wanted, generation=next_number(root)), permissions)


def _num_entries(transaction: lmdb.Transaction[memoryview]) -> int:
    return int(transaction.stat()["entries"])
