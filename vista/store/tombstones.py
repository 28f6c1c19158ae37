"""Locks and tombstones of a store's folder: one writer, one erasure or publication, and no user who comes back.

Both locks are flocks, which the system releases when their process dies. The writer's lock is held for as long as a
refresh takes, so a second writer is refused at once. The other lock is held briefly, so processes wait for it up to a
deadline.

The tombstones are a file with BLAKE2b-128 digests of the erased users' keys, not ids (docs/reference/file-formats.md,
"Tombstones"). It is replaced atomically. A damaged file is an error wherever it is read: guessing which users it lists
could bring one back.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import StoreLockedError, StoreWriteError
from vista.files import open_file, read_limited, remove_leftovers, replace_file
from vista.store.layout import (
    ERASURE_LOCK,
    PRIVATE,
    TOMBSTONES,
    WRITER_LOCK,
    Permissions,
    open_private,
    prepare_root,
    set_store_permissions,
)
from vista.store.lmdb_environment import WAIT_S, flocked

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


FORMAT_VERSION = 1
MAX_BYTES = 1 << 30
"""A larger file, which would list more than 67 million users, is refused."""

_HEAD = struct.Struct("<4sHHQ")  # magic, version, 0, count
_MAGIC = b"VTMB"
_DIGEST_BYTES = 16
_CHECKSUM_BYTES = 8
_DIGEST = np.dtype(f"S{_DIGEST_BYTES}")


class Tombstones:
    """The erased users of one store; the file is read again whenever it has changed.

    Every method raises a StoreWriteError if the file is damaged or cannot be read.
    """

    def __init__(self, root: Path) -> None:
        self._path = root / TOMBSTONES
        self._known: NDArray[Any] = np.empty(0, _DIGEST)
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

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures durably; only under `erasure_lock`.

        Raises:
            StoreWriteError: the disk failed, or does not hold what was written.
        """
        self._reread()
        asked = np.unique(digests_of(keys))
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
            self._known, self._version = np.empty(0, _DIGEST), None
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
    return np.array([hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest() for key in keys], _DIGEST)


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
    digests = np.frombuffer(content, _DIGEST, offset=_HEAD.size)
    if not (digests[:-1] < digests[1:]).all():
        raise ValueError("its digests are not in ascending order")
    return digests
