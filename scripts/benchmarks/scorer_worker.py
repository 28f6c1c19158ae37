"""A process of the scorer's benchmark that does nothing but serve: what a ranking service runs several of.

It imports what a service would and no more, so its memory is that of a service. Lines of JSON come in on stdin, one
answer each goes out on stdout: first what to open (`WorkerOpening`), then what to serve (`WorkerOrder`).
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
    """Served are `candidates` item ids at a time, for one user after the other."""

    model: str
    store: str
    task: str
    users: list[int]
    items: list[int]
    candidates: int


@dataclass(frozen=True, slots=True)
class WorkerOrder:
    """Serve so many requests, or from `start` on (time.monotonic) for so many seconds, whatever ends first."""

    start: float = 0.0
    seconds: float = float("inf")
    requests: int = sys.maxsize


@dataclass(frozen=True, slots=True)
class WorkerAnswer:
    """What was served, the first request's scores added up, and what memory the process has to itself."""

    requests: int
    seconds: float
    first_sum: float
    private_bytes: int


def private_dirty_bytes(smaps_rollup: str) -> int:
    """Memory that a process has written and shares with no other, from its /proc/…/smaps_rollup."""
    found = re.search(r"^Private_Dirty: +(\d+) kB", smaps_rollup, re.MULTILINE)
    if found is None:
        raise SystemExit("error: /proc/self/smaps_rollup has no Private_Dirty; this benchmark needs Linux")
    return 1024 * int(found[1])


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
