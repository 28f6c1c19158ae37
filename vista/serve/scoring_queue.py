"""Computes requests in a few threads, and refuses what it cannot compute in time."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from vista.errors import DeadlineError, OverloadedError

Result = TypeVar("Result")


class ScoringQueue:
    """A queue of limited length in front of a few threads.

    Args:
        num_threads: requests that are computed at the same time.
        limit: most requests that wait or are computed.
    """

    def __init__(self, num_threads: int, limit: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "vista-serve")
        self._limit = limit
        self._depth = 0
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        """Requests that wait or are computed."""
        return self._depth

    def require_room(self) -> None:
        """Raise OverloadedError if the queue is full."""
        if self._depth >= self._limit:
            raise OverloadedError(f"{self._depth} requests are already waiting; send this one again later")

    async def run(self, call: Callable[[], Result], timeout_s: float) -> Result:
        """The result of a call, which runs in a thread.

        A call that has not started by its deadline never starts. One that has started keeps its place until it ends.

        Raises:
            OverloadedError: the queue is full.
            DeadlineError: there is no result after `timeout_s` seconds.
        """
        with self._lock:
            self.require_room()
            self._depth += 1
        held = [call]  # The pool keeps a call that never starts until a thread is free. It must not keep its body.
        future: Future[Result] = self._pool.submit(lambda: held.pop()())
        future.add_done_callback(self._finished)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError:
            raise DeadlineError("there was no result in time; send fewer candidates, or allow more time") from None
        finally:
            held.clear()

    def close(self) -> None:
        """Wait for running calls, and end the threads."""
        self._pool.shutdown()

    def _finished(self, _: Future[Any]) -> None:
        with self._lock:
            self._depth -= 1
