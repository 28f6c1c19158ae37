"""LMDB environments, opened the one way that is safe (docs/reference/file-formats.md, "LMDB environment").

One environment a file and process: LMDB forbids a second one, and forbids use after fork. Hence the registry below, and
the gate, which every read transaction passes: a fork, a close and a map change wait until no transaction is open.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import lmdb

from vista.errors import StoreError
from vista.store.lmdb.data_file import MAX_READERS, REMEDY, committed_size, complete_size, open_environment
from vista.store.lmdb.flock import waited_for

T = TypeVar("T")


class _Gate:
    """Many transactions or one exclusive section; held for milliseconds.

    Ctrl-C may strike at any call, those that leave a section too. What a thread has left behind so counts no more when
    that thread comes for the exclusive section: it is in no other then.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._active: dict[object, int] = {}
        """Thread of each transaction, by a token of its own."""
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


class ClosedError(StoreError):
    """The environment was closed by another thread, which has moved on to another generation or closed the store."""


_gate = _Gate()
_registry: dict[tuple[int, int], SharedEnvironment] = {}
"""By device and inode of the data file: a store may be removed and made anew under readers."""


def _after_fork_in_child() -> None:
    global _gate
    _gate = _Gate()  # The parent's held it for the fork, so no transaction was open.


def exclusive() -> AbstractContextManager[None]:
    """Section in which no transaction, no fork and no other such section of this process runs: keep it short."""
    return _gate.exclusive()


os.register_at_fork(
    before=lambda: _gate.acquire(), after_in_parent=lambda: _gate.release(), after_in_child=_after_fork_in_child
)


@contextmanager
def _folder_lock(path: Path) -> Iterator[None]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    try:
        with waited_for(descriptor, path, "has been writing a batch"):
            yield
    finally:
        os.close(descriptor)


class SharedEnvironment:
    """Environment of one folder, shared by all readers of this process, and by its writer if there is one; counted."""

    def __init__(self, path: Path, max_readers: int, writable: bool) -> None:
        self._path = path
        self._max_readers = max_readers
        self._references = 0
        self._pid = os.getpid()
        self._writable = writable
        self._environment: lmdb.Environment | None = open_environment(
            path, readonly=not writable, max_readers=max_readers
        )
        self._identity = _identity(path)

    @classmethod
    def acquire(cls, path: Path, max_readers: int = MAX_READERS, *, writable: bool = False) -> SharedEnvironment:
        """Open the folder's environment, or share the one that is open.

        Args:
            path: its folder.
            max_readers: slots of the reader table, for its first opener.
            writable: for `write`. An environment that readers have open is reopened: LMDB allows one a process.

        Raises:
            StoreError: see `open_environment`.
        """
        with _gate.exclusive():
            shared = _registry.get(_identity(path))
            if shared is None:
                shared = cls(path, max_readers, writable)
                _registry[shared._identity] = shared
            elif writable and not (shared._writable and not shared.inherited):
                shared._close()
                try:
                    shared._environment = open_environment(path, readonly=False, max_readers=max_readers)
                    shared._writable = True
                except StoreError:  # Readers keep what they had.
                    shared._environment = open_environment(path, readonly=True, max_readers=max_readers)
                    shared._pid = os.getpid()
                    raise
                shared._pid = os.getpid()
            shared._references += 1
            return shared

    def retain(self) -> None:
        """Count one more reference.

        Raises:
            ClosedError: the last one was given back meanwhile.
        """
        with _gate.exclusive():
            if self._references == 0:
                raise ClosedError(f"{self._path} is closed; open the store again")
            self._references += 1

    def release(self) -> None:
        """Give the reference back; the last one closes the environment, after its last transaction."""
        with _gate.exclusive():
            self._references -= 1
            if self._references == 0:
                _registry.pop(self._identity, None)
                self._close()

    def is_at(self, path: Path) -> bool:
        """Whether the folder's data file is the one that is open here."""
        return _identity(path) == self._identity

    def read(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        """Call a short function within one read transaction. Values are views that die with it: copy them inside.

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
                # Only where the address space was too small to reserve: another process let its map grow.
                with _gate.exclusive():
                    self._open().set_mapsize(0)
            except lmdb.ReadersFullError as error:
                raise StoreError(
                    f"{self._path}: all {self._open().max_readers()} reader slots are taken, one a thread that reads; "
                    "run fewer readers, or give some a copy of their own (`vista store copy`)"
                ) from error
            except lmdb.Error as error:
                raise StoreError(f"{self._path}: {error}; {REMEDY}") from error

    def write(self, function: Callable[[lmdb.Transaction[memoryview]], T]) -> T:
        """Call a short function within one durable write transaction; an exception undoes all of it.

        Raises:
            lmdb.Error: nothing was written (disk full, input/output error).
            StoreLockedError: another process stays within a transaction (stopped, say); nothing was written.
            OSError: it was written, but the file could not be given its size (`complete_size`).
            StoreError: it was not acquired for writing, or before a fork.
        """
        if not self._writable or self.inherited:
            raise StoreError(f"{self._path} was not opened for writing by this process; open another writer")
        # LMDB waits for another writer without an end, and within the gate everything else here would wait with it.
        with _folder_lock(self._path), _gate.shared():
            environment = self._open()
            environment.reader_check()
            with environment.begin(write=True, buffers=True) as transaction:
                done = function(transaction)
            try:
                found, expected = committed_size(self._path / "data.mdb")
            except StoreError:
                if self._path.exists():
                    raise
                return done  # The generation was removed meanwhile.
            if found < expected:
                with environment.begin(write=True):  # keeps other writers out
                    complete_size(self._path)
            return done

    def live_bytes(self) -> int:
        """Bytes of the pages that hold keys and values."""
        with _gate.shared():
            pages = self._open().stat()
        live: int = pages["psize"] * (pages["branch_pages"] + pages["leaf_pages"] + pages["overflow_pages"])
        return live

    def _open(self) -> lmdb.Environment:
        if self._environment is None:
            raise ClosedError(f"{self._path} is closed; open the store again")
        return self._environment

    @property
    def inherited(self) -> bool:
        """Whether the handle is the parent's, so that this process must open its own."""
        return self._pid != os.getpid()

    def reopen(self) -> None:
        """Open this process's own handle after a fork.

        Raises:
            StoreError: see `open_environment`; the generation may have been removed since.
        """
        with _gate.exclusive():
            if self.inherited:
                self._close()  # The inherited handle: with it open, LMDB refuses another.
                if not self.is_at(self._path):
                    raise StoreError(f"{self._path} was removed since this process's parent opened it; {REMEDY}")
                self._environment = open_environment(self._path, readonly=True, max_readers=self._max_readers)
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
