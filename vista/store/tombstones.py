"""Erased users: a file of 16-byte digests beside the generations, so that no later refresh brings a user back.

The file holds no id: BLAKE2b-128 of the user's key. Its flock orders erasures and flips, so that no generation is
published with a user who was erased while it was written. Both hold it for moments, and wait for it to a deadline.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vista.errors import StoreLockedError, StoreWriteError
from vista.files import sync
from vista.store.permissions import PRIVATE, lock_holders, set_mode

TOMBSTONES = "tombstones"
_DIGEST_BYTES = 16

WAIT_S = 30.0
"""How long an erasure or a flip waits for another one."""
_POLL_S = 0.002


class Tombstones:
    """The erased users of one store, reread when the file has grown."""

    def __init__(self, root: Path) -> None:
        self._path = root / TOMBSTONES
        self._known: set[bytes] = set()
        self._size = -1

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased, as of now."""
        self._reread()
        if not self._known:
            return [False] * len(keys)
        return [_digest(key) in self._known for key in keys]

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures durably. Only under `erasing`."""
        self._reread()
        new = [digest for digest in dict.fromkeys(map(_digest, keys)) if digest not in self._known]
        if not new:
            return
        try:
            self._append(new)
        except OSError as error:
            raise StoreWriteError(
                f"{self._path}: {error.strerror}; nobody is erased, check the disk and try again"
            ) from error

    def _append(self, new: list[bytes]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY)
        try:
            # Over a torn end that a crash may have left, never behind it.
            data = b"".join(new)
            if os.pwrite(descriptor, data, len(self._known) * _DIGEST_BYTES) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(self._path.parent)

    def count(self) -> int:
        """How many there are, all of whose records are gone from every generation. Not under `erasing`."""
        with erasing(self._path.parent):
            return len(self)

    def __len__(self) -> int:
        self._reread()
        return len(self._known)

    def _reread(self) -> None:
        try:
            size = self._path.stat().st_size
            if size == self._size:
                return
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._known, self._size = set(), -1
            return
        except OSError as error:
            raise StoreWriteError(f"{self._path}: {error.strerror}; check the disk and permissions") from error
        whole = len(data) - len(data) % _DIGEST_BYTES
        self._known = {data[at : at + _DIGEST_BYTES] for at in range(0, whole, _DIGEST_BYTES)}
        self._size = len(data)


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
        _lock(descriptor, root)
        try:
            yield
        finally:
            fcntl.flock(descriptor, fcntl.LOCK_UN)  # A child that was forked meanwhile holds the descriptor too.
    finally:
        os.close(descriptor)


def _lock(descriptor: int, root: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holders = ", ".join(map(str, sorted(lock_holders(root / TOMBSTONES) or ())))
                raise StoreLockedError(
                    f"{root}: {f'process {holders}' if holders else 'another process'} has been erasing users or "
                    f"publishing for more than {WAIT_S:g} s; wait for it, or end it (what it wrote is kept), then run "
                    "the same command again: this one has changed nothing of what is served"
                ) from error
            time.sleep(_POLL_S)


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest()
