"""Requests with counters against requests without, for the scorer's benchmark."""

from __future__ import annotations

from functools import partial

import numpy as np

from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder
from scripts.benchmarks.scorer_workloads import ScorerWorkload
from scripts.benchmarks.timing import interleaved
from scripts.benchmarks.workloads import TASK
from vista.model.ranking_model import NEXT_TASK
from vista.scorer import Scorer


def bench_counters(
    recorder: BenchmarkRecorder, workload: ScorerWorkload, counted: ScorerWorkload, num_candidates: int
) -> None:
    """Compare requests of models with and without counters; both workloads have the same log and sizes."""
    user = workload.log.num_users  # the last one, whose history is long enough for all keys
    newest = int(workload.log[user].timestamp[-1])
    with (
        Scorer.open(workload.model_dir, workload.store) as plain,
        Scorer.open(counted.model_dir, counted.store) as ours,
    ):
        users, ids = [user], workload.candidates(num_candidates)
        codes = ours.store.get_many(users).counters[0]
        assert len(codes.key) == counted.model.config.counter_keys
        # A tenth of the candidates are counted.
        had = counted.model.items.ids(codes.key[: num_candidates // 10].astype(np.int64) - 1)
        ids = np.concatenate([had, np.setdiff1d(ids, had)])[:num_candidates]
        for task in (TASK, NEXT_TASK):
            plain.task = ours.task = task
            timing = interleaved(
                {
                    "with": partial(ours.score, users, ours.encode(ids), now=newest),
                    "without": partial(plain.score, users, plain.encode(ids), now=newest),
                },
                rounds=9 if recorder.quick else 41,
                warmup=3,
                min_sample_s=0.02,
            )
            recorder.add(
                f"{workload}, {num_candidates} candidates, {task}: with counters against without",
                timing["with"].median_s * 1e3,
                "ms",
                baseline=timing["without"].median_s * 1e3,
                bar="value <= 1.1 * baseline",
                spread=timing["with"].spread_s * 1e3,
            )
