"""Erased users: a file of 16-byte digests beside the generations, so that no later refresh brings a user back.

The file holds no id: BLAKE2b-128 of the user's key. Its flock orders erasures and flips, so that no generation is
published with a user who was erased while it was written.
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
from vista.store.lmdb.locks import erasing

_DIGEST_BYTES = 16


class Tombstones:
    """The erased users of one store, reread when the file has changed."""

    def __init__(self, root: Path) -> None:
        self._path = root / TOMBSTONES
        self._known: set[bytes] = set()
        self._form: tuple[int, int] | None = None

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
        try:
            self._append(new)
        except OSError as error:
            raise StoreWriteError(
                f"{self._path}: {error.strerror}; nobody is erased, check the disk and try again"
            ) from error

    def _append(self, new: list[bytes]) -> None:
        descriptor = os.open(self._path, os.O_WRONLY)
        end = len(self._known) * _DIGEST_BYTES
        try:
            # Over a torn end that a crash may have left, never behind it.
            data = b"".join(new)
            if os.pwrite(descriptor, data, end) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Without new ones too: who was killed before this line has left digests that are known and not durable.
            os.fsync(descriptor)
            sync(self._path.parent)
        except OSError:
            # Or they would count now, and, as pages that the kernel takes for written, be lost with the power.
            os.ftruncate(descriptor, end)
            raise
        finally:
            os.close(descriptor)

    def count(self) -> int:
        """How many there are, all of whose records are gone from every generation. Not under `erasing`."""
        with erasing(self._path.parent):
            return len(self)

    def __len__(self) -> int:
        self._reread()
        return len(self._known)

    def _reread(self) -> None:
        try:
            status = self._path.stat()
            form = (status.st_size, status.st_mtime_ns)
            if form == self._form:
                return
            data = self._path.read_bytes()
        except FileNotFoundError:
            self._known, self._form = set(), None
            return
        except OSError as error:
            raise StoreWriteError(f"{self._path}: {error.strerror}; check the disk and permissions") from error
        whole = len(data) - len(data) % _DIGEST_BYTES
        self._known = {data[at : at + _DIGEST_BYTES] for at in range(0, whole, _DIGEST_BYTES)}
        self._form = form


def _digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=_DIGEST_BYTES).digest()
