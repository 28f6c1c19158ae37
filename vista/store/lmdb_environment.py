"""LMDB environments shared by all threads of a process (docs/reference/file-formats.md, "LMDB environment").

LMDB allows one environment per file and process, and none across a fork. The registry below ensures the first. The
gate, which every transaction passes, ensures the second: forks, closes and map changes wait until no transaction is
open.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import lmdb
import lmdb.verify

from vista.errors import StoreBusyError, StoreClosedError, StoreError, StoreLockedError
from vista.files import open_file
from vista.store.layout import PRIVATE, permissions_of, set_mode

MAP_SIZE_BYTES = 1 << 40
"""Reserved address space, which takes neither memory nor disk; large enough that the map never grows under readers."""
MAX_READERS = 1024
"""Slots of the reader table, one per reading thread of all processes."""
ATTEMPTS = 3
"""How often a whole file is checked again if another process writes it during the check."""

_SMALLEST_MAP_BYTES = 1 << 28
_READER_BYTES = 64
_READER_TABLE_HEAD_BYTES = 128
_PAGE_HEADER_BYTES = 16
_META = struct.Struct("=II16xI92xQQ")  # magic, version, page size, last page, transaction; in the host's byte order
_META_MAGIC = 0xBEEFC0DE
_META_VERSION = 1

logger = logging.getLogger(__name__)

REMEDY = "refresh the store again, or publish the previous generation (`vista store rollback`)"


def open_environment(path: Path, *, readonly: bool, map_size_bytes: int = MAP_SIZE_BYTES) -> lmdb.Environment:
    """Open the environment in a folder; for writing, create it if needed.

    It is always synchronous, with locks and without writemap, in the format of LMDB 0.9. If the address space is
    limited (ulimit -v), a smaller map is reserved and its size is logged.

    Raises:
        StoreError: the environment is missing, truncated, not of LMDB or not accessible, or there is no room for the
            reader table or in the address space; the message has the remedy.
    """
    for name in ("data.mdb", "lock.mdb"):
        _require_regular(path / name)
    if readonly or (path / "data.mdb").exists():
        check_data_file(path / "data.mdb")
    permissions = permissions_of(path)
    made = [(path / name, mode) for name, mode in (("data.mdb", permissions.file), ("lock.mdb", permissions.lock))]
    made = [(file, mode) for file, mode in made if not file.exists()]
    _make_reader_table(path / "lock.mdb")
    size = map_size_bytes
    while True:
        try:
            environment = lmdb.open(
                str(path),
                map_size=size,
                readonly=readonly,
                create=not readonly,
                mode=PRIVATE.file,
                max_readers=MAX_READERS,
                lib_version=0,
            )
            break
        except lmdb.MemoryError as error:
            if size <= _SMALLEST_MAP_BYTES:
                raise StoreError(
                    f"{path}: not enough address space to map {size} bytes; raise the limit (ulimit -v unlimited)"
                ) from error
            size >>= 2
        except lmdb.Error as error:
            raise StoreError(f"{path}: {error}. Readers also need write access to lock.mdb; {REMEDY}") from error
        except OSError as error:  # its folder was removed, as that of an old generation is after a new one is published
            raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    for file, mode in made:  # LMDB applies the umask to its mode, and a shared lock file needs another mode.
        if file.exists():  # On a read-only file system LMDB works without lock.mdb.
            set_mode(file, mode)
    if size < map_size_bytes:
        logger.warning(
            "%s: the address space is limited (ulimit -v); reserved %d bytes instead of %d", path, size, map_size_bytes
        )
    return environment


def _require_regular(path: Path) -> None:
    """Refuse a named pipe, for which LMDB would wait without end, and a link, which may lead out of the store.

    Raises:
        StoreError: the path exists and is not a regular file.
    """
    with suppress(OSError):  # It is missing, or LMDB meets the same error and reports it.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreError(f"{path} is not a regular file; {REMEDY}")


def _make_reader_table(path: Path) -> None:
    """Make lock.mdb with all its blocks, unless it exists.

    LMDB would make a sparse file and write to it through a map, which kills the process (SIGBUS) if the disk is full.

    Raises:
        StoreError: the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        if path.exists():
            return
        with open(partial, "xb", opener=lambda name, flags: os.open(name, flags, PRIVATE.file)) as file:
            file.write(bytes(_READER_BYTES * MAX_READERS + _READER_TABLE_HEAD_BYTES))
        with suppress(FileExistsError):  # Another process was first.
            os.link(partial, path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StoreError(
                f"{path}: {error.strerror}; readers need this table of {_READER_BYTES * MAX_READERS} bytes, so "
                "free some space and open the store again"
            ) from error
        logger.debug("%s: %s", path, error)  # LMDB meets the same error and reports it.
    finally:
        with suppress(OSError):
            partial.unlink()


def check_data_file(path: Path) -> None:
    """Refuse a truncated data file: LMDB maps as many pages as the meta page promises, and would crash on it.

    A file that only lacks pages at the end that nothing refers to is not truncated (`complete_size`).

    Raises:
        StoreError: missing, truncated, or not of LMDB; the message has the sizes and the remedy.
    """
    size, expected = committed_size(path)
    if size < expected and _structural_problems(path.parent):
        raise StoreError(f"{path} is truncated: it has {size} bytes, but its pages need {expected}; {REMEDY}")


def committed_size(path: Path) -> tuple[int, int]:
    """Size of a data file, and the size according to its last committed transaction, in bytes.

    Raises:
        StoreError: missing, or not of LMDB.
    """
    size, expected, _ = _committed(path)
    return size, expected


def _committed(path: Path) -> tuple[int, int, int]:
    """As `committed_size`, and the number of that transaction."""
    try:
        with open(open_file(path, follow=False), "rb") as file:
            metas = [_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size))]
            if metas[0] is not None:
                file.seek(metas[0][0])
                metas.append(_read_meta(file.read(_PAGE_HEADER_BYTES + _META.size)))
            size = os.fstat(file.fileno()).st_size  # last, because a writer grows the file before it commits
    except OSError as error:
        raise StoreError(f"{path}: {error.strerror}; {REMEDY}") from error
    valid = [meta for meta in metas if meta is not None]
    if len(valid) < 2:
        raise StoreError(f"{path} is not an LMDB 0.9 data file ({size} bytes); {REMEDY}")
    page_bytes, last_page, transaction = max(valid, key=lambda meta: meta[2])
    return size, (last_page + 1) * page_bytes, transaction


def complete_size(folder: Path) -> None:
    """Extend an environment's file to the size in its meta page, so that readers can recognize a truncated file.

    LMDB does not write pages at the end that a transaction allocated and freed. Nobody else may write at the same time.
    """
    path = folder / "data.mdb"
    size, expected = committed_size(path)
    if size < expected:
        with path.open("r+b") as file:
            file.truncate(expected)
            os.fsync(file.fileno())


def check_structure(folder: Path) -> None:
    """Check every page of an environment's file without opening it with LMDB, which may crash on a damaged file.

    If another process writes the file during a failed check, the check is repeated.

    Raises:
        StoreError: missing, truncated, damaged, or not of LMDB.
        StoreBusyError: the file was written during every check.
    """
    for _ in range(ATTEMPTS):
        transaction = last_transaction(folder)
        try:
            check_data_file(folder / "data.mdb")
            problems = _structural_problems(folder)
            if not problems:
                return
            raise StoreError(f"{folder}: the structure of the database is damaged: {problems[0]}; {REMEDY}")
        except StoreError:
            if last_transaction(folder) == transaction:
                raise
    raise StoreBusyError(f"{folder} is being written; try again when the refresh or erasure has ended")


def last_transaction(folder: Path) -> int:
    """Number of an environment's last committed transaction; -1 if its file is missing or not of LMDB."""
    try:
        return _committed(folder / "data.mdb")[2]
    except StoreError:
        return -1


def _structural_problems(folder: Path) -> list[str]:
    try:
        return list(lmdb.verify.verify(str(folder)))  # type: ignore[no-untyped-call]
    except lmdb.verify.VerifyError as error:
        return [str(error)]


def _read_meta(block: bytes) -> tuple[int, int, int] | None:
    if len(block) < _PAGE_HEADER_BYTES + _META.size:
        return None
    magic, version, page_bytes, last_page, transaction = _META.unpack_from(block, _PAGE_HEADER_BYTES)
    if magic != _META_MAGIC or version != _META_VERSION or not 512 <= page_bytes <= 65536:
        return None
    return page_bytes, last_page, transaction


WAIT_S = 30.0
"""How long erasures, publications and transactions wait for one another by default."""
_POLL_S = 0.002


@contextmanager
def flocked(descriptor: int, path: Path, activity: str, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock (flock) of an open file or folder, which the system releases when the process dies.

    Args:
        descriptor: of `path`.
        activity: what a process that holds the lock has been doing, for the message.
        wait_s: seconds to wait for it.

    Raises:
        StoreLockedError: another process kept the lock for that long; the message has its process id if known.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holders = ", ".join(map(str, sorted(lock_holders(path) or ())))
                raise StoreLockedError(
                    f"{path}: {f'process {holders}' if holders else 'another process'} {activity} for more than "
                    f"{wait_s:g} s; wait for it or kill it (its work is kept), then rerun the command"
                ) from error
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # Closing is not enough: a child forked meanwhile has it open too.


def lock_holders(path: Path) -> set[int] | None:
    """Processes on this machine that hold a lock on a file; None if the system does not tell."""
    try:
        status = path.stat()
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return {int(words[4]) for words in lines if len(words) > 5 and words[5] == device}


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
