"""Open scorers, which the sessions of the page share."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass

from vista.errors import VistaError
from vista.scorer import Scorer


@dataclass(slots=True)
class _Open:
    """An open scorer, and the number of running `lending` blocks that have borrowed it."""

    scorer: Scorer
    num_borrowers: int = 0


@dataclass(frozen=True, slots=True)
class _Failure:
    """Why a scorer could not be opened, and when."""

    error: VistaError
    at_s: float


class ScorerPool:
    """Keeps up to `limit` scorers open between reruns of the page; beyond that, closes the least recently borrowed one.

    A borrowed scorer stays open until its `lending` block ends, so more than `limit` may be open temporarily. Threads
    that need the same scorer wait until one of them has opened it; other threads do not wait.

    Args:
        limit: how many scorers can stay open without a borrower.
        retry_s: seconds to wait after a scorer could not be opened, so that many sessions do not each try.
    """

    def __init__(self, limit: int, retry_s: float = 5.0) -> None:
        self._limit, self._retry_s = limit, retry_s
        self._lock = threading.Lock()
        """Guards the fields below. Never held while a scorer is opened or closed."""
        self._open: dict[Hashable, _Open] = {}
        """By key, the least recently borrowed first."""
        self._opening: dict[Hashable, threading.Lock] = {}
        """By key, held while its scorer is opened."""
        self._failures: dict[Hashable, _Failure] = {}
        self._borrowed: ContextVar[dict[Hashable, _Open] | None] = ContextVar("borrowed", default=None)
        """Scorers that the `lending` block of this thread has borrowed."""

    def __len__(self) -> int:
        return len(self._open)

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Let this thread `borrow` scorers, which stay open until the block ends."""
        borrowed: dict[Hashable, _Open] = {}
        token = self._borrowed.set(borrowed)
        try:
            yield
        finally:
            self._borrowed.reset(token)
            with self._lock:
                for each in borrowed.values():
                    each.num_borrowers -= 1
            self._close_spare()

    def borrow(self, key: Hashable, opener: Callable[[], Scorer]) -> Scorer:
        """The scorer of a key, which is opened if needed. Call it inside a `lending` block.

        Raises:
            VistaError: from `opener`; within `retry_s` after a failure, raised again without another try.
        """
        borrowed = self._borrowed.get()
        assert borrowed is not None, "scorers are borrowed within `lending`"
        with self._lock:
            opening = self._opening.setdefault(key, threading.Lock())
        with opening:
            scorer = self._lend(key, borrowed) or self._lend_new(key, borrowed, opener)
        self._close_spare()
        return scorer

    def _lend(self, key: Hashable, borrowed: dict[Hashable, _Open], new: Scorer | None = None) -> Scorer | None:
        """Lend the scorer of a key that is open, or a new one; None if there is neither."""
        with self._lock:
            each = self._open.pop(key, None) or (None if new is None else _Open(new))
            if each is None:
                return None
            self._open[key] = each
            if key not in borrowed:
                borrowed[key] = each
                each.num_borrowers += 1
            return each.scorer

    def _lend_new(self, key: Hashable, borrowed: dict[Hashable, _Open], opener: Callable[[], Scorer]) -> Scorer:
        failure = self._failures.get(key)
        if failure is not None and time.monotonic() - failure.at_s < self._retry_s:
            raise copy(failure.error)
        try:
            scorer = opener()
        except VistaError as error:
            self._failures[key] = _Failure(copy(error), time.monotonic())  # a copy, which holds no traceback
            raise
        self._failures.pop(key, None)
        lent = self._lend(key, borrowed, scorer)
        assert lent is scorer, "only the thread that holds a key's lock adds its scorer"
        return lent

    def _close_spare(self) -> None:
        with self._lock:
            spare = [key for key, each in self._open.items() if not each.num_borrowers]
            closed = [self._open.pop(key) for key in spare[: max(0, len(self._open) - self._limit)]]
        for each in closed:
            each.scorer.close()
