"""Keyed BLAKE2b codes for stores that cross a trust boundary: only holders of the key can make, change or move records.

The key is 32 bytes and is never kept in a store. A store holds `key_id`, from which the key cannot be derived.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from vista.errors import ConfigError
from vista.files import read_limited

KEY_BYTES = 32
CODE_BYTES = 16
_MOST_KEY_FILE_BYTES = 1024
KEY_VARIABLE = "VISTA_AUTHENTICATION_KEY"
"""Environment variable with the key in 64 hex digits, read if no file is named."""

_RECORD = b"vista record 1"
_KEY_ID = b"vista key id 1"


def record_code(key: bytes, user_key: bytes, header: bytes, payload: Sequence[bytes | memoryview]) -> bytes:
    """16 bytes over the length of the user's key (uint16), that key, the header with a zero checksum, the payload."""
    code = hashlib.blake2b(len(user_key).to_bytes(2, "little"), digest_size=CODE_BYTES, key=key, person=_RECORD)
    code.update(user_key)
    code.update(header)
    for part in payload:
        code.update(part)
    return code.digest()


def key_id(key: bytes) -> str:
    """Fingerprint of a key, 16 hex digits, which does not reveal the key.

    Raises:
        ValueError: the key is not 32 bytes long.
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"key: an authentication key must be {KEY_BYTES} bytes")
    return hashlib.blake2b(digest_size=8, key=key, person=_KEY_ID).hexdigest()


def read_key(path: str | None) -> bytes | None:
    """Read the key from a file (32 bytes, or 64 hex digits) or, without a path, from VISTA_AUTHENTICATION_KEY.

    Returns:
        The key; None without a path if the variable is not set.

    Raises:
        ConfigError: the file or variable cannot be read, or does not hold a key. The message never holds the key.
    """
    remedy = "write one with `openssl rand -hex 32`"
    if path is None:
        text = os.environ.get(KEY_VARIABLE)
        return None if text is None else _parse(text.encode(), KEY_VARIABLE, remedy)
    try:
        held = read_limited(Path(path), _MOST_KEY_FILE_BYTES)
    except OSError as error:
        raise ConfigError(f"authentication_key_file: {path}: {error.strerror}; {remedy}") from error
    return _parse(held, f"authentication_key_file: {path}", remedy)


def _parse(held: bytes, where: str, remedy: str) -> bytes:
    if len(held) == KEY_BYTES:
        return held
    try:
        key = bytes.fromhex(held.decode("ascii").strip())
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise ConfigError(f"{where} must hold {KEY_BYTES} bytes, or {2 * KEY_BYTES} hex digits; {remedy}")
    return key
