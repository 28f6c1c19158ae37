"""What the parent of several workers shares with them: bearer tokens, and a folder of numbers.

The parent does without torch and the packages of the service, so this module imports none of them.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vista.errors import ConfigError
from vista.files import read_limited

TOKEN_VARIABLE = "VISTA_SERVE_TOKEN"
"""Environment variable with the tokens, read if no file is named."""
MIN_TOKEN = 16
"""Characters of the shortest token that is accepted."""
_MOST_BYTES = 4096


def read_tokens(path: str | None) -> list[bytes]:
    """Read tokens, one per line, from a file or, without a path, from VISTA_SERVE_TOKEN.

    Several tokens let clients move from an old one to a new one at different times.

    Returns:
        At least one token; an empty list if there is no path and the variable is not set.

    Raises:
        ConfigError: the file cannot be read, it holds no token, or a token is too short or has characters that a header
            cannot have. The message never holds a token.
    """
    remedy = "write one with `openssl rand -hex 32`"
    if path is None:
        text = os.environ.get(TOKEN_VARIABLE)
        return [] if text is None else _checked(text.encode(), TOKEN_VARIABLE, remedy)
    try:
        return _checked(read_limited(Path(path), _MOST_BYTES), f"token_file: {path}", remedy)
    except OSError as error:
        raise ConfigError(f"token_file: {path}: {error.strerror}; {remedy}") from error


def _checked(held: bytes, where: str, remedy: str) -> list[bytes]:
    tokens = {number: line.strip() for number, line in enumerate(held.splitlines(), 1) if line.strip()}
    for number, token in (tokens or {1: b""}).items():
        if len(token) < MIN_TOKEN or any(not 0x21 <= byte <= 0x7E for byte in token):
            raise ConfigError(
                f"{where}, line {number}: must hold a token of at least {MIN_TOKEN} printable ASCII characters without "
                f"space; {remedy}"
            )
    return list(tokens.values())


FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
"""Environment variable that makes prometheus_client share numbers between processes; it is read on import."""
MEMORY = Path("/dev/shm")


@contextmanager
def shared_numbers() -> Iterator[None]:
    """A new folder in which workers share their numbers: in memory if possible, because a process dies when it writes
    to a mapped file on a full disk."""
    folder = tempfile.mkdtemp(prefix="vista-serve-", dir=MEMORY if os.access(MEMORY, os.W_OK) else None)
    os.environ[FOLDER_VARIABLE] = folder
    try:
        yield
    finally:
        del os.environ[FOLDER_VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)
