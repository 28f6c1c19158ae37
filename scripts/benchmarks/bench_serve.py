"""Benchmark the HTTP service against a scorer in the same process, and JSON against other bodies.

    python -m scripts.benchmarks.bench_serve

`vista serve` runs with one worker and one torch thread on one core, and its clients on another; in-process calls run on
the worker's core, while the service is idle. Rounds alternate, so that a slow phase of the machine affects both. The
bodies of requests are encoded beforehand. Models have random weights.

- throughput: requests per second of four clients that each wait for their answers, against calls in a loop. The same by
  CPU time, which other programs on the machine affect less.
- latency: at half of the measured throughput, with equal gaps between requests, and with random ones (Poisson). With
  random gaps, requests queue behind each other in any server with one core.
- bodies: the CPU time of the service per request with JSON and with MessagePack.
"""

from __future__ import annotations

import json
import os
import sys
import time
from statistics import median

import msgspec
import numpy as np
from numpy.typing import NDArray

from scripts.benchmarks.bench_scorer import ScorerWorkload
from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, recording
from scripts.benchmarks.serve_load import Connection, ServiceProcess, closed_loop, encoded, paced, serving
from scripts.benchmarks.workloads import TASK, lifelong_log, untrained
from vista.device import set_threads
from vista.scorer import Scorer

NUM_USERS, NUM_REQUESTS, NUM_CLIENTS = 64, 16, 4
SIZES = (500, 5000)
NOW = 1_767_400_000_000
MSGPACK = "application/msgpack"


class Requests:
    """The same requests as calls and as bodies: one user, and distinct candidates."""

    def __init__(self, workload: ScorerWorkload, num_candidates: int) -> None:
        rng = np.random.default_rng(1)
        self.users = rng.integers(1, NUM_USERS + 1, NUM_REQUESTS).tolist()
        self.lists = [workload.candidates(num_candidates) for _ in self.users]
        for ids in self.lists:
            rng.shuffle(ids)
        bodies = [{"users": [user], "now": NOW} for user in self.users]
        self.json = [
            encoded("/v1/score", json.dumps({**body, "candidates": ids.tolist()}).encode())
            for body, ids in zip(bodies, self.lists, strict=True)
        ]
        self.msgpack = [
            encoded("/v1/score", msgspec.msgpack.encode({**body, "candidates": ids.astype("<i8").tobytes()}), MSGPACK)
            for body, ids in zip(bodies, self.lists, strict=True)
        ]

    def call(self, scorer: Scorer, place: int) -> NDArray[np.float32]:
        """The scores of a request, in this process."""
        row = place % NUM_REQUESTS
        scores: NDArray[np.float32] = scorer.score([self.users[row]], self.lists[row], now=NOW)[0]
        return scores


def check(port: int, scorer: Scorer, requests: Requests) -> None:
    """Require the same bits from both bodies as in this process."""
    connection = Connection(port)
    for place in range(NUM_REQUESTS):
        expected = requests.call(scorer, place)
        _, body = connection.send(requests.json[place])
        assert np.array_equal(np.array(json.loads(body)["scores"][0], np.float32), expected)
        _, body = connection.send(requests.msgpack[place])
        assert msgspec.msgpack.decode(body)["scores"] == expected.tobytes()
    connection.close()


def calls_in_process(scorer: Scorer, requests: Requests, seconds: float) -> tuple[float, float]:
    """Calls per second, and seconds of CPU time per call."""
    began, cpu, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - began < seconds:
        requests.call(scorer, count)
        count += 1
    return count / (time.perf_counter() - began), (time.process_time() - cpu) / count


def load(service: ServiceProcess, bodies: list[bytes], seconds: float) -> tuple[float, float]:
    """Answers per second, and seconds of the service's CPU time per answer."""
    cpu = service.cpu_s()
    count, took = closed_loop(service.port, bodies, NUM_CLIENTS, seconds)
    return count / took, (service.cpu_s() - cpu) / count


def bench_throughput(
    recorder: BenchmarkRecorder, workload: ScorerWorkload, scorer: Scorer, service: ServiceProcess, cores: list[int]
) -> None:
    """Requests per second, latencies at half of it, and the cost of bodies."""
    rounds, seconds = (3, 0.2) if recorder.quick else (9, 2.0)
    for size in SIZES:
        requests, name = Requests(workload, size), f"{workload}, {size:,} candidates"
        check(service.port, scorer, requests)
        measured: dict[str, list[tuple[float, float]]] = {"in process": [], "JSON": [], "MessagePack": []}
        for _ in range(rounds):
            os.sched_setaffinity(0, {cores[0]})
            measured["in process"].append(calls_in_process(scorer, requests, seconds))
            os.sched_setaffinity(0, {cores[-1]})
            measured["JSON"].append(load(service, requests.json, seconds))
            measured["MessagePack"].append(load(service, requests.msgpack, seconds))
        own_rate, own_cpu = (median(column) for column in zip(*measured["in process"], strict=True))
        for body in ("JSON", "MessagePack"):
            rate, cpu = (median(column) for column in zip(*measured[body], strict=True))
            has_bar = body == "JSON" and size == SIZES[0]
            recorder.add(
                f"{name}, {body}: requests per second over HTTP against in process",
                rate,
                "/s",
                baseline=own_rate,
                better="more",
                bar="value >= 0.6 * baseline" if has_bar else None,
            )
            recorder.add(
                f"{name}, {body}: CPU time per request over HTTP against in process",
                cpu * 1e3,
                "ms",
                baseline=own_cpu * 1e3,
            )
        if size == SIZES[0]:
            rate = median(rate for rate, _ in measured["JSON"])
            bench_latency(recorder, name, service, requests, rate)


def bench_latency(
    recorder: BenchmarkRecorder, name: str, service: ServiceProcess, requests: Requests, rate: float
) -> None:
    """Quantiles at half of a rate; the p99 is compared with the median."""
    count = int(rate / 2 * (1 if recorder.quick else 20)) + 1
    gaps = np.full(count, 2 / rate)
    for kind, some in (("equal", gaps), ("random", np.random.default_rng(2).exponential(gaps))):
        latencies = paced(service.port, requests.json, some)
        p50, p99 = np.quantile(latencies, [0.5, 0.99])
        recorder.add(
            f"{name}: p99 at half load, {kind} gaps, against the median",
            p99 * 1e3,
            "ms",
            baseline=p50 * 1e3,
            bar="value <= 2 * baseline" if kind == "equal" else None,
        )


def main() -> int:
    """Run the benchmark."""
    arguments = benchmark_parser("serve", __doc__).parse_args()
    set_threads(1)
    cores = sorted(os.sched_getaffinity(0))
    sizes = [(32, 8)] if arguments.quick else [(64, 16), (256, 128)]
    with recording("serve", __doc__, arguments) as recorder:
        root = recorder.folder
        log = lifelong_log(root / "log", [200] * NUM_USERS, num_items=20_000)
        for dim, num_seeds in sizes:
            model = untrained(log, dim=dim, num_seeds=num_seeds)
            workload = ScorerWorkload.make(model, log, root / f"served-{dim}")
            with (
                Scorer.open(workload.model_dir, workload.store, task=TASK) as scorer,
                serving(workload.model_dir, workload.store, "deadline_s=60", cores={cores[0]}) as service,
            ):
                bench_throughput(recorder, workload, scorer, service, cores)
                os.sched_setaffinity(0, set(cores))
    return 0


if __name__ == "__main__":
    sys.exit(main())
