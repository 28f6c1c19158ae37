"""What holds a store, through which readers, writers, and operators go: a folder (LMDB), or a server (`server.py`)."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import lmdb
from numpy.typing import NDArray

from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreWriteError, UnfinishedError
from vista.files import sync
from vista.store.folder_files import (
    ATTEMPTS,
    ATTEMPTS_BESIDE_ERASURES,
    WAIT_S,
    Tombstones,
    WriterLock,
    cannot_write,
    check_structure,
    erasure_lock,
    last_transaction,
    lock_store,
    without_erased,
)
from vista.store.folder_generation import FolderGeneration, SharedEnvironment, tally_of
from vista.store.folder_writer import FolderBuilder, FolderWriter
from vista.store.keys import COMPLETE_KEY, MANIFEST_KEY
from vista.store.layout import (
    CURRENT,
    PARTIAL_PREFIX,
    PRIVATE,
    TOMBSTONES,
    Permissions,
    StoreUrl,
    entries_like_generations,
    environment_path,
    environments_of,
    generation_path,
    last_complete,
    list_generations,
    missing_generation,
    next_number,
    published_or_none,
    read_current,
    record_complete,
    remove_generation,
    remove_store_leftovers,
    store_address,
    write_current,
)
from vista.store.manifest import Manifest, Tally, read_cursor, read_manifest
from vista.store.record import RecordSpec

if TYPE_CHECKING:
    from vista.store.server import Server, ServerBuilder
    from vista.store.server_generation import ServerGeneration, ServerWriter

    StoreBackend: TypeAlias = "Folder | Server"
    """A store and its generations, which are written only between `lock` and `release`, or within `locked`."""
    Generation = FolderGeneration | ServerGeneration
    """A complete generation, open for reading. `StoreReader` holds one and changes to the next."""
    GenerationWriter = FolderWriter | ServerWriter
    """A generation, open for writing; every write is atomic and updates `manifest`."""
    GenerationBuilder = FolderBuilder | ServerBuilder
    """A generation that is filled with existing records."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


def open_backend(store: str | Path | StoreUrl) -> StoreBackend:
    """The store in a folder, whether it exists or not, or on a server. Raises MissingDependencyError if the store is on
    a server, and the extra `redis` is not installed, and StoreError if the server cannot be used."""
    address = store_address(store)
    if isinstance(address, StoreUrl):
        from vista.store.server import Server

        return Server(address)
    return Folder(address)


def settled(store: StoreBackend, number: int, read: Callable[[], T]) -> T:
    """Result of a function that reads a whole generation; called again if it failed while the generation was written.

    Raises:
        StoreBusyError: it failed three times, and the generation was written each time.
        StoreError: it failed, and nobody wrote the generation meanwhile.
    """
    for _ in range(ATTEMPTS):
        before = store.version(number)
        try:
            return read()
        except StoreError as error:
            if store.version(number) == before:
                raise
            last = error
    raise StoreBusyError(
        f"{store.address}: gen-{number} is being written by a refresh or an erasure; try again when that has ended"
    ) from last


class Folder:
    """The store in a folder, whether it exists or not."""

    def __init__(self, address: Path) -> None:
        self.address = address
        self.erased_users = Tombstones(address)
        self._lock: WriterLock | None = None
        self._permissions = PRIVATE
        self._published = 0
        self._writer: FolderWriter | None = None

    def current(self) -> int:
        """Number of the published generation. Raises StoreError if nothing is published, or CURRENT is damaged."""
        return read_current(self.address)

    def published_or_none(self) -> int | None:
        """Like `current`, but None if nothing is published or CURRENT is damaged."""
        return published_or_none(self.address)

    def last_complete(self) -> int:
        """The highest generation number that was ever complete; 0 if there was none. Raises StoreWriteError if LAST
        cannot be read, or is damaged."""
        return last_complete(self.address)

    def numbers(self) -> list[int]:
        """Numbers of all generations; none if the folder does not exist."""
        return list_generations(self.address) if self.address.is_dir() else []

    def manifest(self, number: int) -> Manifest:
        """Manifest of a complete generation; no key is needed."""
        self._require(number)
        with SharedEnvironment.acquire(environment_path(self.address, number)) as environment:
            return environment.read(lambda transaction: read_manifest(transaction, self.address))

    def open(self, number: int, key: bytes | None) -> FolderGeneration:
        """Open a complete generation. Raises StoreError if it is missing, unfinished, damaged, or of another key."""
        self._require(number)
        return FolderGeneration.open(self.address, number, key)

    def close(self) -> None:
        """Nothing to do: each generation closes its own files."""

    def check_structure(self, number: int) -> None:
        """Check the files of a generation before LMDB opens them."""
        for environment in environments_of(self.address, number):
            check_structure(environment)

    def version(self, number: int) -> list[int]:
        """The last transactions of the generation's files, which every write changes."""
        return [last_transaction(path) for path in environments_of(self.address, number)]

    def progress(self, number: int) -> tuple[Manifest, bool, int]:
        """Manifest, whether the generation is complete, and the number of records or of users done."""
        path = environment_path(self.address, number)
        with SharedEnvironment.acquire(path) as environment:
            return environment.read(lambda transaction: _progress(transaction, path))

    def size_bytes(self, number: int) -> int:
        """Size of the generation's files."""
        files = generation_path(self.address, number).rglob("*")
        return sum(file.stat().st_size for file in files if file.is_file())

    def problems(self) -> list[str]:
        """What is wrong with LAST, the tombstones, and the names in the folder."""
        problems = []
        try:
            self.last_complete()
        except StoreError as error:
            problems.append(str(error))
        if os.access(self.address / TOMBSTONES, os.R_OK):  # Another account cannot read them.
            try:
                len(self.erased_users)
            except StoreError as error:
                problems.append(str(error))
        for name in entries_like_generations(self.address):
            problems.append(
                f"{self.address / name} is ignored, because it is not the folder of a generation; rename or remove it"
            )
        return problems

    def lock(self, permissions: Permissions | None = None) -> None:
        """Become the one writer; `permissions`, if given, are set on the folder, which is made if it does not exist.

        Raises:
            StoreLockedError: another writer holds the store.
            StoreError: it cannot be written, or without `permissions`, it does not exist.
        """
        if permissions is None and not self.numbers():
            self.current()  # raises, so that no lock file is made in a folder that is not a store
        self._lock = lock_store(self.address, permissions)
        self._permissions = permissions or PRIVATE

    def release(self) -> None:
        """Close the files and release the lock; an unpublished generation stays for the next run."""
        if self._writer is not None:
            self._writer.close()
        if self._lock is not None:
            self._lock.release()

    @contextmanager
    def locked(self, permissions: Permissions | None = None) -> Iterator[None]:
        """Context of the one writer, in which errors of the file system become StoreWriteErrors."""
        self.lock(permissions)
        try:
            yield
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.address, error) from error
        finally:
            self.release()

    def start(self, wanted: Manifest) -> FolderWriter:
        """Resume the newest unfinished generation if it has the wanted identity; otherwise start a new one."""
        try:
            remove_store_leftovers(self.address)
            self._published = _published(self.address)
            self._writer = _resume_or_create(self.address, wanted, self._published, self._permissions)
            return self._writer
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.address, error) from error

    def published(self) -> FolderWriter:
        """Open the published generation, to write it in place. Raises StoreError if it, or its states, are missing."""
        generation = read_current(self.address)
        try:
            remove_store_leftovers(self.address)
        except OSError as error:
            raise cannot_write(self.address, error) from error
        if not generation_path(self.address, generation).is_dir():
            raise missing_generation(self.address, generation)
        self._writer = FolderWriter.open(self.address, generation)
        self._writer.require_states()
        return self._writer

    def publish_written(self, spec: RecordSpec, wait_s: float) -> Manifest:
        """Check every record, publish the generation of `start`, and remove all others except the one published before.

        Raises:
            StoreWriteError: the disk is full or fails; the generation stays, and the same run can resume.
            StoreLockedError, StoreBusyError: an erasure does not end, or erasures follow one another without a pause;
                the generation stays likewise.
            StoreError: the count, a record or the file's structure is wrong; the generation is removed.
        """
        files = self._writer
        assert files is not None
        generation = files.manifest.generation
        try:
            self._check_records(files, spec, wait_s)
            files.mark_complete(files.manifest.created_at)
            files.close()
            environments = environments_of(self.address, generation)
            for path in environments:
                check_structure(path)
            for path in (*environments, generation_path(self.address, generation), self.address):
                sync(path)
            self.publish(generation, (self._published,), wait_s)
            return files.manifest
        except (StoreWriteError, StoreLockedError, StoreBusyError):
            raise
        except StoreError as error:
            files.close()
            with suppress(OSError):  # The next writer removes it otherwise.
                remove_generation(self.address, generation)
            raise StoreError(
                f"{error}. The generation was removed, and CURRENT is unchanged; check the disk, then refresh again"
            ) from error
        except (OSError, lmdb.Error) as error:
            raise cannot_write(self.address, error) from error

    def number_for(self, manifest: Manifest) -> int:
        """The manifest's number if it is above all that ever were complete; otherwise the next one."""
        return next_number(self.address, least=manifest.generation)

    def remove_leftovers(self, except_for: int = 0) -> None:
        """Remove temporary folders of killed processes, except for that of a copy."""
        remove_store_leftovers(self.address, except_for=f"{PARTIAL_PREFIX}gen-{except_for}")

    def builder(self, manifest: Manifest, key: bytes | None, *, resume: bool) -> FolderBuilder:
        """Make a generation in a temporary folder, or resume there."""
        return FolderBuilder(self.address, manifest, key, self._permissions, resume=resume)

    def publish(self, number: int, keep: Collection[int], wait_s: float = WAIT_S) -> None:
        """Publish a complete, verified generation, then remove all others except those in `keep`.

        Before that, it removes all erased users from the generation, including those of interrupted erasures. Erasures
        wait only while CURRENT is written.

        Raises:
            StoreLockedError: an erasure does not end within `wait_s` seconds; the generation stays unpublished.
        """
        root = self.address

        def remove_erased() -> None:
            with closing(FolderWriter.open(root, number)) as writer:
                writer.remove_erased()

        without_erased(root, remove_erased, lambda: write_current(root, number), wait_s)
        for other in self.numbers():
            if other not in (number, *keep):
                logger.info("%s: removing gen-%d", root, other)
                remove_generation(root, other)

    def erase(self, keys: Sequence[bytes], wait_s: float) -> int:
        """Erase users, with tombstones, without the writer's lock; returns how many had a published record.

        Args:
            keys: of the users.
            wait_s: seconds to wait for other erasures, publications, and batches of a writer.
        """
        if not self.numbers():
            raise StoreError(f"{self.address} is not a store; check the path")
        with erasure_lock(self.address, wait_s):
            self.erased_users.add(keys)
            return self._remove(lambda writer: writer.remove(keys), wait_s) or 0

    def erase_digests(self, digests: NDArray[Any], wait_s: float = WAIT_S) -> None:
        """As `erase`, for users of whom only the digests are known (`digests_of`): all keys are compared with them."""
        with erasure_lock(self.address, wait_s):
            self.erased_users.add_digests(digests)
            self._remove(FolderWriter.remove_erased, wait_s)

    def _remove(self, remove: Callable[[FolderWriter], T], wait_s: float) -> T | None:
        """Remove erased users from all generations; returns the result for the published one."""
        root, result = self.address, None
        published = self.published_or_none()
        # The published generation first, because that is the one readers see.
        for generation in sorted(self.numbers(), key=lambda number: number != published):
            try:
                writer = FolderWriter.open(root, generation, wait_s=wait_s)
            except StoreError:
                if generation == published:
                    raise
                # Still without a manifest, or damaged: its writer sees the tombstone, or starts over.
                logger.warning("%s: gen-%d cannot be opened; its writer will apply the erasure", root, generation)
                continue
            try:
                removed = remove(writer)
            except StoreError:
                if generation == published or environment_path(root, generation).exists():
                    raise
                continue  # It was removed by a publication that this erasure waited for.
            finally:
                writer.close()
            result = removed if generation == published else result
        return result

    def _require(self, number: int) -> None:
        """Raise StoreError if a generation does not exist."""
        root = self.address
        if environment_path(root, number).is_dir():
            return
        if published_or_none(root) == number:
            raise missing_generation(root, number)
        if not generation_path(root, number).is_dir():
            existing = ", ".join(f"gen-{other}" for other in self.numbers()) or "none"
            raise StoreError(f"{root} has no gen-{number}; name an existing generation: {existing}")

    def _check_records(self, files: FolderWriter, spec: RecordSpec, wait_s: float) -> None:
        """Check every record, and their number; repeated if users are erased meanwhile, as erasures do not wait."""
        for _ in range(ATTEMPTS_BESIDE_ERASURES):
            num_erased = self.erased_users.count(wait_s)
            files.remove_erased()
            tally = count_records(files, spec)
            with erasure_lock(self.address, wait_s):
                if len(self.erased_users) == num_erased:
                    return self._compare(files, tally)
        with erasure_lock(self.address, wait_s):  # Users are erased one after the other without a pause.
            files.remove_erased()
            self._compare(files, count_records(files, spec))

    def _compare(self, files: FolderWriter, tally: Tally) -> None:
        manifest = files.read_manifest()
        folder = generation_path(self.address, manifest.generation)
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


def _progress(transaction: lmdb.Transaction[memoryview], path: Path) -> tuple[Manifest, bool, int]:
    """Manifest, whether the generation is complete, and the number of records or of users done."""
    try:
        manifest = read_manifest(transaction, path)
        return manifest, True, manifest.count
    except UnfinishedError:
        value = transaction.get(MANIFEST_KEY)
        if value is None:
            raise
        manifest = Manifest.from_bytes(bytes(value), path)
        return manifest, False, read_cursor(transaction, manifest, path)


def count_records(files: FolderWriter, spec: RecordSpec) -> Tally:
    """Check and count all records of a generation."""
    return tally_of(files.summary, spec)


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
        with SharedEnvironment.acquire(environment_path(root, generation)) as environment:
            return environment.read(lambda transaction: transaction.get(COMPLETE_KEY) is not None)
    except StoreError:
        return False


def _resume_or_create(root: Path, wanted: Manifest, published: int, permissions: Permissions) -> FolderWriter:
    """The newest generation after the published one if it has the wanted identity; otherwise a new generation. All
    others after the published one are removed. A number that was ever complete is not used again."""
    for generation in reversed([number for number in list_generations(root) if number > published]):
        try:
            files = FolderWriter.open(root, generation)
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
    return FolderWriter.create(root, dataclasses.replace(wanted, generation=next_number(root)), permissions)


def _num_entries(transaction: lmdb.Transaction[memoryview]) -> int:
    return int(transaction.stat()["entries"])
