"""A process of the scorer's benchmark that only serves, as a worker of a ranking service does.

It imports only what a service would, so that its memory is that of a service. It reads lines of JSON from stdin, first
what to open (`WorkerOpening`), then what to serve (`WorkerOrder`), and writes an answer per order to stdout.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vista.device import set_threads
from vista.scorer import Scorer


@dataclass(frozen=True, slots=True)
class WorkerOpening:
    """What to open; each request scores `candidates` of the items for the next user."""

    model: str
    store: str
    task: str
    users: list[int]
    items: list[int]
    candidates: int


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """Serve from `start` (time.monotonic) for some seconds or requests, whichever ends first."""

    start: float = 0.0
    seconds: float = float("inf")
    requests: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    """What was served, the sum of the first request's scores, and the private memory of the process."""

    requests: int
    seconds: float
    first_sum: float
    private_bytes: int


def private_dirty_bytes(smaps_rollup: str) -> int:
    """Memory that a process has written and does not share, from its /proc/…/smaps_rollup."""
    match = re.search(r"^Private_Dirty: +(\d+) kB", smaps_rollup, re.MULTILINE)
    if match is None:
        raise SystemExit("error: /proc/self/smaps_rollup has no Private_Dirty; this benchmark requires Linux")
    return 1024 * int(match[1])


def main() -> None:
    """Serve until stdin ends."""
    set_threads(1)
    opening = WorkerOpening(**json.loads(sys.stdin.readline()))
    with Scorer.open(opening.model, opening.store, task=opening.task) as scorer:
        pools = [scorer.encode(part) for part in np.reshape(opening.items, (-1, opening.candidates))]
        work = list(itertools.product(pools, opening.users))
        for line in sys.stdin:
            order = WorkerOrder(**json.loads(line))
            time.sleep(max(0.0, order.start - time.monotonic()))
            began, served, first_sum = time.monotonic(), 0, float("nan")
            while served < order.requests and time.monotonic() < began + order.seconds:
                pool, user = work[served % len(work)]
                scores = scorer.score([user], pool)
                first_sum = first_sum if served else float(scores.sum())
                served += 1
            seconds = time.monotonic() - began
            private = private_dirty_bytes(Path("/proc/self/smaps_rollup").read_text())
            print(json.dumps(dataclasses.asdict(WorkerAnswer(served, seconds, first_sum, private))), flush=True)


if __name__ == "__main__":
    main()
