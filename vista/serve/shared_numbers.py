"""Lets several workers share their metrics. This module does not import prometheus_client."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
