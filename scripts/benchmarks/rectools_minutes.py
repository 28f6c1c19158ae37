"""Train RecTools' SASRec or HSTU with its default settings for some minutes, with a validation after each epoch.

Runs in RecTools' own environment, as rectools_training.py does, for scripts/experiments/minutes_rectools.py:

    rectools/bin/python scripts/benchmarks/rectools_minutes.py split.npz --asked asked.npy --lists lists.npz

The npz is that of rectools_training.py with --recommend; asked.npy has the rows of its `validation_user` that
validation asks. Training ends when the time is up, in the middle of an epoch if need be, with one more validation. The
time includes the construction of the data set and the model, and the validations, but not the lists for the test,
which are made after each epoch with the best NDCG@10 so far. The report is one JSON line. The lists are int64, best
first, padded with -1: `validation` [validations, asked users, 10] and `test` [users, --top-k].
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything  # type: ignore[import-not-found]
from pytorch_lightning.callbacks import LambdaCallback  # type: ignore[import-not-found]
from rectools import Columns  # type: ignore[import-not-found]
from rectools.dataset import Dataset  # type: ignore[import-not-found]
from rectools.models import HSTUModel, SASRecModel  # type: ignore[import-not-found]
from rectools_training import answers, read_events  # type: ignore[import-not-found]

TOP_K = 10
"""Length of the lists for validation."""
SETTINGS = (
    *("n_blocks", "n_heads", "n_factors", "session_max_len", "dropout_rate", "loss", "lr", "batch_size"),
    *("train_min_user_interactions", "use_pos_emb", "use_key_padding_mask", "use_causal_attn"),
    *("relative_time_attention", "relative_pos_attention"),
)
"""Settings of the report, as the constructor has left them; only HSTU has the last two."""


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="npz of the split")
    parser.add_argument("--asked", type=Path, required=True, help="npy of the rows that validation asks")
    parser.add_argument("--lists", type=Path, required=True, help="write the lists to this npz")
    parser.add_argument("--model", choices=["SASRec", "HSTU"], default="SASRec")
    parser.add_argument("--no-times", action="store_true", help="HSTU: no time bias, for events without times")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--top-k", type=int, default=200, help="length of the lists for the test")
    return parser.parse_args(given)


class TimedTraining:
    """Trains a model until the time is up, and keeps the lists of each validation."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._budget_s, self._top_k = 60 * options.minutes, options.top_k
        events = read_events(options.data)
        held_out = read_events(options.data, "validation_")
        self._asked = held_out.iloc[np.load(options.asked)].reset_index(drop=True)
        self._tested = read_events(options.data, "test_")
        # Built before the clock starts, as only the test needs it.
        self._test_history = Dataset.construct(pd.concat([events, held_out], ignore_index=True))
        self._began, self._uncounted_s, self._validation_s = time.perf_counter(), 0.0, 0.0
        self._history = Dataset.construct(events)
        times = {"relative_time_attention": False} if options.no_times else {}
        self.model = {"SASRec": SASRecModel, "HSTU": HSTUModel}[options.model](get_trainer_func=self._trainer, **times)
        self.seconds: list[float] = []
        self.ndcg: list[float] = []
        self.lists: list[np.ndarray] = []
        self.test_lists = np.empty((0, 0), np.int64)

    def run(self) -> None:
        """Train until the time is up."""
        self.model.fit(self._history)

    def _trainer(self) -> Trainer:
        # As RecTools' own trainer, but the time limits training, not a number of epochs.
        return Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=-1,
            min_epochs=0,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            # Lambdas instead of methods: RecTools deep-copies its trainer, which would also copy this object.
            callbacks=[
                LambdaCallback(
                    on_train_batch_end=lambda trainer, *_: self._stop_in_time(trainer),
                    on_train_epoch_end=lambda trainer, module: self._validate(trainer, module),
                )
            ],
        )

    def _elapsed_s(self) -> float:
        return time.perf_counter() - self._began - self._uncounted_s

    def _stop_in_time(self, trainer: Trainer) -> None:
        """Stop if only a validation fits into the rest of the time."""
        if self._elapsed_s() + self._validation_s >= self._budget_s:
            trainer.should_stop = True

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        began = self._elapsed_s()
        self.model.is_fitted = True  # otherwise RecTools refuses to recommend during training
        lists, _ = answers(self.model, self._history, self._asked, TOP_K)
        hits = lists == self._asked[Columns.Item].to_numpy()[:, None]
        self.ndcg.append(float((hits / np.log2(np.arange(2, TOP_K + 2))).sum(1).mean()))
        self.lists.append(lists)
        self.seconds.append(self._elapsed_s())
        self._validation_s = self.seconds[-1] - began
        if self.ndcg[-1] > max(self.ndcg[:-1], default=-1.0):
            began_s = time.perf_counter()
            self.test_lists, _ = answers(self.model, self._test_history, self._tested, self._top_k)
            self._uncounted_s += time.perf_counter() - began_s
        module.train()  # recommending switched to evaluation
        self._stop_in_time(trainer)


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, write the lists, and return the report to print."""
    if options.threads:
        torch.set_num_threads(options.threads)
    seed_everything(options.seed, verbose=False)
    training = TimedTraining(options)
    training.run()
    np.savez(options.lists, validation=np.stack(training.lists), test=training.test_lists)
    model = training.model
    return {
        "seconds": training.seconds,
        "ndcg@10": training.ndcg,
        "settings": {key: value for key, value in vars(model).items() if key in SETTINGS},
        "parameters": sum(parameter.numel() for parameter in model.torch_model.parameters()),
        "versions": {name: version(name) for name in ("rectools", "pytorch-lightning", "torch", "numpy")},
    }


def main() -> None:
    """Entry point."""
    warnings.filterwarnings("ignore")  # Lightning warns about workers and logging; the report says what was set
    print(json.dumps(train(arguments())), flush=True)


if __name__ == "__main__":
    main()
