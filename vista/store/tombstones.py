"""Tombstones: a file with a 16-byte digest per erased user, so that no later refresh brings a user back.

The file holds BLAKE2b-128 digests of the users' keys, not ids (docs/reference/file-formats.md, "Tombstones"). It is
replaced atomically. A damaged file is an error wherever it is read: guessing which users it lists could bring one back.
"""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from vista.errors import StoreWriteError
from vista.files import open_file, read_limited, remove_leftovers, replace_file
from vista.store.layout import TOMBSTONES
from vista.store.lmdb.flock import WAIT_S
from vista.store.lmdb.permissions import PRIVATE
from vista.store.locks import erasure_lock

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
