"""A store in a folder whose one writer is this process."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

import lmdb

from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreWriteError
from vista.files import sync
from vista.progress_bar import progress_bar
from vista.store.keys import COMPLETE_KEY, common_kind, kinds_of
from vista.store.layout import (
    CURRENT,
    PRIVATE,
    Permissions,
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
    write_current,
)
from vista.store.lmdb_environment import WAIT_S, ReadTransactions, SharedEnvironment, check_structure, walk
from vista.store.local_generation import GenerationFiles
from vista.store.manifest import Manifest
from vista.store.record import check_records, sum_of_checksums
from vista.store.record_spec import RecordSpec
from vista.store.tombstones import Tombstones, WriterLock, cannot_write, erasure_lock, lock_store

# Publishing a generation: readers that open or reload from now on get it.

ATTEMPTS_BESIDE_ERASURES = 3
"""How often work that an erasure has outdated is repeated; after that, erasures wait for it."""

logger = logging.getLogger(__name__)


def publish_generation(root: Path, generation: int, keep: Sequence[int], *, wait_s: float = WAIT_S) -> None:
    """Publish a complete, verified generation, then remove all others except those in `keep`.

    Before that, it removes all erased users from the generation, including those of interrupted erasures. Erasures wait
    only while CURRENT is written.

    Raises:
        StoreLockedError: an erasure does not end within `wait_s` seconds; the generation stays unpublished.
    """
    tombstones, num_erased = Tombstones(root), 0  # users that are removed from the generation already

    def remove_erased() -> None:
        with closing(GenerationFiles.open(root, generation)) as files:
            files.remove_erased(tombstones)

    for attempt in range(ATTEMPTS_BESIDE_ERASURES + 1):
        is_last = attempt == ATTEMPTS_BESIDE_ERASURES
        with erasure_lock(root, wait_s):
            if is_last:
                remove_erased()
            if len(tombstones) == num_erased or is_last:
                write_current(root, generation)
                break
            num_erased = len(tombstones)
        remove_erased()
    for number in list_generations(root):
        if number not in (generation, *keep):
            logger.info("%s: removing gen-%d", root, number)
            remove_generation(root, number)


# Counting records: the numbers in a manifest, computed from the records themselves.


@dataclass(slots=True)
class Tally:
    """What a manifest says about all records, accumulated batch by batch."""

    count: int = 0
    digest: int = 0
    user_kind: str | None = None
    """int, str, mixed, or None without records."""

    def add(self, keys: Sequence[bytes], records: Sequence[bytes | memoryview]) -> None:
        """Count a batch."""
        self.count += len(keys)
        self.digest = (self.digest + sum_of_checksums(records)) % (1 << 64)
        self.user_kind = common_kind([self.user_kind, *kinds_of(keys)])

    @property
    def records_digest(self) -> str:
        """Sum mod 2^64 of the checksums, in hex."""
        return f"{self.digest:016x}"


def tally_of(read: ReadTransactions, spec: RecordSpec, *, num_users: int | None = None) -> Tally:
    """Check and count all records of an environment.

    Args:
        read: of an environment.
        spec: what its records hold.
        num_users: how many there should be, for the progress.

    Raises:
        RecordError: a record is corrupt; the message names the first one's user.
    """
    tally = Tally()

    def add(keys: list[bytes], records: list[memoryview]) -> None:
        check_records(records, keys, spec)
        tally.add(keys, records)

    with progress_bar(total=num_users, desc="check records", unit="user", leave=False) as bar:
        for keys, _ in walk(read, add):
            bar.update(len(keys))
    return tally


class LockedFolder:
    """A store's folder, from `lock` to `release` (`vista.store.writer.WritableStore`)."""

    def __init__(self, root: Path, lock: WriterLock, permissions: Permissions | None) -> None:
        self.path = root
        self._lock = lock
        self._permissions = permissions
        self._published = 0
        self._files: GenerationFiles | None = None
        self.erased_users = Tombstones(root)

    @classmethod
    def lock(cls, root: Path, permissions: Permissions | None = None) -> LockedFolder:
        """Become the one writer; `permissions`, if given, are set on the folder, which is made if it does not exist.

        Raises:
            StoreLockedError: another writer holds the store; the message has its process id if known.
            StoreError: the path cannot be written, or it is not a store; the message has the remedy.
        """
        if permissions is None:
            read_current(root)  # first, so that no lock file is made in a folder that is not a store
        locked = cls(root, lock_store(root, permissions), permissions)
        try:
            remove_store_leftovers(root)
            return locked
        except BaseException as error:
            locked.release()
            if isinstance(error, OSError):
                raise cannot_write(root, error) from error
            raise

    def start(self, wanted: Manifest) -> GenerationFiles:
        """Resume the newest unfinished generation if it has the wanted identity; otherwise start a new one."""
        try:
            self._published = _published(self.path)
            self._files = _resume_or_create(self.path, wanted, self._published, self._permissions or PRIVATE)
            return self._files
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error

    def published(self) -> GenerationFiles:
        """Open the published generation, to write it in place.

        Raises:
            StoreError: it, or its states, are missing.
        """
        generation = read_current(self.path)
        if not generation_path(self.path, generation).is_dir():
            raise missing_generation(self.path, generation)
        self._files = GenerationFiles.open(self.path, generation)
        self._files.require_states()
        return self._files

    def publish(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record, publish the generation, and remove all others except the one published before.

        Raises:
            StoreWriteError: the disk is full or fails; the generation stays, and the same run can resume.
            StoreLockedError, StoreBusyError: an erasure does not end, or erasures follow one another without a pause;
                the generation stays likewise.
            StoreError: the count, a record or the file's structure is wrong; the generation is removed.
        """
        files = self._files
        assert files is not None
        generation = files.manifest.generation
        try:
            self._check_records(files, spec, wait_s)
            files.mark_complete(files.manifest.created_at)
            files.close()
            environments = environments_of(self.path, generation)
            for path in environments:
                check_structure(path)
            for path in (*environments, generation_path(self.path, generation), self.path):
                sync(path)
            publish_generation(self.path, generation, (self._published,), wait_s=wait_s)
            return files.manifest
        except (StoreWriteError, StoreLockedError, StoreBusyError):
            raise
        except StoreError as error:
            files.close()
            with suppress(OSError):  # The next writer removes it otherwise.
                remove_generation(self.path, generation)
            raise StoreError(
                f"{error}. The generation was removed, and CURRENT is unchanged; check the disk, then refresh again"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.path, error) from error

    def release(self) -> None:
        """Close the files and release the lock; an unpublished generation stays for the next run."""
        if self._files is not None:
            self._files.close()
        self._lock.release()

    def _check_records(self, files: GenerationFiles, spec: RecordSpec, wait_s: float) -> None:
        """Check every record, and their number; repeated if users are erased meanwhile, as erasures do not wait."""
        for _ in range(ATTEMPTS_BESIDE_ERASURES):
            num_erased = self.erased_users.count(wait_s)
            files.remove_erased(self.erased_users)
            tally = count_records(files, spec)
            with erasure_lock(self.path, wait_s):
                if len(self.erased_users) == num_erased:
                    return self._compare(files, tally)
        with erasure_lock(self.path, wait_s):  # Users are erased one after the other without a pause.
            files.remove_erased(self.erased_users)
            self._compare(files, count_records(files, spec))

    def _compare(self, files: GenerationFiles, tally: Tally) -> None:
        manifest = files.read_manifest()
        folder = generation_path(self.path, manifest.generation)
        if (manifest.count, manifest.records_digest) != (tally.count, tally.records_digest):
            raise StoreError(
                f"{folder} holds {tally.count} records, but {manifest.count} records, or other ones, were "
                "written; check the disk, then refresh the store again"
            )
        if files.state is not None:
            num_states = files.state.read(_num_entries)
            if num_states != manifest.count:
                raise StoreError(
                    f"{folder} holds {num_states} states for {manifest.count} records; check the disk, then refresh "
                    "the store again"
                )


def count_records(files: GenerationFiles, spec: RecordSpec) -> Tally:
    """Check and count all records of a generation."""
    return tally_of(files.summary.read, spec)


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
