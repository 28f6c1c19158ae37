"""Benchmark a full refresh in two actors of Ray against two processes that refresh one shard each.

    python -m scripts.benchmarks.bench_ray

Both are commands with one thread per process or actor, on the same log and model (d=64, K=32, tail of 32, int8, random
weights), and include the start of Python, torch, and Ray. They alternate. Events per second are those of the log over
the time from the start to the end of the last process. Memory is the largest sum of the proportional set sizes (PSS) of
all processes that a side started; for Ray, this includes its services and the process that writes the store. The Ray
side writes one store, the other side two shards of one. Both must cover the same histories, and their summaries be the
same up to rounding to int8, because a shard's batches hold other users.
"""

from __future__ import annotations

import itertools
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark import BenchmarkRecorder, recording
from scripts.benchmarks.workloads import lifelong_log, untrained
from vista.log.event_log import EventLog
from vista.store.reader import open_store

EVENTS_PER_USER, NUM_ITEMS = 1_000, 50_000
SAMPLE_S = 0.2


@dataclass(frozen=True, slots=True)
class SideResult:
    """One run of one side."""

    seconds: float
    first_s: float
    """Until the first batch was durable."""
    peak_bytes: int


def run_side(commands: Sequence[Sequence[str]], store: Path, folder: Path) -> SideResult:
    """Run commands at the same time, and sample the memory of all their processes.

    Raises:
        SystemExit: a command failed.
    """
    began = time.perf_counter()
    peak, first_s = 0, 0.0
    with open(folder / "errors.txt", "w+", encoding="utf-8") as errors:
        processes = [
            subprocess.Popen([sys.executable, "-m", "vista.cli.main", *words], stdout=errors, stderr=errors)
            for words in commands
        ]
        while any(process.poll() is None for process in processes):
            peak = max(peak, sum(map(pss_bytes, descendants([process.pid for process in processes]))))
            if not first_s and any(store.rglob("refresh.jsonl")):
                first_s = time.perf_counter() - began
            time.sleep(SAMPLE_S)
        seconds = time.perf_counter() - began
        if any(process.returncode for process in processes):
            errors.seek(0)
            raise SystemExit(f"error: a refresh failed:\n{errors.read()}")
    return SideResult(seconds, first_s or seconds, peak)


def descendants(roots: Sequence[int]) -> Iterator[int]:
    """Process ids of running processes and all their descendants."""
    children = defaultdict(list)
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has ended
            continue
        children[parent].append(int(path.parent.name))
    remaining = list(roots)
    while remaining:
        process = remaining.pop()
        yield process
        remaining += children[process]


def pss_bytes(process: int) -> int:
    """Memory of a process, where shared pages count in proportion; 0 if it has ended."""
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0
    match = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    return int(match[1]) << 10 if match else 0


def check_equal(one: Path, other: Path, log: EventLog) -> None:
    """Compare the summaries of a sample of users.

    Raises:
        SystemExit: they differ.
    """
    users = log.users.ids(np.arange(0, log.num_users, max(log.num_users // 500, 1))).tolist()
    with open_store(one) as a, open_store(other) as b:
        first, second = a.get_many(users), b.get_many(users)
        close = np.allclose(first.summary, second.summary, atol=0.02 * float(np.abs(first.summary).max()))
        same = (first.history_digest == second.history_digest).all()
        if len(a) != len(b) or not first.found.all() or not (close and same):
            raise SystemExit(f"error: {one} and {other} hold different summaries")


def bench_ray(recorder: BenchmarkRecorder, folder: Path, num_users: int, rounds: int) -> None:
    """Time both sides in alternation."""
    weight = np.random.default_rng(0).lognormal(0.0, 1.0, num_users)
    lengths = np.maximum(np.rint(weight / weight.mean() * EVENTS_PER_USER), 20).astype(np.int64)
    log = lifelong_log(folder / "log", lengths.tolist(), num_items=NUM_ITEMS)
    untrained(log, dim=64, num_seeds=32).save_pretrained(folder / "model")
    common = ["refresh", f"data={folder / 'log'}", f"model={folder / 'model'}", "device=cpu", "num_threads=1"]
    common += ["progress=false", "verify_log=false"]
    results: dict[str, list[SideResult]] = {"shards": [], "ray": []}
    for number, side in itertools.product(range(rounds), results):
        store = folder / f"{side}-{number}"
        own = [*common, f"store={store}"]
        sides = {
            "shards": [[*own, f"shard={index}/2"] for index in range(2)],
            "ray": [[*own, "engine=ray", "ray.num_actors=2"]],
        }
        results[side].append(run_side(sides[side], store, folder))
    check_equal(folder / "shards-0", folder / "ray-0", log)
    case = f"refresh of {log.num_users:,} users, {log.num_events:,} events, in two actors of Ray against two processes"

    def both(measured: str) -> tuple[float, float]:
        values = {side: statistics.median(getattr(run, measured) for run in runs) for side, runs in results.items()}
        return values["ray"], values["shards"]

    ray_s, shards_s = both("seconds")
    rate, baseline = log.num_events / ray_s, log.num_events / shards_s
    recorder.add(f"{case}: rate", rate, "events/s", baseline=baseline, better="more", bar="ratio >= 0.8")
    memory, baseline = both("peak_bytes")
    recorder.add(f"{case}: memory", memory / 1e6, "MB", baseline=baseline / 1e6, bar="value <= 2 * baseline")
    first, baseline = both("first_s")
    recorder.add(f"{case}: first batch", first, "s", baseline=baseline)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    with recording("ray", __doc__, arguments) as recorder:
        num_users, rounds = (500, 1) if recorder.quick else (24_000, 3)
        bench_ray(recorder, recorder.folder, num_users, rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
