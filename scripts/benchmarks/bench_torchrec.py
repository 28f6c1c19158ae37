"""Benchmark training with an item table that TorchRec divides among ranks against one that every rank holds.

    python -m scripts.benchmarks.bench_torchrec

Two ranks train the recipe of ml-1m (conf/experiment/ml-1m.yaml) with a hashed table of 10^6 rows, in alternation with
model.table=torchrec and with model.table=plain, both by sparse Adam. Each rank has one thread. The measurement is the
number of events per second over an epoch, without start, checkpoint, and export.

The benchmark needs TorchRec (`make bench-torchrec`) and as many idle cores as ranks.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.bench_ranks import events_per_second, run_all
from scripts.benchmarks.benchmark_recorder import BenchmarkRecorder, benchmark_parser
from vista.config import SourceColumns
from vista.log.event_log import EventLog

NUM_ROWS = 1_000_000
TOKENS_PER_BATCH = 2048
"""Per rank."""
EVENTS_PER_USER = 160
BAR = "ratio >= 0.7"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments and this benchmark's own."""
    parser = benchmark_parser("torchrec", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each kind, in alternation")
    parser.add_argument("--users", type=int, default=1080, help="users of the log")
    return parser.parse_args(arguments)


def write_log(folder: Path, num_users: int, num_items: int) -> EventLog:
    """Write a log whose items follow Zipf's law approximately: their logarithms are uniform."""
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(num_users), EVENTS_PER_USER)
    item = (num_items ** rng.random(len(user))).astype(np.int64)
    return EventLog.from_frame({"user": user, "item": item}, folder / "log", columns=SourceColumns(timestamp=None))


def words_of(log: EventLog, run_dir: Path, tokens_per_batch: int, num_rows: int, *words: str) -> list[str]:
    """The words of `vista train` for one epoch with a hashed table."""
    return [
        *("train", "experiment=ml-1m", f"data.path={log.path}", f"run_dir={run_dir}"),
        *(f"model.embedding_rows={num_rows}", "model.item_start=random"),
        *(f"data.tokens_per_batch={tokens_per_batch}", "optim.epochs=1", "optim.validate_every=0"),
        *("num_threads=1", "device=cpu", "progress=false", "verify_log=false", "checkpoint_every=1000000", *words),
    ]


def torchrun(num_ranks: int) -> list[str]:
    """The beginning of a command on loopback."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    return [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    options = parse(arguments)
    if importlib.util.find_spec("torchrec") is None:
        raise SystemExit("error: TorchRec is not installed; run `make bench-torchrec`")
    recorder = BenchmarkRecorder("torchrec", out=options.out, quick=options.quick)
    num_ranks, repeats = options.ranks, 1 if options.quick else options.repeats
    rates: dict[str, list[float]] = {"torchrec": [], "plain": []}
    with tempfile.TemporaryDirectory(prefix="vista-bench-") as folder:
        log = write_log(Path(folder), 600 if options.quick else options.users, NUM_ROWS)
        for repeat in range(repeats):
            for kind in sorted(rates)[:: (-1) ** repeat]:
                with tempfile.TemporaryDirectory(dir=folder) as runs:
                    tokens, table = num_ranks * TOKENS_PER_BATCH, f"model.table={kind}"
                    words = words_of(log, Path(runs) / "run", tokens, NUM_ROWS, table)
                    run_all([[*torchrun(num_ranks), "-m", "vista.cli", *words]])
                    rates[kind].append(events_per_second(Path(runs) / "run"))
    recorder.add(
        f"{num_ranks} ranks, 10^6 rows: model.table=torchrec against plain",
        float(np.median(rates["torchrec"])),
        "events/s",
        baseline=float(np.median(rates["plain"])),
        better="more",
        bar=BAR,
        spread=float(np.subtract(*np.percentile(rates["torchrec"], [75, 25]))),
    )
    recorder.print_summary()
    return 0


if __name__ == "__main__":
    sys.exit(main())
