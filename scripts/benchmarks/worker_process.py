"""Starts processes of scorer_worker.py and sends them orders."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from scripts.benchmarks.scorer_worker import WorkerAnswer, WorkerOpening, WorkerOrder, private_dirty_bytes

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class WorkerProcess:
    """A running process of scorer_worker.py."""

    stdin: IO[str]
    stdout: IO[str]

    def send(self, order: WorkerOpening | WorkerOrder) -> None:
        """Send its opening, or an order whose result `answer` returns."""
        self.stdin.write(json.dumps(dataclasses.asdict(order)) + "\n")
        self.stdin.flush()

    def answer(self) -> WorkerAnswer:
        """Wait for the answer to the last order.

        Raises:
            SystemExit: if the process has ended.
        """
        line = self.stdout.readline()
        if not line:
            raise SystemExit("error: a worker process failed; see above")
        return WorkerAnswer(**json.loads(line))

    def serve(self, order: WorkerOrder) -> WorkerAnswer:
        """Send an order and wait for its answer."""
        self.send(order)
        return self.answer()


@contextmanager
def worker(opening: WorkerOpening) -> Iterator[WorkerProcess]:
    """A fresh process of one thread that has opened a scorer; it ends with the context."""
    command = [sys.executable, "-m", "scripts.benchmarks.scorer_worker"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY, env=_one_thread()
    ) as child:
        assert child.stdin is not None and child.stdout is not None
        opened = WorkerProcess(child.stdin, child.stdout)
        opened.send(opening)
        opened.serve(WorkerOrder(requests=3))
        yield opened


def idle_torch_bytes() -> int:
    """Private memory of a fresh process that only imported torch."""
    command = "import torch; print(open('/proc/self/smaps_rollup').read())"
    done = subprocess.run(
        [sys.executable, "-c", command], capture_output=True, text=True, check=True, env=_one_thread()
    )
    return private_dirty_bytes(done.stdout)


def _one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
