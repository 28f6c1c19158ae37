"""Benchmark an epoch of VISTA and of our SASRec on ml-1m against RecTools' SASRec at its fastest setting.

    python -m scripts.benchmarks.bench_training --data path/to/ml-1m/events.npz

Equal on both sides are the data (each user's newest 201 training events under leave-last-out), the negatives per label,
d=64, 2+2 layers, 4 heads, length 200, dropout, bfloat16 if the processor supports it, and the machine; epochs
alternate. The labels of a pass are equal except for each user's first event: an input only for RecTools, a label too
for ours. These differ:

- VISTA also trains the reconstruction, and its layers of stage 2 have no feed-forward network.
- Our SASRec has no dropout on attention weights.
- Ours draw negatives once per batch, RecTools for every position. RecTools may use its softmax over the whole catalog
  instead, which has at least as many negatives.

A pilot of some batches finds RecTools' fastest loss, batch size, precision, threads and loader processes, one after the
other. Precision is 32-true or bf16-mixed, as in ours; bf16-true would also round weights and optimizer state. With
dropout 0 RecTools can use torch's fused attention, so each case runs at the default dropout and at 0, each with a
pilot. Ours runs with its defaults on all cores, keeps freed memory as `vista train` does, and is timed from outside:
`train()` for one epoch, with setup, checkpoint and export. RecTools is timed from inside: only the epoch, without
start, data preparation and construction of the model.

RecTools needs a virtual environment of its own (--rectools-venv or VISTA_RECTOOLS_VENV), which is created if missing
and takes some GB. The benchmark takes about 25 minutes on two idle cores; --baseline-batches 60 estimates RecTools'
epochs and halves that. All settings and samples go to <name>_settings.json next to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, recording, timing_of
from scripts.benchmarks.rectools_process import DIM, HEADS, LAYERS, LENGTH, RecToolsPilot, rectools_python
from scripts.benchmarks.workloads import find_ml_1m
from vista.config import DataConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Architecture, ItemStart, to_dict
from vista.config.model_config import CONFIGS
from vista.config.train_config import without_places
from vista.device import keep_freed_memory
from vista.log.event_log import EventLog
from vista.training.trainer import train_model

HELD_OUT = 2
"""Newest events per user that leave-last-out holds out from training."""
DEFAULT_DROPOUT = 0.2
BARS = {Architecture.vista: "ratio >= 5", Architecture.sasrec: "ratio >= 8"}
"""Our models, and the target for their speedup over RecTools' SASRec."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments and this benchmark's own."""
    parser = benchmark_parser("training", __doc__)
    parser.add_argument("--data", type=Path, help="ml-1m's events.npz; default: $VISTA_DATA_DIR/ml-1m/events.npz")
    default = Path(os.environ.get("VISTA_RECTOOLS_VENV", "runs/baseline-venv"))
    parser.add_argument("--rectools-venv", type=Path, default=default, help="virtual environment with RecTools")
    parser.add_argument(
        "--negatives", type=int, nargs="+", default=[64, 1024], help="negatives per label, one case each"
    )
    parser.add_argument("--repeats", type=int, default=2, help="epochs of each model, in alternation")
    parser.add_argument(
        "--baseline-batches", type=int, default=0, help="estimate RecTools' epochs from this many batches"
    )
    return parser.parse_args(arguments)


def write_events(path: Path, folder: Path, max_users: int) -> tuple[EventLog, Path, int]:
    """Write the training events for both sides; returns our log, the baseline's npz and the number of our labels."""
    with np.load(path, allow_pickle=False) as arrays:
        missing = {"user", "item", "offsets"} - set(arrays.files)
        if missing:
            raise SystemExit(f"error: {path}: missing {', '.join(sorted(missing))}; give a packed events.npz")
        user, item, offsets = arrays["user"].astype(np.int64), arrays["item"].astype(np.int64), arrays["offsets"]
    ends = offsets[1:][: max_users or None]
    starts = np.maximum(offsets[:-1][: len(ends)], ends - HELD_OUT - LENGTH - 1)
    kept = np.concatenate([np.arange(start, end) for start, end in zip(starts, ends, strict=True)])
    log = EventLog.from_frame(
        {"user": user[kept], "item": item[kept]}, folder / "log", columns=SourceColumns(timestamp=None)
    )
    trained = np.concatenate([np.arange(start, end - HELD_OUT) for start, end in zip(starts, ends, strict=True)])
    baseline = folder / "baseline.npz"
    np.savez(baseline, user=user[trained], item=item[trained], timestamp=np.arange(len(trained)))
    return log, baseline, len(trained)


def our_config(who: Architecture, log: EventLog, negatives: int, dropout: float, run_dir: str) -> TrainConfig:
    """One epoch with our defaults at the baseline's sizes, without validation; every event is a label once."""
    sizes: dict[str, Any] = {"dim": DIM, "num_heads": HEADS, "num_layers": LAYERS}
    sizes |= {"num_target_layers": LAYERS} if who is Architecture.vista else {"history_limit": LENGTH}
    return TrainConfig(
        model=CONFIGS[who](**sizes, dropout=dropout, item_start=ItemStart.random),
        data=DataConfig(path=str(log.path), tokens_per_batch=8192, num_negatives=negatives, windows_per_chunk=0),
        optim=OptimConfig(epochs=1, warmup_steps=100, validate_every=0),
        run_dir=run_dir,
        device="cpu",
    )


def run_ours(who: Architecture, log: EventLog, negatives: int, dropout: float) -> float:
    """Seconds of one epoch of training, from the configuration to the exported model."""
    with tempfile.TemporaryDirectory(prefix="vista-run-") as run_dir:
        config = our_config(who, log, negatives, dropout, run_dir)
        start = time.perf_counter()
        model = train_model(config, log)
        seconds = time.perf_counter() - start
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    return seconds


def compare(
    recorder: BenchmarkRecorder, pilot: RecToolsPilot, log: EventLog, num_labels: int, repeats: int, max_batches: int
) -> dict[str, Any]:
    """Run one case: the pilot, then alternating epochs; adds a row per model of ours and returns all details."""
    setting = pilot.fastest()
    negatives, dropout = setting.n_negatives, setting.dropout
    ours: dict[Architecture, list[float]] = {who: [] for who in BARS}
    reports: list[dict[str, Any]] = []
    for repeat in range(repeats):
        # The order reverses, so that no contestant always runs first.
        turns: list[Architecture | None] = [None, *BARS]
        for who in turns if repeat % 2 == 0 else reversed(turns):
            if who is None:
                reports.append(pilot.run(setting, max_batches))
            else:
                ours[who].append(run_ours(who, log, negatives, dropout))
    assert all(num_labels >= report["positions"] for report in reports), "ours must have at least as many labels"
    baseline = timing_of([report["seconds_per_epoch"][0] for report in reports])
    rows: list[dict[str, Any]] = []
    for who, bar in BARS.items():
        own = timing_of(ours[who])
        case = f"ml-1m epoch of {who.value}, {negatives} negatives a label, dropout {dropout:g}"
        rows.append(recorder.add_time(case, own, "s", baseline=baseline, bar=bar))
    print(f"        RecTools: {' '.join(setting.options())}", flush=True)
    return {
        "rows": rows,
        "our_seconds": {who.value: seconds for who, seconds in ours.items()},
        "our_labels": num_labels,
        "our_config": {who.value: _settings(our_config(who, log, negatives, dropout, "")) for who in BARS},
        "baseline_reports": reports,
        "pilot": [dataclasses.asdict(tried) | {"seconds": seconds} for tried, seconds in pilot.tried.items()],
    }


def _settings(config: TrainConfig) -> dict[str, Any]:
    values = to_dict(config)
    return values | without_places(values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    path = find_ml_1m(options.data)
    if path is None:
        print("skipped: ml-1m not found; set VISTA_DATA_DIR, or give --data path/to/ml-1m/events.npz")
        return 0
    python = rectools_python(options.rectools_venv)
    keep_freed_memory()
    quick: bool = options.quick
    cases = list(itertools.product(options.negatives, (DEFAULT_DROPOUT, 0.0)))
    with recording("training", __doc__, options) as recorder:
        log, data, num_labels = write_events(path, recorder.folder, 200 if quick else 0)
        details = [
            compare(
                recorder,
                RecToolsPilot(python, data, negatives, dropout, quick=quick),
                log,
                num_labels,
                1 if quick else options.repeats,
                options.baseline_batches,
            )
            for negatives, dropout in (cases[:1] if quick else cases)
        ]
        settings = options.out.with_name(f"{options.out.stem}_settings.json")
        settings.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
        print(f"settings and samples: {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
