"""The token that clients of the service must send."""

from __future__ import annotations

import hmac
import os
from pathlib import Path

from vista.errors import ConfigError
from vista.files import read_limited

TOKEN_VARIABLE = "VISTA_SERVE_TOKEN"
"""Environment variable with the token, read if no file is named."""
MIN_TOKEN = 16
"""Characters of the shortest token that is accepted."""
_MOST_BYTES = 4096


def read_token(path: str | None) -> bytes | None:
    """Read the token from a file or, without a path, from VISTA_SERVE_TOKEN; surrounding whitespace is removed.

    Returns:
        The token; None without a path if the variable is not set.

    Raises:
        ConfigError: the file cannot be read, or the token is too short or has characters that a header cannot have. The
            message never holds the token.
    """
    remedy = "write one with `openssl rand -hex 32`"
    if path is None:
        text = os.environ.get(TOKEN_VARIABLE)
        return None if text is None else _checked(text.encode(), TOKEN_VARIABLE, remedy)
    try:
        return _checked(read_limited(Path(path), _MOST_BYTES), f"token_file: {path}", remedy)
    except OSError as error:
        raise ConfigError(f"token_file: {path}: {error.strerror}; {remedy}") from error


def is_authorized(header: bytes | None, token: bytes) -> bool:
    """Whether the value of the header Authorization holds the token; takes the same time for any wrong token."""
    scheme, _, given = (header or b"").partition(b" ")
    return hmac.compare_digest(given.strip(), token) and scheme.lower() == b"bearer"


def _checked(held: bytes, where: str, remedy: str) -> bytes:
    token = held.strip()
    if len(token) < MIN_TOKEN or any(not 0x21 <= byte <= 0x7E for byte in token):
        raise ConfigError(f"{where} must hold at least {MIN_TOKEN} printable ASCII characters without space; {remedy}")
    return token
