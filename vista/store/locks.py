"""Locks of a store: one writer at a time, and one erasure or publication at a time, among all processes.

Both are flocks, which the system releases when their process dies. The writer's lock is held for as long as a refresh
takes, so a second writer is refused at once. The other lock is held briefly, so processes wait for it up to a deadline.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import lmdb

from vista.errors import StoreLockedError, StoreWriteError
from vista.store.layout import ERASURE_LOCK, WRITER_LOCK, prepare_root, set_store_permissions
from vista.store.lmdb.flock import WAIT_S, flocked
from vista.store.lmdb.permissions import Permissions, open_private

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


@contextmanager
def locked(root: Path, permissions: Permissions | None = None) -> Iterator[None]:
    """Context of the one writer of a store. Like `lock_store`, but file system errors become StoreWriteErrors."""
    lock = lock_store(root, permissions)
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise cannot_write(root, error) from error
    finally:
        lock.release()


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
