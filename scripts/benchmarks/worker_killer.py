"""Kills workers of a service at random."""

from __future__ import annotations

import os
import random
import signal
import threading
import time

from scripts.benchmarks.serve_load import ServiceProcess

START_S = 600.0
"""Longest time until another worker listens."""


class WorkerKiller:
    """A thread that sends SIGKILL to a random worker, again and again, between `start` and `stop`.

    It waits until all workers listen before it kills the next one: without any, nobody could answer.

    Args:
        service: with several workers.
        num_workers: number of its workers.
        gap_s: mean time from a complete service to the next kill; gaps are random (exponential).
    """

    def __init__(self, service: ServiceProcess, num_workers: int, gap_s: float) -> None:
        self._service, self._num_workers, self._gap_s = service, num_workers, gap_s
        self._random = random.Random(0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.restarts_s: list[float] = []
        """Per kill, the time until another worker listened."""
        self.failures: list[str] = []

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End, once all workers listen."""
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(self._random.expovariate(1 / self._gap_s)):
            worker = self._random.choice(self._service.workers())
            os.kill(worker, signal.SIGKILL)
            began = time.monotonic()
            while not self._is_complete(without=worker):
                if time.monotonic() - began > START_S:
                    self.failures.append(f"no worker replaced {worker} within {START_S:.0f} s")
                    return
                time.sleep(0.1)
            self.restarts_s.append(time.monotonic() - began)

    def _is_complete(self, without: int) -> bool:
        """Whether all workers listen. The port of a process that was killed may be open for a moment longer."""
        workers = self._service.workers()
        enough = len(workers) == self._num_workers == self._service.num_listening()
        return enough and without not in workers
