"""Walking through all users of an LMDB environment in short read transactions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Protocol, TypeVar

import lmdb

from vista.errors import StoreError

_WALK_USERS = 1024
_WALK_BYTES = 1 << 23

T = TypeVar("T")


class ReadTransactions(Protocol):
    """Calls a function inside a read transaction and returns its result, as `SharedEnvironment.read` does."""

    def __call__(self, function: Callable[[lmdb.Transaction[memoryview]], T], /) -> T: ...


def walk(
    read: ReadTransactions, take: Callable[[list[bytes], list[memoryview]], T], after: bytes = b"u"
) -> Iterator[tuple[list[bytes], T]]:
    """Visit all users beyond a key in ascending order, a batch per read transaction.

    Args:
        read: of an environment.
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
        keys, taken = read(read_batch)
        if not keys:
            return
        after = keys[-1]
        yield keys, taken[0]


def copied(keys: list[bytes], values: list[memoryview]) -> list[bytes]:
    """For `walk`: copies of the values, which stay valid."""
    return list(map(bytes, values))
