"""Train an item table that is larger than one process should hold, and print the memory of each rank.

    python -m scripts.benchmarks.large_table

Two ranks train a hashed table of 10^8 rows x 64 for 100 steps: TorchRec holds half of the rows on each of them, as
float16, with one number per row for row-wise Adagrad. The run makes no checkpoint and no export, which take 13 and
26 GB of disk. It needs TorchRec (`make test-torchrec` installs it) and 15 GB of memory.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from scripts.benchmarks.bench_torchrec import EVENTS_PER_USER, TOKENS_PER_BATCH, torchrun, words_of, write_log
from vista.cli.main import main as vista
from vista.examples.batch import Batch
from vista.model.ranking_model import RankingModel
from vista.training import trainer
from vista.training.run_folder import MetricsWriter

GIB = 2**30
SETTINGS = ("model.table=torchrec", "optim.table_optimizer=rowwise_adagrad", "model.table_precision=float16")


class TableTrainer(trainer.Trainer):
    """Trains an epoch, and prints the memory of its process."""

    def run(self) -> RankingModel:
        print(f"rank {self._rank}: {_memory()} with {len(self.model.item_table):,} rows", flush=True)
        metrics = MetricsWriter(self.run_dir)
        self._start(metrics)
        began = time.perf_counter()
        self._run_epoch(metrics, [])
        seconds = time.perf_counter() - began
        print(f"rank {self._rank}: {_memory()} after {self.progress.step} steps in {seconds:.1f} s", flush=True)
        return self.model

    @property
    def _rank(self) -> int:
        return 0 if self._ranks is None else self._ranks.rank

    def _step(self, batch: Batch, share_done: float) -> dict[str, float]:
        row = super()._step(batch, share_done)
        if self._leads and self.progress.step % 20 == 0:
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the ranks, or be one of them."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["train"]:
        trainer.train_model.__globals__["Trainer"] = TableTrainer
        return vista(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10**8, help="rows of the table")
    parser.add_argument("--steps", type=int, default=100, help="steps to train")
    parser.add_argument("--ranks", type=int, default=2, help="number of ranks")
    options = parser.parse_args(words)
    tokens = options.ranks * TOKENS_PER_BATCH
    with tempfile.TemporaryDirectory(prefix="vista-table-") as folder:
        log = write_log(Path(folder), -(-options.steps * tokens // EVENTS_PER_USER), options.rows)
        command = [*torchrun(options.ranks), "-m", "scripts.benchmarks.large_table"]
        command += words_of(log, Path(folder) / "run", tokens, options.rows, *SETTINGS)
        return subprocess.run(command).returncode


if __name__ == "__main__":
    sys.exit(main())
