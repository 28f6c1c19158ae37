"""Tombstones: a file with a 16-byte digest per erased user, so that no later refresh brings a user back.

The file holds no ids, but BLAKE2b-128 of the users' keys. Its flock orders erasures and publications, so that no
generation is published with a user who was erased while it was written.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from vista.errors import StoreWriteError
from vista.files import sync
from vista.store.layout import TOMBSTONES
from vista.store.lmdb.flock import WAIT_S
from vista.store.locks import erasure_lock

_DIGEST_BYTES = 16


class Tombstones:
    """The erased users of one store; the file is read again whenever it has changed."""

    def __init__(self, root: Path) -> None:
        self._path = root / TOMBSTONES
        self._known: set[bytes] = set()
        self._version: tuple[int, int] | None = None
        """Size and modification time of the file that was read."""

    def erased(self, keys: Sequence[bytes]) -> list[bool]:
        """Whether each user is erased at this time."""
        self._reread()
        if not self._known:
            return [False] * len(keys)
        return [_digest(key) in self._known for key in keys]

    def add(self, keys: Sequence[bytes]) -> None:
        """Record erasures durably; only under `erasure_lock`."""
        self._reread()
        new = [digest for digest in dict.fromkeys(map(_digest, keys)) if digest not in self._known]
        try:
            self._append(new)
        except OSError as error:
            raise StoreWriteError(
                f"{self._path}: {error.strerror}; no user was erased. Check the disk and try again"
            ) from error

    def _append(self, new: list[bytes]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY)
        end = len(self._known) * _DIGEST_BYTES
        try:
            # Overwrite an incomplete end that a crash may have left, rather than append after it.
            data = b"".join(new)
            if os.pwrite(descriptor, data, end) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Even without new digests: a process killed before this line left digests that are known, but not durable.
            os.fsync(descriptor)
            sync(self._path.parent)
        except OSError:
            # They would count now, but could be lost with a power failure: the kernel considers them written.
            os.ftruncate(descriptor, end)
            raise
        finally:
            os.close(descriptor)

    def count(self, wait_s: float = WAIT_S) -> int:
        """How many users are erased and gone from every generation. Do not call it under `erasure_lock`."""
        with erasure_lock(self._path.parent, wait_s):
            return len(self)

    def __len__(self) -> int:
        self._reread()
        return len(self._known)

    def _reread(self) -> None:
        try:
            status = self._path.stat()
            version = (status.st_size, status.st_mtime_ns)
            if version == self._version:
                return
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._known, self._version = set(), None
            return
        except OSError as error:
            raise StoreWriteError(f"{self._path}: {error.strerror}; check the disk and permissions") from error
        complete = len(data) - len(data) % _DIGEST_BYTES
        self._known = {data[at : at + _DIGEST_BYTES] for at in range(0, complete, _DIGEST_BYTES)}
        self._version = version


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest()
