"""File locks that are waited for, to a deadline. The system releases them when their process dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vista.errors import StoreLockedError

WAIT_S = 30.0
"""How long erasures, flips and transactions wait for one another."""
_POLL_S = 0.002


@contextmanager
def waited_for(descriptor: int, path: Path, doing: str) -> Iterator[None]:
    """Hold the lock of an open file or folder meanwhile.

    Args:
        descriptor: of `path`.
        doing: what a process does that holds it, for the message.

    Raises:
        StoreLockedError: it was not let go within WAIT_S; the message names its process if known.
    """
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holders = ", ".join(map(str, sorted(lock_holders(path) or ())))
                raise StoreLockedError(
                    f"{path}: {f'process {holders}' if holders else 'another process'} {doing} for more than "
                    f"{WAIT_S:g} s; wait for it, or end it (what it wrote is kept), then run the same command again"
                ) from error
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # A child that was forked meanwhile holds the descriptor too.


def lock_holders(path: Path) -> set[int] | None:
    """Processes of this machine that hold a lock on a file; None where the system does not say."""
    try:
        found = path.stat()
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="ascii").splitlines()]
    except OSError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    return {int(words[4]) for words in lines if len(words) > 5 and words[5] == device}
