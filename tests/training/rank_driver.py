"""A command of vista in a torchrun job, for tests.

It takes the words of `vista train`, and writes a line of metrics.jsonl per step. A word such as 1:model.dim=8 is only
for rank 1. With the environment variable KILL=1:7, rank 1 kills itself at its step 7; with CHANGE=1:7, it changes one
of its weights there; and with VERSION=1:9.9, it has that version of vista. Each rank prints at the end how many rows of
the item table it holds, and a digest of its weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import sys
from functools import partial

import torch

from vista.cli import train_commands
from vista.cli.main import main
from vista.examples.batch import Batch
from vista.model.ranking_model import RankingModel
from vista.training import run_identity
from vista.training.trainer import Trainer, train_model

RANK = os.environ["RANK"]


class WatchedTrainer(Trainer):
    """Kills itself where it is asked to, and prints its weights."""

    def _step(self, batch: Batch, share_done: float) -> dict[str, float]:
        if os.environ.get("KILL") == f"{RANK}:{self.progress.step}":
            os.kill(os.getpid(), signal.SIGKILL)
        if os.environ.get("CHANGE") == f"{RANK}:{self.progress.step}":
            with torch.no_grad():
                self.model.item_table[1, 0] += 1e-6  # what one flipped bit may change
        return super()._step(batch, share_done)

    def run(self) -> RankingModel:
        best = super().run()
        weights = b"".join(weight.detach().numpy().tobytes() for weight in self.model.state_dict().values())
        print(f"rows {len(self.model.item_table)}", flush=True)
        print(f"weights {hashlib.sha256(weights).hexdigest()}", flush=True)
        return best


if __name__ == "__main__":
    words = [re.sub(rf"^{RANK}:", "", word) for word in sys.argv[1:]]
    if os.environ.get("VERSION", "").startswith(f"{RANK}:"):
        run_identity.__version__ = os.environ["VERSION"].partition(":")[2]
    train_model.__globals__["Trainer"] = WatchedTrainer
    train_commands.train_model = partial(train_model, metrics_every=1)
    sys.exit(main(["train", *(word for word in words if not re.match(r"\d+:", word))]))
