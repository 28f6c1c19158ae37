"""A progress bar over runs of very different lengths, with an estimate of the time left and an optional time limit."""

from __future__ import annotations

import _thread
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from tqdm import tqdm

TERMINAL_S, FILE_S = 1.0, 60.0
"""Seconds between two drawings of the bar, on a terminal and in a log file."""


class RowProgress:
    """A bar in estimated seconds. It moves during a run, and corrects the estimates by the finished runs.

    with RowProgress([60, 1200], limit_s=600) as progress:
        for name in ("popularity, seed 0", "vista, seed 1"):
            with progress.run(name):
                ...
    """

    def __init__(
        self,
        estimates_s: Sequence[float],
        limit_s: float | None = None,
        *,
        every_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            estimates_s: estimate per run, in the order of the runs.
            limit_s: interrupt the main thread, as Ctrl-C does, this long after the start; None for no limit.
            every_s: seconds between two drawings of the bar; None chooses TERMINAL_S or FILE_S.
            clock: the time in seconds.
        """
        self._estimates = [max(estimate, 1e-3) for estimate in estimates_s]
        self._finished = 0
        self._measured = 0.0
        self._run_began: float | None = None
        self._now = clock
        self._every_s = every_s or (TERMINAL_S if sys.stderr.isatty() else FILE_S)
        self._deadline = None if limit_s is None else clock() + limit_s
        self.expired = False
        """Whether the limit has passed."""
        self._ended = threading.Event()
        self._bar: tqdm[None] = tqdm(total=sum(self._estimates), bar_format="{l_bar}{bar}|", dynamic_ncols=True)
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> RowProgress:
        self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._ended.set()
        self._clock.join()
        self._draw()
        self._bar.close()

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Enclose the next run.

        Raises:
            KeyboardInterrupt: if the limit has already passed.
        """
        self.check()
        self._bar.set_description(f"{self._finished + 1} of {len(self._estimates)}: {name}", refresh=False)
        self._run_began = self._now()
        self._draw()
        yield
        self._measured += self._now() - self._run_began
        self._run_began = None
        self._finished += 1

    def check(self) -> None:
        """Raise KeyboardInterrupt if the limit has passed, since an interrupted step may have finished anyway."""
        if self.expired:
            raise KeyboardInterrupt("stopped at the time limit; rerun the command to resume")

    def left_s(self) -> float:
        """Estimated seconds until all runs end."""
        pace = self._pace()
        elapsed = 0.0 if self._run_began is None else self._now() - self._run_began
        running, waiting = self._estimates[self._finished : self._finished + 1], self._estimates[self._finished + 1 :]
        return max(pace * sum(running) - elapsed, 0.0) + pace * sum(waiting)

    def _pace(self) -> float:
        """Measured over estimated seconds of the finished runs."""
        return self._measured / sum(self._estimates[: self._finished]) if self._finished else 1.0

    def _draw(self) -> None:
        left = self.left_s()
        self._bar.n = self._bar.total - min(left / max(self._pace(), 1e-9), self._bar.total)
        self._bar.bar_format = "{l_bar}{bar}| {elapsed}, about " + tqdm.format_interval(left) + " left"
        self._bar.refresh()

    def _tick(self) -> None:
        while True:
            wait = self._every_s
            if self._deadline is not None:
                wait = min(wait, max(self._deadline - self._now(), 0.0))
            if self._ended.wait(wait):
                return
            if self._deadline is not None and self._now() >= self._deadline:
                self._deadline, self.expired = None, True
                _thread.interrupt_main()
            self._draw()
