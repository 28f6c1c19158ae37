"""Records of a store on a server that this host has read, in LMDB, for all processes of the host.

An entry's key is the XXH3-128 of the version of the records and the user's key. A change of any record gives another
version, so an entry is never out of date, and those of older versions are evicted like all others.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import lmdb
import xxhash

from vista.errors import StoreError, StoreLockedError
from vista.files import make_folders
from vista.store.lmdb.environment import SharedEnvironment
from vista.store.lmdb.permissions import PRIVATE, make_folder

_KEY_BYTES = 16
_WAIT_S = 0.05
"""Longest time that a read waits for another process that writes the cache."""

logger = logging.getLogger(__name__)


class RecordCache:
    """Bounded; if it is full, new entries replace random ones. If the disk fails, reads continue without it.

    Args:
        folder: of this store alone; made with its parents when it is first used.
        max_bytes: of the pages in use, exceeded by at most one batch.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._environment: SharedEnvironment | None = None
        self._failed = False

    def get(self, version: bytes, keys: Sequence[bytes]) -> list[bytes | None]:
        """Records of this version; None where it holds none."""
        names = [xxhash.xxh3_128_digest(version + key) for key in keys]

        def copy(transaction: lmdb.Transaction[memoryview]) -> list[bytes | None]:
            values = [transaction.get(name) for name in names]
            return [None if value is None else bytes(value) for value in values]

        try:
            return [None] * len(keys) if self._failed else self._open().read(copy)
        except (StoreError, OSError) as error:
            self._fail(error)
            return [None] * len(keys)

    def put(self, version: bytes, records: Mapping[bytes, bytes]) -> None:
        """Add records of this version, and evict others if there are too many."""

        def replace(transaction: lmdb.Transaction[memoryview]) -> None:
            if is_full:
                _evict(transaction, 2 * len(records))
            for key, record in records.items():
                transaction.put(xxhash.xxh3_128_digest(version + key), record)

        if self._failed or not records:
            return
        try:
            environment = self._open()
            is_full = environment.live_bytes() > self._max_bytes
            environment.write(replace, _WAIT_S)
        except StoreLockedError:
            return  # Another process is writing; a later read adds them.
        except (StoreError, OSError, lmdb.Error) as error:
            self._fail(error)

    def forget(self, version: bytes, keys: Sequence[bytes]) -> None:
        """Remove the records of some users, because one of them is damaged."""

        def remove(transaction: lmdb.Transaction[memoryview]) -> None:
            for key in keys:
                transaction.delete(xxhash.xxh3_128_digest(version + key))

        try:
            self._open().write(remove, _WAIT_S)
        except StoreLockedError:
            return
        except (StoreError, OSError, lmdb.Error) as error:
            self._fail(error)

    def close(self) -> None:
        """Close the files; the next use opens them again."""
        if self._environment is not None:
            self._environment.release()
            self._environment = None

    def _open(self) -> SharedEnvironment:
        if self._environment is None or self._environment.inherited:
            make_folders(self._folder.parent)
            with suppress(FileExistsError):
                make_folder(self._folder, PRIVATE)
            self._environment = SharedEnvironment.acquire(self._folder, writable=True)
        return self._environment

    def _fail(self, error: Exception) -> None:
        self._failed = True
        logger.warning("%s: records are no longer cached here: %s", self._folder, error)


def _evict(transaction: lmdb.Transaction[memoryview], count: int) -> None:
    """Remove `count` entries, starting at a random place; entries are in the order of their hashes."""
    cursor = transaction.cursor()
    for start in (secrets.token_bytes(_KEY_BYTES), b"\0"):
        found = cursor.set_range(start)
        while found and count:
            found = cursor.delete()
            count -= 1
