"""One generation of a store in a folder, open for reading, in LMDB environments that all threads of a process share.

LMDB allows one environment per file and process, and none across a fork. The registry below ensures the first. The
gate, which every transaction passes, ensures the second: forks, closes and map changes wait until no transaction is
open.
"""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import islice, pairwise, takewhile
from pathlib import Path
from typing import TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreClosedError, StoreError
from vista.progress_bar import progress_bar
from vista.store.folder_files import (
    MAP_SIZE_BYTES,
    REMEDY,
    WAIT_S,
    committed_size,
    complete_size,
    flocked,
    open_environment,
)
from vista.store.keys import ITEMS_KEY
from vista.store.layout import environment_path, read_current, state_path
from vista.store.manifest import Manifest, Tally, read_manifest
from vista.store.record import RecordSpec, check_keys, check_records
from vista.store.record_reading import RawRecords, present_records
from vista.store.state_record import FoundStates, StateSpec, decode_states

T = TypeVar("T")


class _Gate:
    """Admits many transactions or one exclusive section, each for milliseconds.

    Ctrl-C may interrupt any call, including those that leave a section. A thread that asks for the exclusive section is
    in no other section, so whatever such an interrupt left of that thread is discarded then.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._active: dict[object, int] = {}
        """Thread of each open transaction, by a unique token."""
        self._exclusive: int | None = None
        """Thread of the exclusive section."""

    @contextmanager
    def shared(self) -> Iterator[None]:
        token, own = object(), threading.get_ident()
        try:
            with self._condition:
                while self._exclusive not in (None, own):
                    self._condition.wait()
                self._active[token] = own
            yield
        finally:
            with self._condition:
                self._active.pop(token, None)
                self._condition.notify_all()

    def acquire(self) -> None:
        own = threading.get_ident()
        with self._condition:
            while self._exclusive not in (None, own):
                self._condition.wait()
            self._exclusive = own
            self._active = {token: thread for token, thread in self._active.items() if thread != own}
            try:
                while self._active:
                    self._condition.wait()
            except BaseException:
                self._exclusive = None
                self._condition.notify_all()
                raise

    def release(self) -> None:
        with self._condition:
            self._exclusive = None
            self._condition.notify_all()

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()


_gate = _Gate()
_registry: dict[tuple[int, int], SharedEnvironment] = {}
"""By device and inode of the data file, because a store may be removed and recreated while readers have it open."""


def _after_fork_in_child() -> None:
    global _gate
    _gate = _Gate()  # The parent held its gate during the fork, so no transaction was open.


def exclusive() -> AbstractContextManager[None]:
    """Section in which no transaction, fork or other such section of this process runs; keep it short."""
    return _gate.exclusive()


os.register_at_fork(
    before=lambda: _gate.acquire(), after_in_parent=lambda: _gate.release(), after_in_child=_after_fork_in_child
)


@contextmanager
def _folder_lock(path: Path, wait_s: float) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    try:
        with flocked(descriptor, path, "has been writing a batch", wait_s):
            yield
    finally:
        os.close(descriptor)


class SharedEnvironment:
    """Reference-counted environment of one folder, shared by all readers of this process and its writer, if any."""

    def __init__(self, path: Path, writable: bool, map_size_bytes: int) -> None:
        self._path = path
        self._references = 0
        self._pid = os.getpid()
        self._writable = writable
        self._environment: lmdb.Environment | None = open_environment(
            path, readonly=not writable, map_size_bytes=map_size_bytes
        )
        self._identity = _identity(path)

    @classmethod
    def acquire(cls, path: Path, *, writable: bool = False, map_size_bytes: int = MAP_SIZE_BYTES) -> SharedEnvironment:
        """Open the folder's environment, or share the one that is open already.

        Args:
            path: its folder.
            writable: allow `write`. An environment that readers have open is reopened for it.
            map_size_bytes: address space to reserve, if it is opened here.

        Raises:
            StoreError: see `open_environment`.
        """
        with _gate.exclusive():
            shared = _registry.get(_identity(path))
            if shared is None:
                shared = cls(path, writable, map_size_bytes)
                _registry[shared._identity] = shared
            elif writable and not (shared._writable and not shared.inherited):
                shared._close()
                try:
                    shared._environment = open_environment(path, readonly=False)
                    shared._writable = True
                except StoreError:  # Readers keep what they had.
                    shared._environment = open_environment(path, readonly=True)
                    shared._pid = os.getpid()
                    raise
                shared._pid = os.getpid()
            shared._references += 1
            return shared

    def retain(self) -> None:
        """Add a reference. Raises StoreClosedError if the last reference was released meanwhile."""
        with _gate.exclusive():
            if self._references == 0:
                raise StoreClosedError(f"{self._path} is closed; open the store again")
            self._references += 1

    def release(self) -> None:
        """Release a reference; the last one closes the environment once no transaction is open."""
        with _gate.exclusive():
            self._references -= 1
            if self._references == 0:
                _registry.pop(self._identity, None)
                self._close()

    def __enter__(self) -> SharedEnvironment:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def is_at(self, path: Path) -> bool:
        """Whether the data file in a folder is the one that is open here."""
        return _identity(path) == self._identity

    def read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        """Call a short function inside a read transaction; values are views that it must copy. Raises StoreError if the
        environment cannot be read; the message has the remedy."""
        if self.inherited:
            self.reopen()
        while True:
            try:
                with _gate.shared(), self._open().begin(buffers=True) as transaction:
                    return function(transaction)
            except lmdb.MapResizedError:
                # Another process grew the map; this happens only if the address space was too small for the full map.
                with _gate.exclusive():
                    self._open().set_mapsize(0)
            except lmdb.ReadersFullError as error:
                raise StoreError(
                    f"{self._path}: all {self._open().max_readers()} reader slots are taken, one per reading thread; "
                    "run fewer readers, or give some of them a copy of the store (`vista store copy`)"
                ) from error
            except lmdb.Error as error:
                raise StoreError(f"{self._path}: {error}; {REMEDY}") from error

    def write(self, function: Callable[[lmdb.Transaction[memoryview]], T], wait_s: float = WAIT_S) -> T:
        """Call a short function inside a durable write transaction; an exception undoes all of it.

        Raises:
            lmdb.Error: nothing was written (disk full, input/output error).
            StoreLockedError: another process, such as a stopped one, keeps a transaction open for `wait_s` seconds;
                nothing was written.
            OSError: it was written, but the file could not be extended to its size (`complete_size`).
            StoreError: the environment was not acquired for writing, or was acquired before a fork.
        """
        if not self._writable or self.inherited:
            raise StoreError(f"{self._path} was not opened for writing by this process; open another writer")
        # LMDB waits for another writer without a limit, and would block the gate for this whole process.
        with _folder_lock(self._path, wait_s), _gate.shared():
            environment = self._open()
            environment.reader_check()
            with environment.begin(write=True, buffers=True) as transaction:
                result = function(transaction)
            try:
                size, expected = committed_size(self._path / "data.mdb")
            except StoreError:
                if self._path.exists():
                    raise
                return result  # The generation was removed meanwhile.
            if size < expected:
                with environment.begin(write=True):  # keeps other writers out
                    complete_size(self._path)
            return result

    def live_bytes(self) -> int:
        """Bytes of the pages in use."""
        with _gate.shared():
            pages = self._open().stat()
        live: int = pages["psize"] * (pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])
        return live

    def _open(self) -> lmdb.Environment:
        if self._environment is None:
            raise StoreClosedError(f"{self._path} is closed; open the store again")
        return self._environment

    @property
    def inherited(self) -> bool:
        """Whether the handle is the parent process's, so that this process must open its own."""
        return self._pid != os.getpid()

    def reopen(self) -> None:
        """Open a handle of this process after a fork. Raises StoreError as `open_environment` does; the generation may
        have been removed since the fork."""
        with _gate.exclusive():
            if self.inherited:
                self._close()  # LMDB refuses a second handle while the inherited one is open.
                if not self.is_at(self._path):
                    raise StoreError(f"{self._path} was removed after the parent process opened it; {REMEDY}")
                self._environment = open_environment(self._path, readonly=True)
                self._pid, self._writable = os.getpid(), False

    def _close(self) -> None:
        if self._environment is not None:
            self._environment.close()
            self._environment = None


def _identity(path: Path) -> tuple[int, int]:
    try:
        status = (path / "data.mdb").stat()
    except OSError:
        return -1, -1
    return status.st_dev, status.st_ino


_WALK_USERS = 1024
_WALK_BYTES = 1 << 23

Batch = tuple[list[bytes], list[bytes]]
"""Keys and values, of equal length."""


def walk(
    environment: SharedEnvironment, take: Callable[[list[bytes], list[memoryview]], T], after: bytes = b"u"
) -> Iterator[tuple[list[bytes], T]]:
    """Visit all users beyond a key in ascending order, a batch per read transaction.

    Args:
        environment: of a generation's records, or its states.
        take: called with at most 1,024 keys and their values, which are valid only during the call; its result is
            yielded with the keys.
        after: a key.

    Raises:
        StoreError: the keys are out of order, so the file is damaged.
    """

    def read_batch(transaction: lmdb.Transaction[memoryview]) -> tuple[list[bytes], list[T]]:
        keys: list[bytes] = []
        values: list[memoryview] = []
        size, cursor = 0, transaction.cursor()
        if cursor.set_range(after + b"\0"):
            for view, value in cursor:
                key = bytes(view)
                if not key.startswith(b"u"):
                    break
                keys.append(key)
                values.append(value)
                size += len(value)
                if size >= _WALK_BYTES or len(keys) == _WALK_USERS:
                    break
        taken = [take(keys, values)] if keys else []
        if any(key <= before for before, key in pairwise([after, *keys])):
            raise StoreError("the keys of the store are out of order, so its file is damaged; refresh the store again")
        return keys, taken

    while True:
        keys, taken = environment.read(read_batch)
        if not keys:
            return
        after = keys[-1]
        yield keys, taken[0]


def copied(keys: list[bytes], values: list[memoryview]) -> list[bytes]:
    """For `walk`: copies of the values, which stay valid."""
    return list(map(bytes, values))


_READ_RECORDS = 1024
"""Most records per read transaction, so that transactions stay short for any batch size."""


@dataclass(frozen=True, slots=True)
class FolderGeneration:
    """A complete generation in a folder, open for reading until `release`, which leaving it as a context calls."""

    root: Path
    """Folder of the store."""
    environment: SharedEnvironment
    manifest: Manifest
    """As it was when the generation was opened."""
    spec: RecordSpec
    """What each record holds."""

    @classmethod
    def open(cls, root: Path, number: int, key: bytes | None) -> FolderGeneration:
        """Open an existing generation; errors as of `Folder.open`."""
        path = environment_path(root, number)
        environment = SharedEnvironment.acquire(path)
        try:
            manifest = environment.read(lambda transaction: read_manifest(transaction, path))
            if manifest.generation != number:
                raise StoreError(f"{path}: holds the files of gen-{manifest.generation}, not of gen-{number}; {REMEDY}")
            return cls(root, environment, manifest, manifest.spec(key))
        except BaseException:
            environment.release()
            raise

    def read(self, keys: list[bytes]) -> list[tuple[NDArray[np.int64], RawRecords]]:
        """Positions of the keys that have a record, ascending, and the records, in a part per transaction. Raises
        StoreClosedError if the generation was closed."""
        return [self._read_part(keys, first) for first in range(0, max(len(keys), 1), _READ_RECORDS)]

    def key_batches(self) -> Iterator[list[bytes]]:
        """Keys of all users in ascending order, checked, each batch from a short transaction."""
        self.environment.retain()
        with self.environment:
            for keys, _ in walk(self.environment, check_keys):
                yield keys

    def states(self, keys: Sequence[bytes]) -> FoundStates | None:
        """The stored states; they are open only during the call, so that scorers never map them."""
        spec = self.manifest.state_spec()
        if spec is None:
            return None
        with SharedEnvironment.acquire(state_path(self.root, self.manifest.generation)) as environment:
            return read_states(environment, keys, spec)

    def is_same(self, other: object) -> bool:
        """Whether both have the same files open, and are not only generations of one number."""
        return isinstance(other, FolderGeneration) and other.environment is self.environment

    def is_published(self) -> bool:
        """Whether CURRENT names this generation, and its folder still has these files."""
        number = self.manifest.generation
        return read_current(self.root) == number and self.environment.is_at(environment_path(self.root, number))

    def reread(self) -> FolderGeneration:
        """The same generation with the manifest as an incremental refresh has left it."""
        manifest = self.environment.read(lambda transaction: read_manifest(transaction, self.root))
        return dataclasses.replace(self, manifest=manifest)

    def reopen(self) -> None:
        """Open the files again in a forked process. Raises StoreError if the generation was removed meanwhile."""
        if self.environment.inherited:
            self.environment.reopen()

    def release(self) -> None:
        """Release the files, which the last reader closes."""
        self.environment.release()

    def __enter__(self) -> FolderGeneration:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def value(self, key: bytes) -> bytes | None:
        """What is stored under a key, such as a user's unchecked record; None without it."""

        def copy(transaction: lmdb.Transaction[memoryview]) -> bytes | None:
            value = transaction.get(key)
            return None if value is None else bytes(value)

        return self.environment.read(copy)

    def items(self) -> bytes | None:
        """The unchecked values of items; None without any."""
        return self.value(ITEMS_KEY)

    def raw_batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """Keys beyond `after` and their unchecked values, ascending; each batch in a short transaction."""
        with progress_bar(total=self.manifest.count, desc="read records", unit="user", leave=False) as bar:
            for keys, records in walk(self.environment, copied, after):
                yield keys, records
                bar.update(len(keys))

    def batches(self, after: bytes = b"u") -> Iterator[Batch]:
        """As `raw_batches`, with every record checked. Raises RecordError if a record is corrupt; the message names the
        first one's user."""
        for keys, records in self.raw_batches(after):
            check_records(records, keys, self.spec)
            yield keys, records

    def state_batches(self) -> Iterator[Batch]:
        """Keys and states, ascending, with every state checked; nothing if the generation keeps no states. Raises
        RecordError if a state is corrupt; the message names the first one's user."""
        spec, folder = self.manifest.state_spec(), state_path(self.root, self.manifest.generation)
        if spec is None or not folder.is_dir():
            return
        with (
            SharedEnvironment.acquire(folder) as environment,
            progress_bar(total=self.manifest.count, desc="read states", unit="user", leave=False) as bar,
        ):
            for keys, states in walk(environment, copied):
                decode_states(states, keys, spec)
                yield keys, states
                bar.update(len(keys))

    def other_keys(self) -> list[bytes]:
        """The first keys that are not user keys, in the order of the file."""
        return self.environment.read(_other_keys)

    def tally(self) -> Tally:
        """Check and count all records; errors as of `batches`."""
        return tally_of(self.environment, self.spec, num_users=self.manifest.count)

    def _read_part(self, all_keys: list[bytes], first: int) -> tuple[NDArray[np.int64], RawRecords]:
        keys = all_keys[first : first + _READ_RECORDS]

        def copy(transaction: lmdb.Transaction[memoryview]) -> tuple[NDArray[np.int64], RawRecords]:
            return present_records([transaction.get(key) for key in keys], keys, first, self.spec)

        return self.environment.read(copy)


def read_states(environment: SharedEnvironment, keys: Sequence[bytes], spec: StateSpec) -> FoundStates:
    """Rows of the keys that have a state, and these states, read in one transaction. Raises RecordError if a state is
    damaged; the message names the user."""

    def read(transaction: lmdb.Transaction[memoryview]) -> FoundStates:
        values = [transaction.get(key) for key in keys]
        rows = [row for row, value in enumerate(values) if value is not None]
        present = [value for value in values if value is not None]
        return np.array(rows, np.int64), decode_states(present, [keys[row] for row in rows], spec)

    return environment.read(read)


def tally_of(environment: SharedEnvironment, spec: RecordSpec, *, num_users: int | None = None) -> Tally:
    """Check and count all records of an environment.

    Args:
        environment: of a generation's records.
        spec: what they hold.
        num_users: how many there should be, for the progress.

    Raises:
        RecordError: a record is corrupt; the message names the first one's user.
    """
    tally = Tally()

    def add(keys: list[bytes], records: list[memoryview]) -> None:
        check_records(records, keys, spec)
        tally.add(keys, records)

    with progress_bar(total=num_users, desc="check records", unit="user", leave=False) as bar:
        for keys, _ in walk(environment, add):
            bar.update(len(keys))
    return tally


def _other_keys(transaction: lmdb.Transaction[memoryview]) -> list[bytes]:
    cursor = transaction.cursor()
    before = list(takewhile(lambda key: key < b"u", map(bytes, islice(cursor.iternext(values=False), 1000))))
    beyond = cursor.set_range(b"v")
    return before + (list(map(bytes, islice(cursor.iternext(values=False), 1000))) if beyond else [])
