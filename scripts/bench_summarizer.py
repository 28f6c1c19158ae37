"""A lifelong history into its summary: seconds, and the memory that it takes beyond the log.

A user of 10^6 events lies in an EventLog on disk. A fresh process opens it, touches every page of the user's columns
(so that the log counts as resident before the clock starts), makes a model with random weights and warms up on 256
events. Timed is what the refresh does: rows of the log to rows of the model, then `inference.summarize`. Memory is
the peak resident size of that stretch (VmHWM, reset just before) less the resident size before it: all that
summarizing adds to log, model and libraries. The worst of the processes counts for memory, the median for time.

Beside it stand the floors of this machine, measured in the same minute: the matrix products of the same shapes alone
(projections, feed-forward, states), and copying one [T, d] array of float32. No implementation of this model in
float32 can be faster than the first. Bidirectional mixing (the paper) keeps a history's tokens at every layer, so it
is measured at 16,384 events, the longest chunk it is trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from floors import copy_floor, matmul_floor
from recorder import Recorder, benchmark_parser, timing_of
from vista.choices import Mixing
from vista.data.event_log import EventLog
from vista.data.histories import Histories
from vista.device import set_threads
from vista.model import inference
from vista.model.recommender import Recommender
from workloads import lifelong_log, untrained

GIB = 2**30
FLOOR_ROWS = 4096
"""Rows of the matrix products that the floor is measured with: cache-sized, as a careful implementation takes them."""
SEPARABLE_MODELS = ((64, 16), (256, 128))
"""(d, K): this project's default, and the published size."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The shared arguments, and what the parent hands its processes."""
    parser = benchmark_parser("summarizer", __doc__)
    parser.add_argument("--measure", metavar="JSON", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def memory_gib(field: str) -> float:
    """VmRSS (now) or VmHWM (peak since the last reset) of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / GIB
    raise SystemExit(f"error: /proc/self/status has no {field}; this benchmark needs Linux")


def measure(task: dict[str, Any]) -> dict[str, float]:
    """In the fresh process: summarize the only user of a log."""
    set_threads(0)
    log = EventLog.open(task["log"])
    history = log.slice(0)
    for column in (history.item, history.timestamp, history.action):
        np.asarray(column).max()
    model = untrained(log, dim=task["dim"], num_seeds=task["num_seeds"], mixing=Mixing(task["mixing"]))
    item_rows = model.item_rows(log.items.ids(np.arange(log.num_items))).astype(np.int32)
    summarize(model, history.slice(0, 0, 256), item_rows)
    Path("/proc/self/clear_refs").write_text("5")
    before, start = memory_gib("VmRSS"), time.perf_counter()
    summary = summarize(model, history, item_rows)
    seconds = time.perf_counter() - start
    extra = memory_gib("VmHWM") - before
    empty = inference.summarize(model, history.slice(0, 0, 0))
    assert summary.shape == empty.shape and bool(summary.isfinite().all()) and not torch.allclose(summary, empty)
    return {"seconds": seconds, "extra_gib": extra, "resident_gib": before}


def summarize(model: Recommender, history: Histories, item_rows: NDArray[np.int32]) -> torch.Tensor:
    """As the refresh does it."""
    return inference.summarize(model, dataclasses.replace(history, item=item_rows[history.item]))


def in_fresh_processes(task: dict[str, Any], repeats: int) -> list[dict[str, float]]:
    """`measure` in one new process after the other."""
    command = [sys.executable, __file__, "--measure", json.dumps(task)]
    found = []
    for _ in range(repeats):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr}")
        found.append(json.loads(done.stdout.splitlines()[-1]))
    return found


def matmul_seconds(num_events: int, dim: int, *, mixing: Mixing, num_heads: int = 4, num_layers: int = 2) -> float:
    """The least time of one pass's matrix products over the events: those of `ModelConfig`'s defaults."""
    head_dim = dim // num_heads
    shapes = {"key and value": (2 * dim, dim), "up": (4 * dim, dim), "down": (dim, 2 * dim)}
    seconds = {name: matmul_floor(FLOOR_ROWS, n, k) for name, (n, k) in shapes.items()}
    seconds["state"] = matmul_floor(head_dim, head_dim, FLOOR_ROWS, count=num_heads)
    feed_forward = seconds["up"] + seconds["down"]
    if mixing is Mixing.separable:  # the last layer's tokens are never updated
        total = num_layers * (seconds["key and value"] + seconds["state"]) + (num_layers - 1) * feed_forward
    else:  # queries, gates, reads and the output projection come on top
        read = matmul_floor(FLOOR_ROWS, head_dim, head_dim, count=num_heads)
        output = matmul_floor(FLOOR_ROWS, dim, dim)
        total = num_layers * (2 * seconds["key and value"] + seconds["state"] + read + output + feed_forward)
    return total * num_events / FLOOR_ROWS


def report(recorder: Recorder, name: str, num_events: int, task: dict[str, Any], repeats: int, bar: str | None) -> None:
    """All cases of one model and history."""
    dim, mixing = task["dim"], Mixing(task["mixing"])
    found = in_fresh_processes(task, repeats)
    timing = timing_of([each["seconds"] for each in found])
    recorder.add(f"{name}: time", timing.median_s, "s", spread=timing.spread_s)
    recorder.add(f"{name}: rate", num_events / timing.median_s, "events/s")
    recorder.add(f"{name}: peak memory beyond the log", max(each["extra_gib"] for each in found), "GiB", bar=bar)
    floor = matmul_seconds(num_events, dim, mixing=mixing)
    recorder.add(f"{name}: share of the matrix products' floor", 100 * floor / timing.median_s, "%")
    recorder.add(f"{name}: copying its [T, d] once", copy_floor(num_events * dim * 4), "s")
    if bar is not None:
        worst = max(each["extra_gib"] for each in found)
        print(f"        aim: below 0.5 GiB; {'reached' if worst < 0.5 else 'not reached'} with {worst:.3f} GiB")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    if options.measure:
        print(json.dumps(measure(json.loads(options.measure))))
        return 0
    set_threads(0)
    recorder = Recorder("summarizer", out=options.out, quick=options.quick)
    num_events, short, repeats = (20_000, 2_048, 1) if options.quick else (1_000_000, 16_384, 3)
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        long_log, short_log = Path(folder) / "long", Path(folder) / "short"
        lifelong_log(long_log, [num_events], num_items=min(50_000, num_events))
        lifelong_log(short_log, [short], num_items=short)
        for dim, num_seeds in SEPARABLE_MODELS:
            task = {"log": str(long_log), "dim": dim, "num_seeds": num_seeds, "mixing": "separable"}
            name = f"separable, {num_events:,} events, d={dim}, K={num_seeds}"
            report(recorder, name, num_events, task, repeats, "value < 1")
            task |= {"log": str(short_log), "mixing": "bidirectional"}
            report(recorder, f"bidirectional, {short:,} events, d={dim}, K={num_seeds}", short, task, repeats, bar=None)
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
