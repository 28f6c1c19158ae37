"""Benchmark the summary of a lifelong history: its time, and its memory beyond the log.

    python -m scripts.benchmarks.bench_summarizer

An EventLog on disk holds one user with 10^6 events. A fresh process opens it, touches every page of the user's columns
so that the log is resident, creates a model with random weights and warms up. It then times what a refresh does: map
rows of the log to rows of the model and call `inference.summarize`. Memory is the peak resident size meanwhile (VmHWM,
reset just before) minus the resident size before. The largest memory and the median time of several processes count.

The baseline is the roofline of this machine, measured right after: the matrix products of the same shapes (projections,
feed-forward, states) in the same or a higher precision, plus the activations, in the cache. Precision is float32, or
bfloat16 as with `vista refresh precision=bfloat16`. Bidirectional mixing (the paper) keeps a history's tokens,
[T, d] float32, from layer to layer; separable mixing keeps only states.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, interleaved, recording, timing_of
from scripts.benchmarks.rooflines import activation, matmul_roofline
from scripts.benchmarks.workloads import lifelong_log, untrained
from vista.config.checks import Mixing, Precision
from vista.device import keep_freed_memory, set_threads
from vista.log.event_log import EventLog
from vista.log.histories import Histories
from vista.model import inference
from vista.model.vista_model import VistaModel

REPOSITORY = Path(__file__).resolve().parents[2]
GIB = 2**30
ROOFLINE_ROWS = 4096
"""Rows of the roofline's matrix products: they fit into the cache, as in a careful implementation."""


@dataclass(frozen=True, slots=True)
class SummarizerCase:
    """A model and the precision of its summary."""

    dim: int
    num_seeds: int
    num_layers: int
    mixing: Mixing
    precision: Precision
    bar: float | None
    """Largest allowed time, as a multiple of the roofline."""

    def __str__(self) -> str:
        return (
            f"{self.mixing.value}, d={self.dim}, K={self.num_seeds}, {self.num_layers} layers, {self.precision.value}"
        )


CASES = (
    # This project's default, then the published size.
    SummarizerCase(64, 16, 2, Mixing.separable, Precision.float32, None),
    *(
        SummarizerCase(256, 128, 3, mixing, precision, bar)
        for mixing, bar in ((Mixing.separable, 2.0), (Mixing.bidirectional, 2.5))
        for precision in (Precision.float32, Precision.bfloat16)
    ),
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments, and the task that the parent hands to its processes."""
    parser = benchmark_parser("summarizer", __doc__)
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def memory_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / GIB
    raise SystemExit(f"error: /proc/self/status has no {field}; this benchmark requires Linux")


def measure(task: dict[str, Any]) -> dict[str, float]:
    """Summarize the only user of a log; runs in the fresh process."""
    set_threads(0)
    keep_freed_memory()
    log = EventLog.open(task["log"])
    history = log.slice(0)
    for column in (history.item, history.timestamp, history.action):
        np.asarray(column).max()
    size = {name: task[name] for name in ("dim", "num_seeds", "num_layers")}
    model = untrained(log, **size, mixing=Mixing(task["mixing"]))
    item_rows = model.rows_of(log.items).astype(np.int32)
    model = model.with_frozen("summarizer", Precision(task["precision"]))
    summarize(model, history.slice(0, 0, 10_000), item_rows)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_gib("VmRSS"), time.perf_counter()
    summary = summarize(model, history, item_rows)
    seconds = time.perf_counter() - start
    extra = memory_gib("VmHWM") - before
    empty = inference.summarize(model, history.slice(0, 0, 0))
    assert summary.shape == empty.shape and bool(summary.isfinite().all()) and not torch.allclose(summary, empty)
    return {"seconds": seconds, "extra_gib": extra, "resident_gib": before}


def summarize(model: VistaModel, history: Histories, item_rows: NDArray[np.int32]) -> torch.Tensor:
    """Summarize as a refresh does."""
    return inference.summarize(model, dataclasses.replace(history, item=item_rows[history.item]))


def in_fresh_processes(task: dict[str, Any], repeats: int) -> list[dict[str, float]]:
    """Call `measure` in one new process after the other."""
    command = [sys.executable, "-m", "scripts.benchmarks.bench_summarizer", "--measure", json.dumps(task)]
    measured = []
    for _ in range(repeats):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr}")
        measured.append(json.loads(done.stdout.splitlines()[-1]))
    return measured


def roofline_seconds(case: SummarizerCase, num_events: int, num_heads: int = 4) -> float:
    """Roofline of one pass over the events with `ModelConfig`'s defaults: matrix products and activations."""
    dim, head_dim, layers = case.dim, case.dim // num_heads, case.num_layers
    precise = case.precision is Precision.float32
    dtypes = (torch.float32,) if precise else (torch.float32, torch.bfloat16)

    def product(n: int, k: int) -> float:
        return matmul_roofline(ROOFLINE_ROWS, n, k, dtypes=dtypes, weights=True)

    key_value, feed_forward = product(2 * dim, dim), product(4 * dim, dim) + product(dim, 2 * dim)
    written = key_value + matmul_roofline(head_dim, head_dim, ROOFLINE_ROWS, count=num_heads, dtypes=dtypes)
    products = layers * written + (layers - 1) * feed_forward  # nothing reads the last layer's events
    elements = layers * dim + (layers - 1) * 2 * dim  # silu of keys and of the feed-forward's gates
    if case.mixing is Mixing.bidirectional:
        read = matmul_roofline(ROOFLINE_ROWS, head_dim, head_dim, count=num_heads, dtypes=dtypes)
        products += (layers - 1) * (key_value + read + product(dim, dim))  # queries and gates; the output projection
        elements += (layers - 1) * dim
    silu = activation("silu", elements * ROOFLINE_ROWS)
    return (products + silu.times * interleaved({"silu": silu.call})["silu"].median_s) * num_events / ROOFLINE_ROWS


def report(recorder: BenchmarkRecorder, case: SummarizerCase, log: Path, num_events: int, repeats: int) -> None:
    """Record all rows of one case."""
    words = {"log": str(log), "mixing": case.mixing.value, "precision": case.precision.value}
    measured = in_fresh_processes(dataclasses.asdict(case) | words, repeats)
    timing = timing_of([each["seconds"] for each in measured])
    name, bar = f"{num_events:,} events, {case}", None if case.bar is None else f"value <= {case.bar} * baseline"
    roofline = roofline_seconds(case, num_events)
    recorder.add(
        f"{name}: time over the roofline", timing.median_s, "s", baseline=roofline, bar=bar, spread=timing.spread_s
    )
    recorder.add(f"{name}: rate", num_events / timing.median_s, "events/s", better="more")
    memory = max(each["extra_gib"] for each in measured)
    recorder.add(f"{name}: peak memory beyond the log", memory, "GiB", bar="value < 1")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return 0
    set_threads(0)
    keep_freed_memory()
    num_events, repeats = (20_000, 1) if options.quick else (1_000_000, 2)
    with recording("summarizer", __doc__, options) as recorder:
        log = recorder.folder / "log"
        lifelong_log(log, [num_events], num_items=min(50_000, num_events))
        for case in CASES:
            report(recorder, case, log, num_events, repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
