"""File locks (flock) with a deadline. The system releases them when their process dies."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vista.errors import StoreLockedError

WAIT_S = 30.0
"""How long erasures, publications and transactions wait for one another by default."""
_POLL_S = 0.002


@contextmanager
def flocked(descriptor: int, path: Path, activity: str, wait_s: float = WAIT_S) -> Iterator[None]:
    """Hold the lock of an open file or folder.

    Args:
        descriptor: of `path`.
        activity: what a process that holds the lock has been doing, for the message.
        wait_s: seconds to wait for it.

    Raises:
        StoreLockedError: another process kept the lock for that long; the message has its process id if known.
    """
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                holders = ", ".join(map(str, sorted(lock_holders(path) or ())))
                raise StoreLockedError(
                    f"{path}: {f'process {holders}' if holders else 'another process'} {activity} for more than "
                    f"{wait_s:g} s; wait for it or kill it (its work is kept), then rerun the command"
                ) from error
            time.sleep(_POLL_S)
    try:
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # Closing is not enough: a child forked meanwhile has it open too.


def lock_holders(path: Path) -> set[int] | None:
    """Processes on this machine that hold a lock on a file; None if the system does not tell."""
    try:
        status = path.stat()
        lines = [line.split() for line in Path("/proc/locks").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return None
    device = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return {int(words[4]) for words in lines if len(words) > 5 and words[5] == device}
