"""Benchmark exports (`vista export`): differences from the scorer over 1,000 requests, and the time per request.

    python -m scripts.benchmarks.bench_export

A model of three labeled tasks and the next item is trained on a simulated log, because an untrained model's logits
hardly differ. Both formats are compared on the requests that `vista export` checks: random users,
candidates, times, and events since the refresh, in batches of several sizes.

A timed request has one user and 500 candidates, and computes all tasks. Reading the record is not timed. The scorer
and the exports run in turn, on one thread each, and its CPU time is measured. AOTInductor needs a C++ compiler.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from scripts.benchmarks.benchmark import BenchmarkRecorder, interleaved, recording
from vista.config import DataConfig, ModelConfig, OptimConfig, PrepareConfig, SimulateConfig, SourceConfig, TrainConfig
from vista.config.checks import ExportFormat, OnMissing, Precision, Split
from vista.device import set_threads
from vista.export.export import compare, scorer_outputs
from vista.export.formats import ONNX_FILE, write_aotinductor, write_onnx
from vista.export.serving_graph import Arrays, ExportRunner, ServingGraph, graph_inputs, request_arrays
from vista.export.trial_requests import TrialRequests
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.refresh import refresh
from vista.scorer.serving_snapshot import ServingSnapshot
from vista.scorer.serving_source import ServingSource
from vista.simulation.simulate import simulate
from vista.training.trainer import train

WRITERS = {ExportFormat.onnx: write_onnx, ExportFormat.aotinductor: write_aotinductor}
NUM_REQUESTS, NUM_CANDIDATES = 1000, 500
MOST_DIFFERENCE = 1e-4
SIMULATION = SimulateConfig(num_users=100, events_per_user=1_000, num_items=1_000)
QUICK_SIMULATION = SimulateConfig(num_users=12, events_per_user=60, num_items=40, impressions_per_user=40)


def trained(folder: Path, *, quick: bool) -> tuple[Path, Path]:
    """Train a model for an epoch and refresh its store; returns the folders of both."""
    simulate(replace(QUICK_SIMULATION if quick else SIMULATION, out=str(folder / "source")))
    source = SourceConfig(kind="simulated", paths=[str(folder / "source")])
    prepare(PrepareConfig(out=str(folder / "log"), events=source))
    log = EventLog.open(folder / "log")
    assert log.impressions is not None
    times = np.sort(np.asarray(log.impressions.timestamp))
    config = TrainConfig(
        model=ModelConfig(dim=16 if quick else 64, num_seeds=3 if quick else 16),
        data=DataConfig(
            path=str(log.path),
            split=Split.time,
            validation_from=str(times[int(0.8 * len(times))]),
            test_from=str(times[int(0.9 * len(times))]),
            tokens_per_batch=256 if quick else 4096,
        ),
        optim=OptimConfig(epochs=1, warmup_steps=4),
        run_dir=str(folder / "run"),
        device="cpu",
        num_threads=1,
    )
    refresh(train(config, log), log, folder / "store")
    return folder / "run" / "best", folder / "store"


def request_of_one(snapshot: ServingSnapshot, num_candidates: int) -> TrialRequests:
    """A request of a user who has a record, for the graph and for the scorer."""
    model = snapshot.model
    users: Any = [next(iter(snapshot.store.keys()))]
    stored = snapshot.store.get_many(users)
    rows = np.random.default_rng(0).integers(1, len(model.items) + 1, (1, num_candidates))
    now = stored.last_event_ts + 1000 if model.schema.has_time else None
    request = snapshot.read(users, None, now, OnMissing.empty)
    codes = {} if model.request_features is None else model.request_features.parse({}, num_candidates).columns
    arrays = request_arrays(
        model,
        stored,
        stored.tail,
        np.zeros(len(stored.tail.items), np.bool_),
        now,
        rows,
        {name: column.reshape(rows.shape) for name, column in codes.items()},
    )
    return TrialRequests(arrays, request.with_features(snapshot.served, {}, num_candidates), rows)


def on_one_thread(folder: Path, outputs: list[str]) -> ExportRunner:
    """The ONNX export in a folder, without onnxruntime's other threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(folder / ONNX_FILE, options, providers=["CPUExecutionProvider"])

    def run(arrays: Arrays) -> Arrays:
        return dict(zip(outputs, session.run(outputs, arrays), strict=True))

    return run


def measure(recorder: BenchmarkRecorder, snapshot: ServingSnapshot, folder: Path) -> None:
    """Export the model in both formats, and record the differences and the times."""
    inputs, graph = graph_inputs(snapshot.model), ServingGraph(snapshot.model, snapshot.items)
    asked = request_of_one(snapshot, NUM_CANDIDATES)
    expected = scorer_outputs(snapshot, asked)
    for name, values in expected.items():
        recorder.add(f"{name} of the scorer, {NUM_CANDIDATES} candidates: standard deviation", values.std(), "logits")
    contestants: dict[str, Callable[[], object]] = {
        "scorer": lambda: snapshot.scores(asked.request, asked.rows, snapshot.tasks)
    }
    for kind, write in WRITERS.items():
        (out := folder / kind.value).mkdir()
        began = time.perf_counter()
        run = write(graph, inputs, out)
        recorder.add(f"{kind.value}: time of the export", time.perf_counter() - began, "s")
        compared, _ = compare(run, snapshot, NUM_REQUESTS, math.inf)
        for name, difference in compared.max_difference.items():
            recorder.add(
                f"{kind.value}: largest difference of {name} over {NUM_REQUESTS:,} requests",
                difference,
                "logits",
                bar=f"value <= {MOST_DIFFERENCE}",
            )
        if kind is ExportFormat.onnx:
            run = on_one_thread(out, graph.outputs)
        contestants[kind.value] = lambda run=run: run(asked.arrays)  # type: ignore[misc]
    timing = interleaved(contestants, rounds=5 if recorder.quick else 31, clock=time.thread_time)
    for kind in WRITERS:
        of_kind = timing[kind.value]
        recorder.add_time(
            f"{kind.value}: CPU time of 1 user x {NUM_CANDIDATES} candidates, against the scorer",
            of_kind,
            "ms",
            baseline=timing["scorer"],
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    set_threads(1)
    with recording("export", __doc__, arguments) as recorder:
        model, store = trained(recorder.folder, quick=recorder.quick)
        snapshot = ServingSource(model, store, "cpu", None, Precision.float32).open()
        try:
            measure(recorder, snapshot, recorder.folder)
        finally:
            snapshot.store.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
