"""Who may change a store: one writer at a time, and one erasure or flip at a time, whichever the process.

Both are flocks, which the system releases when their process dies. The writer's is refused at once, since it is held
for as long as a refresh takes; the other is held for moments, and waited for to a deadline.
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
from vista.store.layout import TOMBSTONES, WRITER_LOCK, prepare_root, set_store_modes
from vista.store.lmdb.flock import waited_for
from vista.store.lmdb.permissions import PRIVATE, Modes, set_mode

_held: WeakSet[WriterLock] = WeakSet()


def _release_in_child() -> None:
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)  # Else a worker that outlives its killed parent keeps the lock.


class WriterLock:
    """The one writer of a store: a non-blocking flock, released by the system when its process dies."""

    def __init__(self, root: Path) -> None:
        path = root / WRITER_LOCK
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, PRIVATE.file)
        try:
            set_mode(path, PRIVATE.file)  # No reader needs it, and who can open it can keep writers out.
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip()
            self.release()
            raise StoreLockedError(
                f"{root} is being written by {f'process {holder}' if holder else 'another process'}; wait for it, or "
                "end it: its work is kept and the next refresh goes on from there"
            ) from error
        except BaseException:
            self.release()
            raise
        _held.add(self)

    def release(self) -> None:
        """Let the next writer in."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def lock_store(root: Path, modes: Modes | None = None) -> WriterLock:
    """Become the one writer of a store.

    Args:
        root: the store's folder.
        modes: make it if it is not there, and give all that lies in it these; None leaves all as it is.

    Raises:
        StoreLockedError: another writer holds the store; the message names its process if known.
        StoreWriteError: the path cannot be written, or is not there.
    """
    try:
        if modes is not None:
            prepare_root(root, modes)
        lock = WriterLock(root)
    except OSError as error:
        raise cannot_write(root, error) from error
    try:
        if modes is not None:
            set_store_modes(root, modes)
    except OSError as error:
        lock.release()
        raise cannot_write(root, error) from error
    return lock


@contextmanager
def locked(root: Path, modes: Modes | None = None) -> Iterator[None]:
    """Be the one writer of a store meanwhile, as by `lock_store`; faults of the file system are StoreWriteErrors."""
    lock = lock_store(root, modes)
    try:
        yield
    except (OSError, lmdb.Error) as error:
        raise cannot_write(root, error) from error
    finally:
        lock.release()


def cannot_write(root: Path, error: Exception) -> StoreWriteError:
    """What to do about a fault of the file system."""
    return StoreWriteError(
        f"{root} cannot be written: {error}; check free space, the path, its permissions, and whether it is mounted "
        "read-only, then run the same command again: what is served is as before, and a refresh goes on after the last "
        "batch that was written"
    )


@contextmanager
def erasing(root: Path) -> Iterator[None]:
    """Section of an erasure or a flip: one at a time, whichever process.

    Raises:
        StoreLockedError: another one did not end within WAIT_S; the message names its process if known.
        StoreWriteError: the file cannot be made.
    """
    try:
        descriptor = os.open(root / TOMBSTONES, os.O_RDWR | os.O_CREAT, PRIVATE.file)
    except OSError as error:
        raise StoreWriteError(
            f"{root / TOMBSTONES}: {error.strerror}; check the path, permissions and free space"
        ) from error
    try:
        set_mode(root / TOMBSTONES, PRIVATE.file)  # whatever the umask
        with waited_for(descriptor, root / TOMBSTONES, "has been erasing users or publishing"):
            yield
    finally:
        os.close(descriptor)
