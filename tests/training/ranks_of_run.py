"""Processes that are forked for tests: functions, and trainings in several ranks, as torchrun starts them.

`start` forks the ranks from a process that has imported torch. `torchrun` runs the command, which takes seconds.
As a program, this takes the words of `vista train`. A word such as 1:model.dim=8 is only for rank 1. With the
environment variable KILL=1:7, rank 1 kills itself at its step 7; with CHANGE=1:7, it changes one of its weights there;
and with VERSION=1:9.9, it has that version of vista. Each rank prints at the end how many rows of the item table it
holds, and a digest of its weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # The first optimizer of a process imports it, which takes a second.

from tests.faults.nursery import Child, Say, shared_nursery
from vista.cli.main import main
from vista.config import TrainConfig
from vista.config.composition import to_yaml
from vista.examples.batch import Batch
from vista.model.ranking_model import RankingModel
from vista.training import trainer
from vista.training.trainer import Trainer, train_model


def forked(function: Callable[..., Any], *arguments: Any) -> Child:
    """Start `function(say, *arguments)` of a module in a process that has imported torch and vista."""
    shared_nursery().imports(__name__)
    return shared_nursery().start(function, *arguments)


class WatchedTrainer(Trainer):
    """Kills itself where it is asked to, and prints its weights."""

    def _step(self, batch: Batch) -> dict[str, float]:
        place = f"{os.environ['RANK']}:{self.progress.step}"
        if os.environ.get("KILL") == place:
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("CHANGE") == place:
            with torch.no_grad():
                self.model.item_table[1, 0] += 1e-6  # what one flipped bit may change
        return super()._step(batch)

    def run(self) -> RankingModel:
        best = super().run()
        weights = b"".join(weight.detach().numpy().tobytes() for weight in self.model.state_dict().values())
        print(f"rows {len(self.model.item_table)}", flush=True)
        print(f"weights {hashlib.sha256(weights).hexdigest()}", flush=True)
        return best


def command(words: list[str]) -> int:
    """`vista train` as one rank."""
    rank = os.environ["RANK"]
    own = [re.sub(rf"^{rank}:", "", word) for word in words]
    if os.environ.get("VERSION", "").startswith(f"{rank}:"):
        trainer.__version__ = os.environ["VERSION"].partition(":")[2]
    train_model.__globals__["Trainer"] = WatchedTrainer
    trainer.train_model = partial(train_model, metrics_every=1)  # type: ignore[assignment]
    return main(["train", *(word for word in own if not re.match(r"\d+:", word))])


def _file_of(config: TrainConfig) -> str:
    path = Path(config.run_dir).with_suffix(".yaml")
    path.write_text(to_yaml(config))
    return f"--config={path}"


def torchrun(
    config: TrainConfig, num_ranks: int, *words: str, kill: str = "", change: str = "", version: str = ""
) -> subprocess.CompletedProcess[str]:
    """Train under torchrun on loopback."""
    program = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={num_ranks}"]
    program += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", "-m", "tests.training.ranks_of_run"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "KILL": kill, "CHANGE": change, "VERSION": version}
    given = [*program, _file_of(config), *words]
    return subprocess.run(given, capture_output=True, text=True, env=environment, timeout=240)


def _rank(say: Say, environment: dict[str, str], words: list[str], output: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT), number)
    code = command(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def start(
    config: TrainConfig, num_ranks: int, *words: str, kill: str = "", change: str = "", version: str = ""
) -> subprocess.CompletedProcess[str]:
    """Train in processes that have what torchrun gives them. The exit code is the first one that is not 0."""
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = str(chosen.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(num_ranks), "TORCHELASTIC_RUN_ID": "0"}
    shared |= {"LOCAL_WORLD_SIZE": str(num_ranks), "KILL": kill, "CHANGE": change, "VERSION": version}
    given = [_file_of(config), *words]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            forked(_rank, shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, given, f"{folder}/{rank}")
            for rank in range(num_ranks)
        ]
        try:
            codes = [process.end().exit_code for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        texts = [
            "".join(f"rank {rank}: {Path(f'{folder}/{rank}.{name}').read_text()}" for rank in range(num_ranks))
            for name in ("out", "err")
        ]
    return subprocess.CompletedProcess(given, next((code for code in codes if code), 0), *texts)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:]))
