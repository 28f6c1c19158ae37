"""Seconds per stage of a refresh."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

STAGES = ("read", "summarize", "encode", "wait", "write", "publish")
"""In a refresh with Ray, `wait` is the time until the actors return the next batch, and the first three are theirs."""


class StageClock:
    """Adds up the seconds that are spent in each of `STAGES`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage, self._entered = "", 0.0

    def stage(self, name: str) -> Self:
        """Context whose time counts toward a stage."""
        self._stage = name
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds[self._stage] += time.perf_counter() - self._entered
