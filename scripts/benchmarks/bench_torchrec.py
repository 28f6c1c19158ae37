"""Benchmark training with an item table that TorchRec divides among ranks against one that every rank holds.

    python -m scripts.benchmarks.bench_torchrec

Two ranks train the recipe of ml-1m (conf/experiment/ml-1m.yaml) with a hashed table of 10^6 rows, in alternation with
model.table=torchrec and with model.table=plain, both by sparse Adam. Each rank has one thread. The measurement is the
number of events per second over an epoch, without start, checkpoint, and export.

    python -m scripts.benchmarks.bench_torchrec --large

prints the memory of each rank instead: two ranks train a hashed table of 10^8 rows x 64 for 100 steps, which is larger
than one process should hold. TorchRec holds half of the rows on each rank, as float16, with one number per row for
row-wise Adagrad. The run makes no checkpoint and no export, which take 13 and 26 GB of disk, and needs 15 GB of memory.

Both need TorchRec (`make bench-torchrec`) and as many idle cores as ranks.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from scripts.benchmarks.bench_ranks import events_per_second, run_all, torchrun
from scripts.benchmarks.benchmark import benchmark_parser, recording
from vista.cli.main import main as vista
from vista.config import SourceColumns
from vista.examples.batch import Batch
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.training import trainer
from vista.training.run_folder import RunRecord

NUM_ROWS = 1_000_000
TOKENS_PER_BATCH = 2048
"""Per rank."""
EVENTS_PER_USER = 160
BAR = "ratio >= 0.7"
GIB = 2**30
LARGE = ("model.table=torchrec", "optim.table_optimizer=rowwise_adagrad", "model.table_precision=float16")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the shared arguments and this benchmark's own."""
    parser = benchmark_parser("torchrec", __doc__)
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    parser.add_argument("--repeats", type=int, default=3, help="epochs of each kind, in alternation")
    parser.add_argument("--users", type=int, default=1080, help="users of the log")
    parser.add_argument("--large", action="store_true", help="train a large table, and print the memory of each rank")
    parser.add_argument("--rows", type=int, default=10**8, help="rows of the large table")
    parser.add_argument("--steps", type=int, default=100, help="steps to train it")
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


class TableTrainer(trainer.Trainer):
    """Trains an epoch, and prints the memory of its process."""

    def run(self) -> RankingModel:
        print(f"rank {self._ranks.rank}: {_memory()} with {len(self.model.item_table):,} rows", flush=True)
        metrics = RunRecord(self.config, self.model, self.validation)
        self._start(metrics)
        began = time.perf_counter()
        self._run_epoch(metrics, [])
        seconds = time.perf_counter() - began
        print(f"rank {self._ranks.rank}: {_memory()} after {self.progress.step} steps in {seconds:.1f} s", flush=True)
        return self.model

    def _step(self, batch: Batch, share_done: float) -> dict[str, float]:
        row = super()._step(batch, share_done)
        if self._ranks.leads and self.progress.step % 20 == 0:
            print(f"step {self.progress.step}: loss {row['loss']:.3f}", flush=True)
        return row

    def _save(self) -> None:
        """No checkpoint."""


def _memory() -> str:
    """The most memory that this process has had, and what it has now apart from mapped files."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    most, own = (int(fields[name].split()[0]) * 1024 / GIB for name in ("VmHWM", "RssAnon"))
    return f"{own:.2f} GiB, at most {most:.2f} GiB"


def train_large(options: argparse.Namespace) -> int:
    """Train a large table in ranks that print their memory; returns the exit status."""
    tokens = options.ranks * TOKENS_PER_BATCH
    with tempfile.TemporaryDirectory(prefix="vista-table-") as folder:
        log = write_log(Path(folder), -(-options.steps * tokens // EVENTS_PER_USER), options.rows)
        words = words_of(log, Path(folder) / "run", tokens, options.rows, *LARGE)
        command = [*torchrun(options.ranks), "-m", "scripts.benchmarks.bench_torchrec", *words]
        return subprocess.run(command).returncode


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["train"]:  # a rank of --large
        trainer.train_model.__globals__["Trainer"] = TableTrainer
        return vista(words)
    options = parse(words)
    if importlib.util.find_spec("torchrec") is None:
        raise SystemExit("error: TorchRec is not installed; run `make bench-torchrec`")
    if options.large:
        return train_large(options)
    num_ranks, repeats = options.ranks, 1 if options.quick else options.repeats
    rates: dict[str, list[float]] = {"torchrec": [], "plain": []}
    with recording("torchrec", __doc__, options) as recorder:
        log = write_log(recorder.folder, 600 if options.quick else options.users, NUM_ROWS)
        for repeat in range(repeats):
            for kind in sorted(rates)[:: (-1) ** repeat]:
                with tempfile.TemporaryDirectory(dir=recorder.folder) as runs:
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
