"""How a run is logged to its folder, and how it takes Ctrl-C."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Copy vista's log records to a file of the run."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("vista")
    level = root.level
    root.addHandler(handler)
    if level == logging.NOTSET:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Make Ctrl-C fill the list, so that the current step ends and a checkpoint is written; a second one stops at once.

    Outside the main thread signals cannot be handled, and the list stays empty.
    """
    mark: list[bool] = []

    def note(signum: int, frame: Any) -> None:
        if mark:
            raise KeyboardInterrupt
        mark.append(True)
        logger.warning("interrupt: finishing this step and writing a checkpoint (press Ctrl-C again to stop at once)")

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:
        previous = None
    try:
        yield mark
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)
