"""What a folder's file system is, how much space it has, and how long it takes to make a write durable."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

WRITE_BYTES = 4096
NUM_WRITES = 50
MOST_S = 1.0
"""Time after which no further write is made, so that a slow disk does not delay the diagnosis."""
_MOUNTS = Path("/proc/self/mountinfo")


def existing_folder(path: Path) -> Path:
    """The folder itself, or the nearest one above it that exists; a file's is the one that holds it."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def file_system_of(folder: Path, mounts: Path = _MOUNTS) -> str | None:
    """Kind of the file system that a folder is on, such as ext4 or nfs4; None if the system does not say."""
    place, best, kind = folder.resolve(), -1, None
    for line in mounts.read_text(encoding="utf-8").splitlines() if mounts.exists() else []:
        before, _, after = line.partition(" - ")
        mount = Path(before.split()[4].replace(r"\040", " "))
        # Of mounts on one place, the last one hides the others.
        if place.is_relative_to(mount) and len(mount.parts) >= best:
            best, kind = len(mount.parts), after.split()[0]
    return kind


def sync_seconds(folder: Path) -> list[float]:
    """Times of writes of 4 KiB with fsync, one after another, to a file without a name.

    Raises:
        OSError: nothing can be written there.
    """
    times: list[float] = []
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        while len(times) < NUM_WRITES and sum(times) < MOST_S:
            start = time.perf_counter()
            file.write(bytes(WRITE_BYTES))
            os.fsync(file.fileno())
            times.append(time.perf_counter() - start)
    return times


def median_sync_s(folder: Path) -> float:
    """Median of `sync_seconds`."""
    return statistics.median(sync_seconds(folder))
