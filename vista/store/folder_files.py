"""Files of a store's folder: LMDB data files, locks, and tombstones (docs/reference/file-formats.md).

All locks are flocks, which the system releases when their process dies. The writer's lock is held for as long as a
refresh takes, so a second writer is refused at once. The other locks are held briefly, so processes wait for them up to
a deadline.

The tombstones are a file with BLAKE2b-128 digests of the erased users' keys, not ids. It is replaced atomically. A
damaged file is an error wherever it is read: guessing which users it lists could bring one back.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import lmdb
import lmdb.verify
import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import StoreBusyError, StoreError, StoreLockedError, StoreWriteError
from vista.files import open_file, read_limited, remove_leftovers, replace_file, sync
from vista.store.layout import (
    ERASURE_LOCK,
    PRIVATE,
    TOMBSTONES,
    WRITER_LOCK,
    Permissions,
    open_private,
    permissions_of,
    prepare_root,
    set_mode,
    set_store_permissions,
)

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
    """Refuse a named pipe, for which LMDB would wait without end, and a link, which may lead out of the store."""
    with suppress(OSError):  # It is missing, or LMDB meets the same error and reports it.
        if not stat.S_ISREG(path.lstat().st_mode):
            raise StoreError(f"{path} is not a regular file; {REMEDY}")


def _make_reader_table(path: Path) -> None:
    """Make lock.mdb with all its blocks, unless it exists. LMDB would make a sparse file and write to it through a map,
    which kills the process (SIGBUS) if the disk is full."""
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
    """Size of a data file, and the size according to its last committed transaction, in bytes. Raises StoreError if
    missing, or not of LMDB."""
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
    """Extend an environment's file to the size in its meta page, so that readers can recognize a truncated file. LMDB
    does not write pages at the end that a transaction allocated and freed. Nobody else may write at the same time."""
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


_held: WeakSet[WriterLock] = WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)  # so that a worker does not keep the lock of its killed parent


class WriterLock:
    """The lock of the one writer of a store, released by the system when its process dies."""

    def __init__(self, root: Path) -> None:
        # Readers do not need the file, and whoever can open it can block writers.
        self._descriptor = open_private(root / WRITER_LOCK, os.O_RDWR)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            self.release()
            raise StoreLockedError(
                f"{root} is being written by {f'process {holder}' if holder else 'another process'}; wait for it, or "
                "kill it: its work is kept, and the next refresh resumes from there"
            ) from error
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def release(self) -> None:
        """Release the lock; releasing twice is allowed."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def lock_store(root: Path, permissions: Permissions | None = None) -> WriterLock:
    """Become the one writer of a store.

    Args:
        root: the store's folder.
        permissions: make the folder if it does not exist, and set these on everything in it; None changes nothing.

    Raises:
        StoreLockedError: another writer holds the store; the message has its process id if known.
        StoreWriteError: the path cannot be written, or does not exist.
    """
    try:
        if permissions is not None:
            prepare_root(root, permissions)
        lock = WriterLock(root)
    except OSError as error:
        raise cannot_write(root, error) from error
    try:
        sync(root)  # A writer that was killed may have replaced CURRENT without this.
        if permissions is not None:
            set_store_permissions(root, permissions)
    except OSError as error:
        lock.release()
        raise cannot_write(root, error) from error
    return lock


def cannot_write(root: Path, error: Exception) -> StoreWriteError:
    """The error for a failure of the file system, with a remedy."""
    return StoreWriteError(
        f"{root} cannot be written: {error}; check free space, the path, its permissions, and whether it is mounted "
        "read-only, then rerun the command: the published generation is unchanged, and a refresh resumes "
        "after the last batch that was written"
    )


@contextmanager
def erasure_lock(root: Path, wait_s: float = WAIT_S) -> Iterator[None]:
    """Context of an erasure or a publication; one at a time among all processes.

    Raises:
        StoreLockedError: another one did not end within `wait_s` seconds; the message has its process id if known.
        StoreWriteError: the file cannot be made.
    """
    path = root / ERASURE_LOCK
    try:
        descriptor = open_private(path, os.O_RDWR)
    except OSError as error:
        raise StoreWriteError(f"{path}: {error.strerror}; check the path, permissions and free space") from error
    try:
        with flocked(descriptor, path, "has been erasing users or publishing", wait_s):
            yield
    finally:
        os.close(descriptor)


ATTEMPTS_BESIDE_ERASURES = 3
"""How often work that an erasure has outdated is repeated; after that, erasures wait for it."""


def without_erased(
    root: Path, remove_erased: Callable[[], None], name: Callable[[], None], wait_s: float = WAIT_S
) -> None:
    """Call `remove_erased`, which removes erased users from a generation, then `name`, which others find it by.

    Nobody is erased between the two. Erasures wait only for `name`, which should be short, unless they follow one
    another without a pause.

    Raises:
        StoreLockedError: an erasure does not end within `wait_s` seconds; `name` was not called.
    """
    tombstones, num_erased = Tombstones(root), 0  # users that are removed from the generation already
    for attempt in range(ATTEMPTS_BESIDE_ERASURES + 1):
        is_last = attempt == ATTEMPTS_BESIDE_ERASURES
        with erasure_lock(root, wait_s):
            if is_last:
                remove_erased()
            if len(tombstones) == num_erased or is_last:
                return name()
            num_erased = len(tombstones)
        remove_erased()


FORMAT_VERSION = 1
MAX_BYTES = 1 << 30
"""A larger file, which would list more than 67 million users, is refused."""

_HEAD = struct.Struct("<4sHHQ")  # magic, version, 0, count
_MAGIC = b"VTMB"
_DIGEST_BYTES = 16
_CHECKSUM_BYTES = 8
DIGEST = np.dtype(f"S{_DIGEST_BYTES}")


class Tombstones:
    """The erased users of one store; the file is read again whenever it has changed. Every method raises a
    StoreWriteError if the file is damaged or cannot be read."""

    def __init__(self, root: Path) -> None:
        self._path = root / TOMBSTONES
        self._known: NDArray[Any] = np.empty(0, DIGEST)
        """Digests, ascending and distinct."""
        self._version: tuple[int, int, int] | None = None
        """Inode, size and modification time of the file that was read."""

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at the time of the call."""
        self._reread()
        if not len(self._known):
            return [False] * len(keys)
        erased: list[bool] = self._holds(digests_of(keys)).tolist()
        return erased

    def digests(self) -> NDArray[Any]:
        """Digests of all erased users, ascending (`digests_of`)."""
        self._reread()
        return self._known

    def add(self, keys: Sequence[bytes]) -> None:
        """As `add_digests`, for users with these keys."""
        self.add_digests(digests_of(keys))

    def add_digests(self, digests: NDArray[Any]) -> None:
        """Record erasures durably; only under `erasure_lock`. Raises StoreWriteError if the disk failed, or does not
        hold what was written."""
        self._reread()
        asked = np.unique(digests)
        new = asked[~self._holds(asked)]
        content = packed(np.insert(self._known, np.searchsorted(self._known, new), new))
        if len(content) > MAX_BYTES:
            raise StoreWriteError(
                f"{self._path}: would exceed {MAX_BYTES} bytes, so no user was erased; refresh a new store instead"
            )
        try:
            remove_leftovers(self._path.parent, TOMBSTONES)
            # Even without new digests: a process that was killed may have left a file that is not durable.
            replace_file(self._path, content, PRIVATE.file)
            with open(open_file(self._path, follow=False), "rb") as file:
                # So that the next line reads what the disk holds, and not the page cache.
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            self._version = None
            self._reread()
        except OSError as error:
            raise StoreWriteError(
                f"{self._path}: {error.strerror}; these users may not have been erased: check the disk, then "
                "erase them again"
            ) from error
        if not self._holds(asked).all():
            raise StoreWriteError(
                f"{self._path}: some of these users are missing from it after the write; check the disk, then "
                "erase them again"
            )

    def count(self, wait_s: float = WAIT_S) -> int:
        """How many users are erased and gone from every generation. Do not call it under `erasure_lock`."""
        with erasure_lock(self._path.parent, wait_s):
            return len(self)

    def __len__(self) -> int:
        self._reread()
        return len(self._known)

    def _holds(self, digests: NDArray[Any]) -> NDArray[np.bool_]:
        place = np.searchsorted(self._known, digests)
        held: NDArray[np.bool_] = place < len(self._known)
        held[held] = self._known[place[held]] == digests[held]
        return held

    def _reread(self) -> None:
        try:
            status = self._path.lstat()
            version = (status.st_ino, status.st_size, status.st_mtime_ns)
            if version == self._version:
                return
            data = read_limited(self._path, MAX_BYTES, follow=False)
        except FileNotFoundError:
            self._known, self._version = np.empty(0, DIGEST), None
            return
        except OSError as error:
            raise StoreWriteError(f"{self._path}: {error.strerror}; check the disk and permissions") from error
        try:
            self._known, self._version = unpacked(data), version
        except ValueError as error:
            raise StoreWriteError(
                f"{self._path} is damaged ({error}): restore it from a copy, or move it away and erase again every "
                "user who was ever erased; until then, nothing is written to this store"
            ) from None


def digests_of(keys: Sequence[bytes]) -> NDArray[Any]:
    """BLAKE2b-128 of each key, 16 bytes, [N]."""
    return np.array([hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest() for key in keys], DIGEST)


def packed(digests: NDArray[Any]) -> bytes:
    """The file of ascending, distinct digests."""
    content = _HEAD.pack(_MAGIC, FORMAT_VERSION, 0, len(digests)) + digests.tobytes()
    return content + xxhash.xxh3_64_intdigest(content).to_bytes(_CHECKSUM_BYTES, "little")


def unpacked(data: bytes) -> NDArray[Any]:
    """The digests in a file; raises a ValueError that says what is wrong with it."""
    content, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(content) < _HEAD.size:
        raise ValueError(f"it holds {len(data)} bytes, fewer than a header")
    magic, version, zero, count = _HEAD.unpack_from(content)
    if magic != _MAGIC:
        raise ValueError("it does not begin with VTMB")
    if (version, zero) != (FORMAT_VERSION, 0):
        raise ValueError(f"it has format version {version}, but this version of vista reads {FORMAT_VERSION}")
    if len(content) != _HEAD.size + _DIGEST_BYTES * count:
        raise ValueError(f"it holds {len(data)} bytes, which does not match its count of {count} users")
    if xxhash.xxh3_64_intdigest(content).to_bytes(_CHECKSUM_BYTES, "little") != checksum:
        raise ValueError("its checksum does not match")
    digests = np.frombuffer(content, DIGEST, offset=_HEAD.size)
    if not (digests[:-1] < digests[1:]).all():
        raise ValueError("its digests are not in ascending order")
    return digests
