"""A thread that calls a scorer's `reload` at regular intervals."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Protocol

from vista.scorer.forks import repair_after_fork

logger = logging.getLogger(__name__)


class _Reloadable(Protocol):
    """What is followed: a `Scorer`."""

    def reload(self) -> bool: ...


class Follower:
    """Calls `reload` at regular intervals in a daemon thread, between `start` and `stop`, while the scorer exists.

    The scorer counts errors. An error is logged only if it differs from the previous one.

    Args:
        scorer: only a weak reference is kept, so that the thread does not keep the scorer alive.
    """

    def __init__(self, scorer: _Reloadable) -> None:
        self._scorer = weakref.ref(scorer)
        self._running: tuple[threading.Thread, threading.Event] | None = None
        repair_after_fork(self)

    def start(self, every_s: float) -> None:
        """Call `reload` every `every_s` seconds, instead of at an earlier interval.

        Raises:
            ValueError: every_s is not positive or too large.
        """
        if not 0 < every_s <= threading.TIMEOUT_MAX:
            raise ValueError(f"every_s: must be positive and at most {threading.TIMEOUT_MAX:.0f}, got {every_s}")
        self.stop()
        stopped = threading.Event()
        parts = self._scorer, stopped, every_s
        thread = threading.Thread(target=_follow, args=parts, name="vista-follow", daemon=True)
        self._running = thread, stopped
        thread.start()

    def stop(self) -> None:
        """End the thread, if there is one, and wait for a running reload to finish."""
        running, self._running = self._running, None
        if running is not None:
            thread, stopped = running
            stopped.set()
            if thread is not threading.current_thread():
                thread.join()

    def after_fork(self) -> None:
        """Forget the thread, which only the parent has."""
        self._running = None


def _follow(reference: weakref.ref[_Reloadable], stopped: threading.Event, every_s: float) -> None:
    problem = ""
    while not stopped.wait(every_s):
        scorer = reference()
        if scorer is None:
            return
        try:
            scorer.reload()
        except (SystemExit, KeyboardInterrupt):
            raise
        except BaseException as error:  # Panics of extensions in Rust are not Exceptions.
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
