"""Keys of the summary store: `u`, a type byte, the raw user id (docs/reference/file-formats.md, "Keys").

Integers are big-endian with the sign bit flipped, so that byte order is numeric order; strings are their UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, Protocol, TypeVar

import lmdb
import numpy as np
from numpy.typing import NDArray

from vista.errors import StoreError, UserKeyError

MAX_KEY_BYTES = 511
"""LMDB's own limit."""

INT_PREFIX = b"ui"
STR_PREFIX = b"us"

KINDS = {INT_PREFIX: "int", STR_PREFIX: "str"}
"""What ids a key's first two bytes speak of."""

CURSOR_KEY = b"!cursor"
COMPLETE_KEY = b"!complete"
MANIFEST_KEY = b"!manifest"

_SIGN_BIT = np.uint64(1 << 63)
_WALK_USERS = 1024
_WALK_BYTES = 1 << 23

T = TypeVar("T")


class Read(Protocol):
    """Calls a function within a read transaction."""

    def __call__(self, function: Callable[[lmdb.Transaction[memoryview]], T], /) -> T: ...


def user_keys(user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> list[bytes]:
    """Keys of a batch of users.

    Args:
        user_ids: integers in int64's range, or strings; a list, a tuple or a NumPy array of one dimension.

    Returns:
        One key an id, in the same order.

    Raises:
        UserKeyError: an id is of another type, out of int64's range, or longer than 509 bytes of UTF-8.
    """
    if isinstance(user_ids, np.ndarray):
        if user_ids.ndim != 1:
            raise UserKeyError(f"user ids must have one dimension, got shape {user_ids.shape}")
        if user_ids.dtype.kind in "iu":
            if user_ids.dtype == np.uint64 and user_ids.size and int(user_ids.max()) >= 1 << 63:
                raise UserKeyError(f"user id {int(user_ids.max())} is beyond int64; name such users by strings")
            return _int_keys(user_ids.astype(np.int64))
        user_ids = user_ids.tolist()
    kinds = set(map(type, user_ids))
    if kinds == {int}:
        try:
            return _int_keys(np.array(user_ids, dtype=np.int64))
        except OverflowError:
            pass  # The loop below names the id.
    return [user_key(user) for user in user_ids]


def user_key(user_id: int | str) -> bytes:
    """Key of one user; errors as in `user_keys`."""
    if isinstance(user_id, str):
        try:
            key = STR_PREFIX + user_id.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserKeyError(f"user id {user_id!r} has no UTF-8 form ({error.reason})") from error
        if len(key) > MAX_KEY_BYTES:
            raise UserKeyError(
                f"user id {user_id[:40]!r}… takes {len(key) - 2} bytes, at most {MAX_KEY_BYTES - 2} fit a key; "
                "hash such ids to shorter ones before `prepare`"
            )
        return key
    if isinstance(user_id, (int, np.integer)) and not isinstance(user_id, bool):
        if not -(1 << 63) <= int(user_id) < 1 << 63:
            raise UserKeyError(f"user id {user_id} is beyond int64; name such users by strings")
        return INT_PREFIX + ((int(user_id) + (1 << 63)).to_bytes(8, "big"))
    raise UserKeyError(f"user id {user_id!r} is a {type(user_id).__name__}; user ids are integers or strings")


def user_id(key: bytes) -> int | str:
    """User of a key.

    Raises:
        UserKeyError: the bytes are no user key.
    """
    if key[:2] == INT_PREFIX and len(key) == 10:
        return int.from_bytes(key[2:], "big") - (1 << 63)
    if key[:2] == STR_PREFIX:
        try:
            return key[2:].decode("utf-8")
        except UnicodeDecodeError:
            pass
    raise UserKeyError(f"{key!r} is no user key")


def kinds_of(keys: Sequence[bytes]) -> set[str]:
    """The kinds of ids that keys are of: int, str, or mixed where one is no key."""
    return {KINDS.get(prefix, "mixed") for prefix in {key[:2] for key in keys}}


def common_kind(kinds: Iterable[str | None]) -> str | None:
    """What ids of several kinds are together: int, str, mixed, or None without any."""
    found = set(kinds) - {None}
    return None if not found else found.pop() if len(found) == 1 else "mixed"


def walk(
    read: Read, take: Callable[[list[bytes], list[memoryview]], T], after: bytes = b"u"
) -> Iterator[tuple[list[bytes], T]]:
    """All users beyond a key, ascending, some at a time, each time in a short read transaction of its own.

    Args:
        read: of an environment.
        take: makes of at most 1,024 keys and their values what is yielded with the keys; the values die with it.
        after: a key.

    Raises:
        StoreError: the keys are out of order, so the file is damaged.
    """

    def some(transaction: lmdb.Transaction[memoryview]) -> tuple[list[bytes], list[T]]:
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
            raise StoreError("the keys of the store are out of order, so its file is damaged; refresh it again")
        return keys, taken

    while True:
        keys, taken = read(some)
        if not keys:
            return
        after = keys[-1]
        yield keys, taken[0]


def copied(keys: list[bytes], values: list[memoryview]) -> list[bytes]:
    """For `walk`: copies of the values."""
    return list(map(bytes, values))


def _int_keys(ids: NDArray[np.int64]) -> list[bytes]:
    packed = (ids.view(np.uint64) ^ _SIGN_BIT).astype(">u8").tobytes()
    return [INT_PREFIX + packed[start : start + 8] for start in range(0, len(packed), 8)]
