"""LMDB environments shared by all threads of a process (docs/reference/file-formats.md, "LMDB environment").

LMDB allows one environment per file and process, and none across a fork. The registry below ensures the first. The
gate, which every transaction passes, ensures the second: forks, closes and map changes wait until no transaction is
open.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

from vista.errors import StoreClosedError, StoreError
from vista.store.lmdb.data_file import MAP_SIZE_BYTES, REMEDY, committed_size, complete_size, open_environment
from vista.store.lmdb.flock import WAIT_S, flocked

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
        """Add a reference.

        Raises:
            StoreClosedError: the last reference was released meanwhile.
        """
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

    def is_at(self, path: Path) -> bool:
        """Whether the data file in a folder is the one that is open here."""
        return _identity(path) == self._identity

    def read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        """Call a short function inside a read transaction; values are views that it must copy.

        Raises:
            StoreError: the environment cannot be read; the message has the remedy.
        """
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
        """Open a handle of this process after a fork.

        Raises:
            StoreError: see `open_environment`; the generation may have been removed since the fork.
        """
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
