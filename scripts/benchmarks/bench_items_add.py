"""Benchmark `vista items add` on a large catalog while a scorer in another process serves.

    python -m scripts.benchmarks.bench_items_add

A model with eight features of items and random weights gets a tenth more items. Meanwhile a scorer that follows the
model's folder scores known items without a pause: every answer must be bit-identical to the one before. Once it has
moved to the extended model, its scores of the new items must differ from one another, and equal those of a scorer that
opens the extended model.
"""

from __future__ import annotations

import multiprocessing
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle, product
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from scripts.benchmarks.benchmark import BenchmarkRecorder, recording
from scripts.benchmarks.scorer_workloads import untrained_with_features
from scripts.benchmarks.workloads import TASK, lifelong_log
from vista.arrays import Float32s, Int
from vista.device import keep_freed_memory, set_threads
from vista.refresh import refresh
from vista.scorer import Scorer

NUM_ITEMS, QUICK_ITEMS = 1_000_000, 5_000
NUM_USERS, NUM_SCORED = 100, 8
NUM_CANDIDATES, NUM_LISTS, NUM_NEW = 500, 8, 500
"""Candidates per request, lists of them, and new items whose scores are compared."""
FOLLOW_S, TIMEOUT_S = 0.5, 600


@dataclass(frozen=True, slots=True)
class CatalogAnswers:
    """What a scorer answered while its catalog grew."""

    num_answers: int
    num_wrong: int
    longest_s: float
    new_scores: Float32s
    """[NUM_SCORED, NUM_NEW] after the move to the extended model."""


@dataclass(frozen=True, slots=True)
class CatalogQuestions:
    """What to open, and the items to score."""

    model: Path
    store: Path
    users: list[int]
    known: Int
    """[NUM_LISTS, NUM_CANDIDATES]."""
    new: Int
    num_items: int
    """Items of the extended model."""


def serve(questions: CatalogQuestions, ready: Event, said: Any) -> None:
    """Score known items until the scorer has moved to the extended model, and once more all of them; in a process."""
    set_threads(1)
    with Scorer.open(questions.model, questions.store, task=TASK) as scorer:
        work = [([user], items) for user, items in product(questions.users, questions.known)]
        expected = [scorer.score(*question) for question in work]
        assert len(np.unique(scorer.score(questions.users[:1], questions.new))) == 1  # still the unknown item
        scorer.follow(FOLLOW_S)
        ready.set()
        num_answers, num_wrong, longest_s, left = 0, 0, 0.0, len(work)
        for index in cycle(range(len(work))):
            began = time.perf_counter()
            answer = scorer.score(*work[index])
            longest_s = max(longest_s, time.perf_counter() - began)
            num_answers += 1
            num_wrong += not np.array_equal(answer, expected[index])
            left -= len(scorer.model.items) == questions.num_items
            if left == 0:
                break
        new_scores = scorer.score(questions.users, questions.new)
    said.put(CatalogAnswers(num_answers, num_wrong, longest_s, new_scores))


def write_new_items(path: Path, model: Any, first: int, count: int) -> None:
    """A table of items with the ids from `first` on, with values of all features of a model."""
    rng = np.random.default_rng(1)
    columns: dict[str, Any] = {"item": np.arange(first, first + count)}
    for column in model.schema.item_features:
        is_number = column.kind == "number"
        columns[column.name] = (
            rng.lognormal(size=count) if is_number else [f"value {value}" for value in rng.integers(0, 100, count)]
        )
    pl.DataFrame(columns).write_parquet(path)


def measure(recorder: BenchmarkRecorder, folder: Path, num_items: int) -> None:
    """Add a tenth of `num_items` items, and record all cases."""
    num_added = num_items // 10
    log = lifelong_log(folder / "log", [num_items // NUM_USERS] * NUM_USERS, num_items=num_items)
    model = untrained_with_features(log, dim=64, num_seeds=16)
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store")
    write_new_items(folder / "new.parquet", model, num_items + 1, num_added)
    del model
    rng, context = np.random.default_rng(2), multiprocessing.get_context("spawn")
    questions = CatalogQuestions(
        folder / "model",
        folder / "store",
        list(range(1, NUM_SCORED + 1)),
        rng.integers(1, num_items + 1, (NUM_LISTS, NUM_CANDIDATES)),
        np.sort(rng.choice(np.arange(num_items + 1, num_items + num_added + 1), NUM_NEW, replace=False)),
        num_items + num_added,
    )
    ready, said = context.Event(), context.Queue()
    server = context.Process(target=serve, args=(questions, ready, said), daemon=True)
    server.start()
    try:
        if not ready.wait(TIMEOUT_S):
            raise SystemExit("error: the scorer did not start")
        command = [sys.executable, "-m", "vista.cli", "items", "add", f"model={questions.model}"]
        before, began = _cpu_of_children_s(), time.perf_counter()
        subprocess.run([*command, f"items.paths=[{folder / 'new.parquet'}]"], check=True)
        seconds, cpu_seconds = time.perf_counter() - began, _cpu_of_children_s() - before
        answers: CatalogAnswers = said.get(timeout=TIMEOUT_S)
    finally:
        server.terminate()
        server.join()
    with Scorer.open(questions.model, questions.store, task=TASK) as scorer:
        fresh = scorer.score(questions.users, questions.new)
    assert all(len(np.unique(row)) > NUM_NEW // 2 for row in answers.new_scores)
    num_wrong = answers.num_wrong + int((answers.new_scores != fresh).any(1).sum())
    name = f"items add of {num_added:,} items to a catalog of {num_items:,} under load"
    recorder.add(f"{name}: time", seconds, "s", bar="value < 60")
    recorder.add(f"{name}: CPU time", cpu_seconds, "s")
    recorder.add(f"{name}: answers of a scorer meanwhile", answers.num_answers, "answers", better="more")
    recorder.add(f"{name}: wrong answers", num_wrong, "answers", bar="value <= 0")
    recorder.add(f"{name}: longest answer", answers.longest_s * 1e3, "ms")


def _cpu_of_children_s() -> float:
    """CPU time of the child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    keep_freed_memory()
    set_threads(0)
    with recording("items_add", __doc__, arguments) as recorder:
        measure(recorder, recorder.folder, QUICK_ITEMS if recorder.quick else NUM_ITEMS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
