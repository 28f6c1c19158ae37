"""A progress bar over runs of very different lengths, with an optional time limit."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType

from vista.progress_bar import progress_bar, progress_shown, ticking


class RowProgress:
    """A bar in estimated seconds, which moves when a run ends.

    with RowProgress([60, 1200], limit_s=600) as progress:
        for name in ("popularity, seed 0", "vista, seed 1"):
            with progress.run(name):
                ...
    """

    def __init__(self, estimates_s: Sequence[float], limit_s: float | None = None) -> None:
        """
        Args:
            estimates_s: estimate per run, in the order of the runs.
            limit_s: interrupt the main thread, as Ctrl-C does, this long after the start; None for no limit.
        """
        self._estimates, self._finished = [max(estimate, 1e-3) for estimate in estimates_s], 0
        self.expired = False
        """Whether the limit has passed."""
        self._limit = threading.Timer(limit_s or 0.0, self.expire)
        self._limit.daemon = True
        if limit_s is not None:
            self._limit.start()
        with progress_shown():
            self._bar = progress_bar(total=round(sum(self._estimates), 1), desc="runs", unit="s")

    def __enter__(self) -> RowProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._limit.cancel()
        self._bar.close()

    @contextmanager
    def run(self, name: str) -> Iterator[None]:
        """Enclose the next run.

        Raises:
            KeyboardInterrupt: if the limit has already passed.
        """
        self.check()
        self._bar.set_description(f"{self._finished + 1} of {len(self._estimates)}: {name}", refresh=False)
        with ticking(self._bar):
            yield
        self._bar.update(self._estimates[self._finished])
        self._finished += 1

    def check(self) -> None:
        """Raise KeyboardInterrupt if the limit has passed, since an interrupted step may have finished anyway."""
        if self.expired:
            raise KeyboardInterrupt("stopped at the time limit; rerun the command to resume")

    def expire(self) -> None:
        """End the time: interrupt the main thread."""
        self.expired = True
        _thread.interrupt_main()
