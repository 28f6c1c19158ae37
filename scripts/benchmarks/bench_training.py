"""Benchmark an epoch of VISTA and of our SASRec on ml-1m against RecTools' SASRec at its fastest setting.

    python -m scripts.benchmarks.bench_training --data path/to/ml-1m/events.npz

Equal on both sides are the data (each user's newest 201 training events under leave-last-out), the negatives per label,
d=64, 2+2 layers, 4 heads, length 200, dropout, bfloat16 if the processor supports it, and the machine; epochs
alternate. The labels of a pass are equal except for each user's first event: an input only for RecTools, a label too
for ours. These differ:

- VISTA also trains summaries, and its layers of stage 2 have no feed-forward network.
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
and takes some GB. The benchmark takes about 25 minutes on two idle cores. All settings and samples go to
<name>_settings.json next to --out.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser, recording, timing_of
from scripts.benchmarks.workloads import find_ml_1m
from vista.config import DataConfig, OptimConfig, SourceColumns, TrainConfig
from vista.config.checks import Architecture, to_dict
from vista.config.model_config import CONFIGS
from vista.config.train_config import without_places
from vista.device import keep_freed_memory
from vista.log.event_log import EventLog
from vista.training.trainer import train_model


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Options as command-line arguments."""
    return [word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", str(value))]


SCRIPT = Path(__file__).with_name("rectools_training.py")
LENGTH = 200
"""Labels per user of RecTools; its histories have one event more, which is only an input."""
DIM, HEADS, LAYERS = 64, 4, 2
SHAPE = words_of({"session_max_len": LENGTH, "n_factors": DIM, "n_blocks": LAYERS, "n_heads": HEADS})
"""The sizes, as arguments of rectools_training.py."""
PILOT_BATCHES = 8
"""Batches per trial; the first two are warm-up."""
GATHERED_BYTES = 1 << 29
"""RecTools gathers [B, 200, negatives, d] vectors per batch; settings beyond this size are not tried."""
HELD_OUT = 2
"""Newest events per user that leave-last-out holds out from training."""
DEFAULT_DROPOUT = 0.2
REPEATS = 2
"""Epochs of each model, in alternation."""
BARS = {Architecture.vista: "ratio >= 8", Architecture.sasrec: "ratio >= 15"}
"""Our models, and the target for their speedup over RecTools' SASRec."""


@dataclass(frozen=True)
class RecToolsSetting:
    """The settings that the pilot chooses; the fields are options of rectools_training.py."""

    loss: str
    n_negatives: int
    dropout: float
    threads: int
    batch_size: int = 64
    precision: str = "bf16-mixed"
    workers: int = 0

    def options(self) -> list[str]:
        """The setting as command-line arguments."""
        return words_of(dataclasses.asdict(self))


def rectools_python(folder: Path) -> Path:
    """The interpreter of RecTools' environment, which is created if missing.

    Raises:
        SystemExit: if RecTools cannot be imported there.
    """
    python = folder.absolute() / "bin" / "python"
    if not python.exists():
        print(f"creating {folder} with RecTools and torch (some GB)", flush=True)
        venv.create(folder, with_pip=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "rectools[torch]"], check=False)
    done = subprocess.run([python, "-c", "from rectools.models import SASRecModel"], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise SystemExit(
            f"error: {python} cannot import RecTools ({reason}); run `{python} -m pip install 'rectools[torch]'`, or "
            "give another --rectools-venv"
        )
    return python


def call_rectools(python: Path, data: Path, words: Sequence[str]) -> dict[str, Any]:
    """Run rectools_training.py in its own process and return its report."""
    command = [str(python), str(SCRIPT), str(data), *words]
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, cwd=data.parent, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"error: {' '.join(command)} failed:\n{done.stderr[-2000:]}")
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


class RecToolsPilot:
    """Finds the baseline's fastest setting, one property after the other."""

    def __init__(self, python: Path, data: Path, negatives: int, dropout: float, *, quick: bool) -> None:
        self._python, self._data, self._quick = python, data, quick
        self._start = RecToolsSetting("softmax", negatives, dropout, threads=torch.get_num_threads())
        self.tried: dict[RecToolsSetting, float] = {}

    def fastest(self) -> RecToolsSetting:
        """Try settings with some batches each, and return the fastest."""
        start, negatives = self._start, self._start.n_negatives
        sampled = 2 ** int(np.log2(max(1, min(64, GATHERED_BYTES // (4 * DIM * LENGTH * negatives)))))
        self._try([start, *(replace(start, loss=loss, batch_size=sampled) for loss in ("sampled_softmax", "BCE"))])
        if self._quick:
            return self._best()
        size = self._best().batch_size
        self._try(replace(self._best(), batch_size=other) for other in (size // 2, size * 2) if other > 1)
        self._try([replace(self._best(), precision="32-true")])
        best = self._best()
        self._try([replace(best, threads=1), replace(best, workers=1), replace(best, threads=1, workers=1)])
        return self._best()

    def run(self, setting: RecToolsSetting, max_batches: int) -> dict[str, Any]:
        """The report of one epoch of the baseline, whole (max_batches=0) or estimated from its first batches."""
        words = [*SHAPE, *setting.options(), "--max-batches", str(max_batches)]
        return call_rectools(self._python, self._data, words)

    def _try(self, settings: Iterable[RecToolsSetting]) -> None:
        for setting in dict.fromkeys(settings):
            if setting not in self.tried:
                seconds = self.run(setting, PILOT_BATCHES)["seconds_per_epoch"][0]
                self.tried[setting] = seconds
                print(f"        pilot: {seconds:7.1f} s per epoch, {' '.join(setting.options())}", flush=True)

    def _best(self) -> RecToolsSetting:
        return min(self.tried, key=lambda setting: self.tried[setting])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments and this benchmark's own."""
    parser = benchmark_parser("training", __doc__)
    parser.add_argument("--data", type=Path, help="ml-1m's events.npz; default: $VISTA_DATA_DIR/ml-1m/events.npz")
    default = Path(os.environ.get("VISTA_RECTOOLS_VENV", "runs/baseline-venv"))
    parser.add_argument("--rectools-venv", type=Path, default=default, help="virtual environment with RecTools")
    parser.add_argument(
        "--negatives", type=int, nargs="+", default=[64, 1024], help="negatives per label, one case each"
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
        model=CONFIGS[who](**sizes, dropout=dropout),
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


def compare(recorder: BenchmarkRecorder, pilot: RecToolsPilot, log: EventLog, num_labels: int) -> dict[str, Any]:
    """Run one case: the pilot, then alternating epochs; adds a row per model of ours and returns all details."""
    setting = pilot.fastest()
    negatives, dropout = setting.n_negatives, setting.dropout
    ours: dict[Architecture, list[float]] = {who: [] for who in BARS}
    reports: list[dict[str, Any]] = []
    for repeat in range(1 if recorder.quick else REPEATS):
        # The order reverses, so that no contestant always runs first.
        turns: list[Architecture | None] = [None, *BARS]
        for who in turns if repeat % 2 == 0 else reversed(turns):
            if who is None:
                reports.append(pilot.run(setting, max_batches=0))
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
        "our_config": {who.value: _settings(our_config(who, log, negatives, dropout, "runs/timed")) for who in BARS},
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
            compare(recorder, RecToolsPilot(python, data, negatives, dropout, quick=quick), log, num_labels)
            for negatives, dropout in (cases[:1] if quick else cases)
        ]
        settings = options.out.with_name(f"{options.out.stem}_settings.json")
        settings.write_text(json.dumps(details, indent=1) + "\n", encoding="utf-8")
        print(f"settings and samples: {settings}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
