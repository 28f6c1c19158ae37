"""Keys of the summary store: `u`, a type byte, the raw user id (docs/reference/file-formats.md, "Keys").

Integers are big-endian with the sign bit flipped, so that byte order is numeric order; strings are their UTF-8 bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.errors import UserKeyError

MAX_KEY_BYTES = 511
"""LMDB's limit."""

INT_PREFIX = b"ui"
STR_PREFIX = b"us"

KINDS = {INT_PREFIX: "int", STR_PREFIX: "str"}
"""Type of the ids by a key's first two bytes."""

CURSOR_KEY = b"!cursor"
COMPLETE_KEY = b"!complete"
MANIFEST_KEY = b"!manifest"

_SIGN_BIT = np.uint64(1 << 63)


def user_keys(user_ids: Sequence[int] | Sequence[str] | NDArray[Any]) -> list[bytes]:
    """Keys of a batch of users.

    Args:
        user_ids: integers in the range of int64, or strings; a list, a tuple or a one-dimensional NumPy array.

    Returns:
        One key per id, in the same order.

    Raises:
        UserKeyError: an id is of another type, out of the range of int64, or longer than 509 bytes of UTF-8.
    """
    if isinstance(user_ids, np.ndarray):
        if user_ids.ndim != 1:
            raise UserKeyError(f"user ids must be one-dimensional, got shape {user_ids.shape}")
        if user_ids.dtype.kind in "iu":
            if user_ids.dtype == np.uint64 and user_ids.size and int(user_ids.max()) >= 1 << 63:
                raise UserKeyError(f"user id {int(user_ids.max())} does not fit int64; use strings as user ids")
            return _int_keys(user_ids.astype(np.int64))
        user_ids = user_ids.tolist()
    kinds = set(map(type, user_ids))
    if kinds == {int}:
        try:
            return _int_keys(np.array(user_ids, dtype=np.int64))
        except OverflowError:
            pass  # The loop below reports the id.
    return [user_key(user) for user in user_ids]


def user_key(user_id: int | str) -> bytes:
    """Key of one user; errors as in `user_keys`."""
    if isinstance(user_id, str):
        try:
            key = STR_PREFIX + user_id.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserKeyError(
                f"user id {user_id!r} cannot be encoded as UTF-8 ({error.reason}); decode it correctly"
            ) from error
        if len(key) > MAX_KEY_BYTES:
            raise UserKeyError(
                f"user id {user_id[:40]!r}… takes {len(key) - 2} bytes, but a key holds at most {MAX_KEY_BYTES - 2}; "
                "hash such ids to shorter ones before `prepare`"
            )
        return key
    if isinstance(user_id, (int, np.integer)) and not isinstance(user_id, bool):
        if not -(1 << 63) <= int(user_id) < 1 << 63:
            raise UserKeyError(f"user id {user_id} does not fit int64; use strings as user ids")
        return INT_PREFIX + ((int(user_id) + (1 << 63)).to_bytes(8, "big"))
    raise UserKeyError(f"user id {user_id!r} is a {type(user_id).__name__}; user ids must be integers or strings")


def user_id(key: bytes) -> int | str:
    """User id of a key.

    Raises:
        UserKeyError: the bytes are not a user key.
    """
    if key[:2] == INT_PREFIX and len(key) == 10:
        return int.from_bytes(key[2:], "big") - (1 << 63)
    if key[:2] == STR_PREFIX:
        try:
            return key[2:].decode("utf-8")
        except UnicodeDecodeError:
            pass
    raise UserKeyError(f"{key!r} is not a user key")


def kinds_of(keys: Sequence[bytes]) -> set[str]:
    """Types of the ids that keys stand for: int, str, or mixed for bytes that are not a user key."""
    return {KINDS.get(prefix, "mixed") for prefix in {key[:2] for key in keys}}


def common_kind(kinds: Iterable[str | None]) -> str | None:
    """Type of the ids of several sets together: int, str, mixed, or None if all are empty."""
    distinct = set(kinds) - {None}
    return None if not distinct else distinct.pop() if len(distinct) == 1 else "mixed"


def _int_keys(ids: NDArray[np.int64]) -> list[bytes]:
    packed = (ids.view(np.uint64) ^ _SIGN_BIT).astype(">u8").tobytes()
    return [INT_PREFIX + packed[start : start + 8] for start in range(0, len(packed), 8)]
