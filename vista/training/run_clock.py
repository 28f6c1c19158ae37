"""The time that is left of a training run."""

from __future__ import annotations

import time

from tqdm import tqdm


class RunClock:
    """Extrapolates from what this process has done of a run, with validations, since it was first asked."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        """Seconds, and the share of the run that was done."""

    def left(self, share_done: float) -> dict[str, str]:
        """{"run": "1:02:03 left"}; empty where it cannot be known yet.

        Args:
            share_done: of the run; 0 if it is unknown.
        """
        now = time.monotonic()
        if self._began is None:
            self._began = (now, share_done) if share_done > 0 else None
            return {}
        seconds, done = now - self._began[0], share_done - self._began[1]
        if done <= 0:
            return {}
        return {"run": f"{tqdm.format_interval(seconds / done * max(0.0, 1 - share_done))} left"}
