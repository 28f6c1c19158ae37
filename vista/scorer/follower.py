"""A thread that calls a scorer's `reload` at regular intervals."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Protocol

logger = logging.getLogger(__name__)


class _Reloadable(Protocol):
    """What is followed: a `Scorer`."""

    def reload(self) -> bool: ...


class Follower:
    """Calls `reload` every `every_s` seconds in a daemon thread, until `stop` is called or the scorer is gone.

    The scorer counts errors. An error is logged only if it differs from the previous one.

    Args:
        scorer: only a weak reference is kept, so that the thread does not keep the scorer alive.
        every_s: seconds between two calls.
    """

    def __init__(self, scorer: _Reloadable, every_s: float) -> None:
        self._stopped = threading.Event()
        parts = weakref.ref(scorer), self._stopped, every_s
        self._thread = threading.Thread(target=_follow, args=parts, name="vista-follow", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and wait for a running reload to finish."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()


def _follow(reference: weakref.ref[_Reloadable], stopped: threading.Event, every_s: float) -> None:
    problem = ""
    while not stopped.wait(every_s):
        scorer = reference()
        if scorer is None:
            return
        try:
            scorer.reload()
        except Exception as error:  # The thread must survive any error of the store or the disk.
            if stopped.is_set():
                return
            text = f"{type(error).__name__}: {error}"
            if text != problem:
                logger.warning("reload failed; the previous model and store stay in service: %s", text)
            problem = text
        else:
            if problem:
                logger.info("reload works again")
            problem = ""
        del scorer
