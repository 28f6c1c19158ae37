"""Benchmark requests against the length of the history, the roofline, and models that read the history.

    python -m scripts.benchmarks.bench_scorer

A request is `scorer.score(users, candidates)`: the store's look-up, checksum and dequantization, and target attention
of all candidates over summary and tail. Users are complete: their events are in an EventLog, a refresh writes their
summaries (int8) and tails to a store, and a Scorer opens the store and the model's folder. Weights are random, and
nothing is cached between calls.

- history: users with 10^3 and 10^6 events and the same candidates, and candidate lists of other lengths.
- roofline: the matrix products that no implementation can avoid (scorer_workloads.py), in their fastest forms on this
  machine, for several numbers of candidates and users, encoded beforehand.
- layers: pointwise layers, the default, against equally many softmax layers with feed-forward networks.
- counters: models with counters of 64 items per user, the default, against the same models without; and those with
  counters of a category too.
- features: models with eight features of items and four of requests, against the same models with ids alone.
- recompute: the same scorer without a store, which reads and summarizes the history in the request, with bidirectional
  mixing (the paper without a cache) and with separable mixing.
- baselines: HSTU and SASRec of the same width and depth, which read the whole history in the request.
- processes: two processes of one thread each against one process, and the memory of one process.

Contestants alternate, so that a slow phase of the machine affects all of them.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import IO, Any
from unittest.mock import patch

import numpy as np
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, Timing, benchmark_parser, interleaved, recording
from scripts.benchmarks.scorer_worker import WorkerAnswer, WorkerOpening, WorkerOrder, private_dirty_bytes
from scripts.benchmarks.scorer_workloads import (
    CATEGORIES_OF_ITEMS,
    NUMBERS_OF_ITEMS,
    REQUEST,
    ScorerWorkload,
    recomputed_summaries,
    scorer_roofline,
    untrained_with_category,
    untrained_with_features,
)
from scripts.benchmarks.workloads import TASK, lifelong_log, untrained, untrained_baseline
from scripts.experiments.serving_cost import history_model_server
from vista.arrays import Int
from vista.config.checks import Architecture, Mixing, Precision, TargetAttentionKind
from vista.device import choose_precision, keep_freed_memory, set_threads
from vista.model.ranking_model import NEXT_TASK
from vista.scorer import Scorer

NUM_CANDIDATES = 500
SMALL, PUBLISHED = (64, 16), (256, 128)
"""(d, K) of the models."""
CALLS = {
    "500 candidates": (1, 500),
    "50 candidates": (1, 50),
    "5,000 candidates": (1, 5000),
    "32 users x 100 candidates": (32, 100),
}
"""(B, C) of the calls that are compared with their rooflines; the other ratios are compared with the first."""
FEATURE_CALLS = {case: CALLS[case] for case in ("500 candidates", "32 users x 100 candidates")}
ROOFLINE_BARS = {Precision.float32: 1.5, Precision.bfloat16: 2.5}
PAPERS_SPEEDUP = 16.7
TOLERANCE = {Precision.float32: 1e-4, Precision.bfloat16: 2e-2}
"""Of probabilities, between calls of different shapes."""
INT8_TOLERANCE = 2e-2
"""Of probabilities, between int8 and float32 summaries; users differ by 0.1."""
TRAINED_LIMIT = 200
"""Events that the baselines of docs/results read (conf/model); up to this length there is no bar."""
REPOSITORY = Path(__file__).resolve().parents[2]


def check(scorer: Scorer, users: Sequence[int], ids: Int, precision: Precision = Precision.float32) -> None:
    """Require probabilities that differ between users and do not depend on the other candidates of the list."""
    tolerance = TOLERANCE[precision]
    together = scorer.score(users, ids)
    rows = np.broadcast_to(ids, together.shape)
    alone = np.concatenate([scorer.score([user], row) for user, row in zip(users, rows, strict=True)])
    few = scorer.score(users, ids[..., :20])
    assert together.shape == (len(users), ids.shape[-1]) and ((together > 0) & (together < 1)).all()
    assert np.allclose(together, alone, atol=tolerance) and np.allclose(few, together[:, :20], atol=tolerance)
    assert len(users) == 1 or not np.allclose(together[0], together[1], atol=tolerance)


def open_scorer(workload: ScorerWorkload, precision: Precision = Precision.float32) -> Scorer:
    """Open a scorer as a service does."""
    return Scorer.open(workload.model_dir, workload.store, task=TASK, precision=precision)


def bench_history(recorder: BenchmarkRecorder, workload: ScorerWorkload, lengths: tuple[int, int]) -> None:
    """Time a short and a long history (users 1 and 2), and lists of candidates."""
    rounds = 9 if recorder.quick else 41
    with open_scorer(workload) as scorer:
        ids = workload.candidates(NUM_CANDIDATES)
        check(scorer, [1, 2], ids)
        users = interleaved(
            {"short": partial(scorer.score, [1], ids), "long": partial(scorer.score, [2], ids)},
            rounds=rounds,
            warmup=5,
            min_sample_s=0.02,
        )
        recorder.add_time(
            f"{workload}, {NUM_CANDIDATES} candidates: a user of {lengths[1]:,} events against one of {lengths[0]:,}",
            users["long"],
            "ms",
            baseline=users["short"],
            bar="value <= 1.05 * baseline",
        )
        lists = {count: workload.candidates(count) for count in (50, 500, 5000)}
        contestants: dict[str, Callable[[], object]] = {
            f"{count} candidates": partial(scorer.score, [2], some) for count, some in lists.items()
        }
        contestants["500 candidates, encoded beforehand"] = partial(scorer.score, [2], scorer.encode(lists[500]))
        for case, timing in interleaved(contestants, rounds=rounds // 2 + 1, warmup=3).items():
            add_latency(recorder, f"{workload}, {case}", timing)


def add_latency(recorder: BenchmarkRecorder, case: str, timing: Timing) -> None:
    """Record the median and p99 of a call."""
    recorder.add_time(f"{case}: median", timing, "ms")
    recorder.add(f"{case}: p99", timing.p99_s * 1e3, "ms")


def bench_roofline(recorder: BenchmarkRecorder, workload: ScorerWorkload, precision: Precision) -> None:
    """Time calls of several shapes over the time of their matrix products."""
    rounds, first = 9 if recorder.quick else 41, None
    with open_scorer(workload, precision) as scorer:
        for case, (num_users, num_candidates) in CALLS.items():
            users, ids = workload.request(num_users, num_candidates)
            check(scorer, users, ids, precision)
            roofline = scorer_roofline(workload.model.config, num_users, num_candidates, precision)
            call = partial(scorer.score, users, scorer.encode(ids))
            assert np.allclose(call(), scorer.score(users, ids), atol=TOLERANCE[precision])
            timing = interleaved(
                {"ours": call, **roofline.calls()},
                rounds=rounds,
                warmup=3,
                min_sample_s=0.005
                if recorder.quick
                else 0.02,  # as long as a call, so that interruptions affect all contestants alike
            )
            seconds, ours = roofline.seconds(timing), timing["ours"]
            name = f"{workload}, {case}, {precision.value}"
            print(f"{name}: {roofline.describe(timing)}")
            recorder.add(
                f"{name}: over the roofline of its matrix products",
                ours.median_s * 1e3,
                "ms",
                baseline=seconds * 1e3,
                bar=None if first else f"value <= {ROOFLINE_BARS[precision]} * baseline",
                spread=ours.spread_s * 1e3,
            )
            ratio = ours.median_s / seconds
            if first:
                case = f"{name}: times over its roofline, against those of {NUM_CANDIDATES} candidates"
                recorder.add(case, ratio, "times", baseline=first, bar="value <= 1.3 * baseline")
            first = first or ratio


def bench_layers(
    recorder: BenchmarkRecorder, workload: ScorerWorkload, softmax: ScorerWorkload, precision: Precision
) -> None:
    """Compare requests by the kind of stage 2's layers; both workloads have the same log and sizes."""
    with open_scorer(workload, precision) as ours, open_scorer(softmax, precision) as theirs:
        for case, (num_users, num_candidates) in CALLS.items():
            users, ids = workload.request(num_users, num_candidates)
            check(theirs, users, ids, precision)
            calls = {
                "pointwise": partial(ours.score, users, ours.encode(ids)),
                "softmax": partial(theirs.score, users, theirs.encode(ids)),
            }
            timing = interleaved(calls, rounds=9 if recorder.quick else 41, warmup=3, min_sample_s=0.02)
            recorder.add_time(
                f"{workload}, {case}, {precision.value}: pointwise layers against softmax layers",
                timing["pointwise"],
                "ms",
                baseline=timing["softmax"],
            )


def bench_batches(recorder: BenchmarkRecorder, workload: ScorerWorkload) -> None:
    """Time calls with several users against one call per user: the basis of the advice in docs/guides/serve.md."""
    everyone = list(range(1, 33))
    with open_scorer(workload) as scorer:
        for num_users, count in ((8, 500), (32, 100), (32, 10)):
            pool, users = scorer.encode(workload.candidates(count)), everyone[:num_users]
            calls: dict[str, Callable[[], object]] = {
                "one": partial(scorer.score, users, pool),
                "many": lambda users=users, pool=pool: [scorer.score([user], pool) for user in users],  # type: ignore[misc]
            }
            timing = interleaved(calls, rounds=5 if recorder.quick else 15, warmup=2)
            add_batch(
                recorder, f"{workload}, {num_users} users x {count} candidates: one call against a call a user", timing
            )
        long, short = scorer.encode(workload.candidates(500)), scorer.encode(workload.candidates(10))
        values = np.concatenate([long.rows, np.tile(short.rows, 31)])
        ragged = (dataclasses.replace(long, rows=values), np.concatenate([[0], 500 + 10 * np.arange(32)]))
        calls = {
            "one": partial(scorer.score, everyone, ragged),
            "many": lambda: (scorer.score(everyone[:1], long), scorer.score(everyone[1:], short)),
        }
        assert np.allclose(scorer.score(everyone, ragged)[:500], scorer.score(everyone[:1], long)[0], atol=1e-4)
        timing = interleaved(calls, rounds=5 if recorder.quick else 15, warmup=2)
        add_batch(recorder, f"{workload}, a user x 500 and 31 x 10, ragged: one call against two", timing)


def add_batch(recorder: BenchmarkRecorder, case: str, timing: Mapping[str, Timing]) -> None:
    """Record one call against several."""
    one, many = timing["one"], timing["many"]
    recorder.add_time(case, one, "ms", baseline=many)


def bench_recompute(recorder: BenchmarkRecorder, workload: ScorerWorkload, user: int, precision: Precision) -> None:
    """Time requests with the stored summary against requests that compute it."""
    mixing, ids = workload.model.config.mixing, workload.candidates(NUM_CANDIDATES)
    with open_scorer(workload, precision) as cached, open_scorer(workload, precision) as recomputing:
        pool = cached.encode(ids)
        calls = {"cached": partial(cached.score, [user], pool), "recomputed": partial(recomputing.score, [user], pool)}
        with patch.object(recomputing.store, "get_many", recomputed_summaries(workload, precision)):
            check(recomputing, [user, user - 1], ids, precision)
            stored, made = (call() for call in calls.values())
            assert np.allclose(stored, made, atol=INT8_TOLERANCE + TOLERANCE[precision])
            assert not np.array_equal(stored, made)
            timing = interleaved(calls, rounds=5 if recorder.quick else 15)
    paper = mixing is Mixing.bidirectional and precision is Precision.float32
    recorder.add_time(
        f"{workload}, {NUM_CANDIDATES} candidates, {workload.log.lengths[user - 1]:,} events, {mixing.value}, "
        f"{precision.value}: stored against recomputed in the request",
        timing["cached"],
        "ms",
        baseline=timing["recomputed"],
        bar=f"ratio >= {PAPERS_SPEEDUP}" if paper else None,
    )


def bench_baselines(recorder: BenchmarkRecorder, workload: ScorerWorkload, num_lengths: int) -> None:
    """Compare with baselines on users 1, 2, … of rising lengths; all multiply in float32."""
    log, ids = workload.log, workload.candidates(NUM_CANDIDATES)
    limit = int(log.lengths[:num_lengths].max())
    servers = {
        which.value: history_model_server(
            untrained_baseline(log, which, dim=workload.model.config.dim, history_limit=limit), log, log.items.rows(ids)
        )
        for which in (Architecture.sasrec, Architecture.hstu)
    }
    for name, serve in servers.items():
        both = torch.cat([serve(np.array([row])) for row in (0, 1)])
        assert both.shape == (2, NUM_CANDIDATES) and both.isfinite().all(), name
        assert not torch.allclose(both[0], both[1], atol=1e-4), name
    with open_scorer(workload) as scorer:
        pool = scorer.encode(ids)
        for row in range(num_lengths):
            contestants: dict[str, Callable[[], object]] = {"ours": partial(scorer.score, [row + 1], pool)}
            contestants |= {name: partial(serve, np.array([row])) for name, serve in servers.items()}
            timing = interleaved(contestants, rounds=5 if recorder.quick else 15, warmup=1)
            for name in servers:
                recorder.add_time(
                    f"{workload}, {NUM_CANDIDATES} candidates, {log.lengths[row]:,} events: against {name} over the "
                    "raw history",
                    timing["ours"],
                    "ms",
                    baseline=timing[name],
                    bar="ratio > 1" if log.lengths[row] > TRAINED_LIMIT else None,
                )


def bench_processes(recorder: BenchmarkRecorder, workload: ScorerWorkload, users: list[int]) -> None:
    """Compare the requests per second of two processes with those of one, and measure the memory of one."""
    ids = workload.candidates(4 * NUM_CANDIDATES)
    opening = WorkerOpening(str(workload.model_dir), str(workload.store), TASK, users, ids.tolist(), NUM_CANDIDATES)
    with open_scorer(workload) as scorer:
        expected = float(scorer.score(users[:1], ids[:NUM_CANDIDATES]).sum())
    seconds, rounds, num_requests = (0.5, 3, 200) if recorder.quick else (5.0, 7, 1_000)
    rates: dict[int, list[float]] = {1: [], 2: []}
    with ExitStack() as stack:
        workers = [stack.enter_context(worker(opening)) for _ in range(2)]
        first = workers[0].serve(WorkerOrder(requests=num_requests))
        check_answers([first], expected)
        for turn in range(rounds):
            for serving in (workers[turn % 2 : turn % 2 + 1], workers):
                order = WorkerOrder(start=time.monotonic() + 0.1, seconds=seconds)
                for each in serving:
                    each.send(order)
                answers = [each.answer() for each in serving]
                check_answers(answers, expected)
                rates[len(serving)].append(sum(answer.requests / answer.seconds for answer in answers))
    recorder.add(
        f"{workload}, {NUM_CANDIDATES} candidates: two worker processes of one thread each against one",
        median(rates[2]),
        "requests/s",
        baseline=median(rates[1]),
        better="more",
        bar="ratio >= 1.8",
        spread=float(np.subtract(*np.percentile(rates[2], [75, 25]))),
    )
    recorder.add(
        f"{workload}, {len(workload.log.items):,} items: private memory of a worker after {num_requests:,} "
        "requests, beyond an idle import of torch",
        max(first.private_bytes - idle_torch_bytes(), 0) / 2**20,
        "MiB",
        bar="value < 100",
    )


def check_answers(answers: Sequence[WorkerAnswer], expected: float) -> None:
    """Require that the workers' scores equal those of this process."""
    for answer in answers:
        assert answer.requests > 0 and np.isclose(answer.first_sum, expected, rtol=1e-4), (answer, expected)


def bench_counters(
    recorder: BenchmarkRecorder,
    workload: ScorerWorkload,
    counted: ScorerWorkload,
    with_category: ScorerWorkload,
    num_candidates: int,
) -> None:
    """Compare requests of models without and with counters, of items and of a category; all workloads have the same log
    and sizes."""
    user = workload.log.num_users  # the last one, whose history is long enough for all keys
    newest = int(workload.log[user].timestamp[-1])
    with (
        Scorer.open(workload.model_dir, workload.store) as plain,
        Scorer.open(counted.model_dir, counted.store) as ours,
        Scorer.open(with_category.model_dir, with_category.store) as both,
    ):
        users, ids = [user], workload.candidates(num_candidates)
        codes = ours.store.get_many(users).counters[0]
        assert len(codes.key) == counted.model.config.counter_keys
        # A tenth of the candidates are counted.
        had = counted.model.items.ids(codes.key[: num_candidates // 10].astype(np.int64) - 1)
        ids = np.concatenate([had, np.setdiff1d(ids, had)])[:num_candidates]
        for task in (TASK, NEXT_TASK):
            plain.task = ours.task = both.task = task
            timing = interleaved(
                {
                    "with": partial(ours.score, users, ours.encode(ids), now=newest),
                    "without": partial(plain.score, users, plain.encode(ids), now=newest),
                    "category": partial(both.score, users, both.encode(ids), now=newest),
                },
                rounds=9 if recorder.quick else 41,
                warmup=3,
                min_sample_s=0.02,
            )
            recorder.add_time(
                f"{workload}, {num_candidates} candidates, {task}: with counters against without",
                timing["with"],
                "ms",
                baseline=timing["without"],
                bar="value <= 1.1 * baseline",
            )
            recorder.add_time(
                f"{workload}, {num_candidates} candidates, {task}: with counters of a category too",
                timing["category"],
                "ms",
                baseline=timing["with"],
            )


def bench_features(recorder: BenchmarkRecorder, workload: ScorerWorkload, featured: ScorerWorkload) -> None:
    """Compare requests of models with and without features; both workloads have the same log and sizes."""
    with (
        Scorer.open(workload.model_dir, workload.store, task=TASK) as plain,
        Scorer.open(featured.model_dir, featured.store, task=TASK) as ours,
    ):
        newest = max(int(workload.log[user].timestamp[-1]) for user in range(1, workload.log.num_users + 1))
        for case, (num_users, num_candidates) in FEATURE_CALLS.items():
            users, ids = workload.request(num_users, num_candidates)
            request: dict[str, Any] = {name: [value] * num_users for name, value in REQUEST.items()}
            told, silent = (ours.score(users, ids, now=newest, request=given) for given in (request, None))
            assert np.abs(told - silent).max() > 1e-4
            calls = {
                "features": partial(ours.score, users, ours.encode(ids), now=newest, request=request),
                "ids": partial(plain.score, users, plain.encode(ids), now=newest),
            }
            timing = interleaved(calls, rounds=9 if recorder.quick else 41, warmup=3, min_sample_s=0.02)
            num_of_items = CATEGORIES_OF_ITEMS + NUMBERS_OF_ITEMS
            recorder.add_time(
                f"{workload}, {case}: with {num_of_items} features of items and {len(REQUEST)} of requests against ids "
                "alone",
                timing["features"],
                "ms",
                baseline=timing["ids"],
                bar="value <= 1.15 * baseline",
            )


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = benchmark_parser("scorer", __doc__).parse_args(arguments)
    set_threads(0)
    quick = options.quick
    models = (SMALL,) if quick else (SMALL, PUBLISHED)
    histories, num_items = ((200, 20_000), 10_000) if quick else ((1_000, 1_000_000), 50_000)
    lengths = (50, 200, 500, 2_000) if quick else (200, 1_000, 4_000, 16_000)
    precisions = [Precision.float32]
    if choose_precision(Precision.auto, torch.device("cpu")) is Precision.bfloat16:
        precisions.append(Precision.bfloat16)
    else:
        print(
            "bfloat16: not measured, since this machine does not multiply it faster (no AMX, no avx512_bf16 by AMD)",
            flush=True,
        )

    with recording("scorer", __doc__, options) as recorder:
        root = recorder.folder
        log = lifelong_log(root / "histories", histories, num_items=num_items)
        for dim, num_seeds in models:
            model = untrained(log, dim=dim, num_seeds=num_seeds)
            bench_history(recorder, ScorerWorkload.make(model, log, root / f"histories-{dim}"), histories)
        log = lifelong_log(root / "users", [*lengths, *[lengths[2]] * 28], num_items=num_items)
        dim, num_seeds = models[-1]
        workloads = {
            mixing: ScorerWorkload.make(
                untrained(log, dim=dim, num_seeds=num_seeds, mixing=mixing), log, root / f"users-{mixing.value}"
            )
            for mixing in (Mixing.separable, Mixing.bidirectional)
        }
        ours = workloads[Mixing.separable]
        for precision in precisions:
            bench_roofline(recorder, ours, precision)
        for dim, num_seeds in models:
            pointwise = ours
            if (dim, num_seeds) != models[-1]:
                model = untrained(log, dim=dim, num_seeds=num_seeds)
                pointwise = ScorerWorkload.make(model, log, root / f"users-{dim}-pointwise")
            model = untrained(log, dim=dim, num_seeds=num_seeds, target_attention=TargetAttentionKind.softmax)
            softmax = ScorerWorkload.make(model, log, root / f"users-{dim}-softmax")
            for precision in precisions:
                bench_layers(recorder, pointwise, softmax, precision)
            counted = ScorerWorkload.make(
                untrained(log, dim=dim, num_seeds=num_seeds, counters=True), log, root / f"users-{dim}-counters"
            )
            model = untrained_with_category(log, dim=dim, num_seeds=num_seeds)
            with_category = ScorerWorkload.make(model, log, root / f"users-{dim}-category")
            bench_counters(recorder, pointwise, counted, with_category, NUM_CANDIDATES)
            model = untrained_with_features(log, dim=dim, num_seeds=num_seeds)
            bench_features(recorder, pointwise, ScorerWorkload.make(model, log, root / f"users-{dim}-features"))
        bench_batches(recorder, ours)
        keep_freed_memory()  # A service does not do this, but models that read histories are slow without it.
        for mixing in (Mixing.bidirectional, Mixing.separable):
            for precision in precisions:
                bench_recompute(recorder, workloads[mixing], len(lengths), precision)
        bench_baselines(recorder, ours, len(lengths))
        bench_processes(recorder, ours, list(range(1, log.num_users + 1)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
