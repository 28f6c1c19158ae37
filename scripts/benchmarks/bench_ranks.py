"""Benchmark training in the ranks of a torchrun job against independent processes.

    python -m scripts.benchmarks.bench_ranks

N ranks train one model with the recipe of ml-1m (conf/experiment/ml-1m.yaml), with N times its events per batch. N
independent processes each train a model of their own with the recipe's batch, at the same time and without talking. So
a step costs a rank as much as it costs an independent process, plus what ranks do together: each builds the whole
batch, waits for the largest part, and exchanges gradients. Each process has one thread. The measurement is the number
of events per second that all processes together train on, over an epoch without start, validation, and export; runs
alternate.

Histories are those of ml-1m if it is found, else generated ones of about these lengths. The benchmark needs N idle
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.benchmark import BenchmarkRecorder, benchmark_parser
from scripts.benchmarks.workloads import find_ml_1m, popular_items
from vista.config import SourceColumns
from vista.log.event_log import EventLog

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS_PER_BATCH = 2048
"""Of the recipe."""
NUM_USERS, NUM_ITEMS = 6040, 3706
"""Of ml-1m."""
BAR = "ratio >= 0.85"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments and this benchmark's own."""
    parser = benchmark_parser("ranks", __doc__)
    parser.add_argument("--data", type=Path, help="ml-1m's events.npz; default: $VISTA_DATA_DIR/ml-1m/events.npz")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks, and of independent processes")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each kind, in alternation")
    parser.add_argument("--users", type=int, default=3000, help="most users of the log")
    return parser.parse_args(arguments)


def write_log(path: Path | None, folder: Path, num_users: int) -> EventLog:
    """Write the log: the first users of ml-1m, or generated histories if `path` is None."""
    if path is None:
        rng = np.random.default_rng(0)
        # Lognormal with ml-1m's mean of 166 events, between its shortest and its longest history.
        lengths = np.clip(rng.lognormal(4.6, 1.0, min(num_users, NUM_USERS)), 20, 2314).astype(np.int64)
        user = np.repeat(np.arange(len(lengths)), lengths)
        item = popular_items(rng, len(user), NUM_ITEMS)
    else:
        with np.load(path, allow_pickle=False) as arrays:
            count = int(arrays["offsets"][1:][:num_users][-1])
            user, item = arrays["user"][:count].astype(np.int64), arrays["item"][:count].astype(np.int64)
    return EventLog.from_frame({"user": user, "item": item}, folder / "log", columns=SourceColumns(timestamp=None))


def words_of(log: EventLog, run_dir: Path, tokens_per_batch: int, seed: int) -> list[str]:
    """The words of `vista train` for one epoch of the recipe."""
    return [
        *("-m", "vista.cli", "train", "experiment=ml-1m", f"data.path={log.path}", f"run_dir={run_dir}"),
        *(f"data.tokens_per_batch={tokens_per_batch}", f"seed={seed}", "optim.epochs=1", "optim.validate_every=0"),
        *("num_threads=1", "device=cpu", "verify_log=false", "checkpoint_every=1000000"),
    ]


def events_per_second(run_dir: Path) -> float:
    """That of an epoch, by its last line of metrics."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rates: list[float] = [row["tokens_per_s"] for row in rows if "tokens_per_s" in row]
    if not rates:
        raise SystemExit(f"error: {run_dir} has too few steps to measure; use more --users")
    return rates[-1]


def run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run commands at the same time, to their ends."""
    path = os.pathsep.join(str(REPOSITORY / folder) for folder in (".", "kernels"))
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    running = [subprocess.Popen(command, env=settings, stderr=subprocess.PIPE, text=True) for command in commands]
    for process in running:
        errors = process.communicate()[1]
        if process.returncode:
            raise SystemExit(f"error: {' '.join(process.args)} failed\n{errors}")  # type: ignore[arg-type]


def torchrun(num_ranks: int) -> list[str]:
    """The beginning of a command on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def rate_of_ranks(log: EventLog, folder: Path, num_ranks: int) -> float:
    """Events per second of one job of `num_ranks` ranks."""
    run_all([[*torchrun(num_ranks), *words_of(log, folder / "ranks", num_ranks * TOKENS_PER_BATCH, seed=1)]])
    return events_per_second(folder / "ranks")


def rate_of_independent(log: EventLog, folder: Path, num_processes: int) -> float:
    """Events per second of all of `num_processes` independent processes."""
    run_dirs = [folder / f"alone-{index}" for index in range(num_processes)]
    run_all(
        [
            [sys.executable, *words_of(log, run_dir, TOKENS_PER_BATCH, seed=1 + index)]
            for index, run_dir in enumerate(run_dirs)
        ]
    )
    return sum(map(events_per_second, run_dirs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    recorder = BenchmarkRecorder("ranks", out=options.out, quick=options.quick)
    num_ranks, repeats = options.ranks, 1 if options.quick else options.repeats
    together: list[float] = []
    alone: list[float] = []
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        path = find_ml_1m(options.data)
        log = write_log(path, Path(folder), 500 if options.quick else options.users)
        for repeat in range(repeats):
            for measured, rate_of in ((together, rate_of_ranks), (alone, rate_of_independent))[:: (-1) ** repeat]:
                with tempfile.TemporaryDirectory(dir=folder) as runs:
                    measured.append(rate_of(log, Path(runs), num_ranks))
    recorder.add(
        f"{num_ranks} ranks, {'ml-1m' if path else 'generated'}: against {num_ranks} independent processes",
        float(np.median(together)),
        "events/s",
        baseline=float(np.median(alone)),
        better="more",
        bar=BAR,
        spread=float(np.subtract(*np.percentile(together, [75, 25]))),
    )
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
