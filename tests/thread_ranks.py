"""Ranks that are threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from vista.ranks import Ranks

Result = TypeVar("Result")


class ThreadRank(Ranks):
    """A rank that can gather values, and nothing else."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._values, self._barrier = rank, len(values), values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(timeout=60)
        values = list(self._values)
        self._barrier.wait(timeout=60)
        return values


def on_ranks(num_ranks: int, work: Callable[[Ranks], Result]) -> list[Result]:
    """What each of some ranks returns."""
    values, barrier = [None] * num_ranks, threading.Barrier(num_ranks)
    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(lambda rank: work(ThreadRank(rank, values, barrier)), range(num_ranks)))
