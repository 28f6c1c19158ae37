"""Train RecTools' SASRec or HSTU for some epochs, print their cost as one JSON line, and optionally recommend.

Runs in its own environment with RecTools and without vista, since RecTools requires numpy<2:

    python -m venv rectools && rectools/bin/pip install "rectools[torch]"
    rectools/bin/python scripts/benchmarks/rectools_training.py events.npz --epochs 2 --loss softmax
    rectools/bin/python scripts/benchmarks/rectools_training.py events.npz --model HSTU --recommend lists.npz

The data are an npz of three arrays of equal length, `user`, `item` and `timestamp` (seconds, or ordinals if only the
order counts). RecTools keeps each user's last session_max_len + 1 events, the first of which is only an input.
The time includes loading, shuffling and collating of batches, but not the preparation of the data set and the
construction of the model.

For --recommend the npz also has `validation_user`, `validation_item`, `validation_timestamp` and the same arrays for
`test`: one event per user, later than all of the user's events above. The lists are int64 [users, top_k] under
`validation` and `test`, best first, padded with -1. They exclude items of the user's history, which for `test` includes
the validation item. A model gets only the time of the event to predict, and only with --relative-time.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pytorch_lightning import Trainer, seed_everything  # type: ignore[import-not-found]
from pytorch_lightning.callbacks import LambdaCallback  # type: ignore[import-not-found]
from rectools import Columns  # type: ignore[import-not-found]
from rectools.dataset import Dataset  # type: ignore[import-not-found]
from rectools.metrics import NDCG, HitRate, calc_metrics  # type: ignore[import-not-found]
from rectools.models import HSTUModel, SASRecModel  # type: ignore[import-not-found]

# The first batches of a shortened epoch are warm-up and are excluded from the estimate.
WARMUP_BATCHES = 2
PARTS = ("validation", "test")


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="npz of user, item, timestamp")
    parser.add_argument("--model", choices=["SASRec", "HSTU"], default="SASRec")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument(
        "--max-batches", type=int, default=0, help="stop every epoch after this many batches and estimate its time"
    )
    parser.add_argument("--session-max-len", type=int, default=200)
    parser.add_argument("--n-factors", type=int, default=64)
    parser.add_argument("--n-blocks", type=int, default=2)
    parser.add_argument("--n-heads", type=int, default=4)
    parser.add_argument("--dropout", type=float, default=0.2, help="0 lets CPUs use torch's fused attention")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--loss", choices=["softmax", "BCE", "gBCE", "sampled_softmax"], default="softmax")
    parser.add_argument("--n-negatives", type=int, default=1, help="per position; softmax uses the whole catalog")
    parser.add_argument("--distance", choices=["dot", "cosine"], default="dot", help="similarity of users and items")
    parser.add_argument("--temperature", type=float, default=1.0, help="divides the logits in training")
    parser.add_argument(
        "--scale-inputs", action="store_true", help="multiply item vectors by sqrt(n_factors), as published"
    )
    parser.add_argument("--mask-padding", action="store_true", help="SASRec: do not attend to padding, as published")
    parser.add_argument("--relative-time", action="store_true", help="HSTU: use the time bias, which needs real times")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up to --lr")
    parser.add_argument("--decay", action="store_true", help="cosine decay from --lr to 1 %% of it")
    parser.add_argument("--gradient-clip", type=float, default=0.0, help="largest global norm; 0: no clipping")
    parser.add_argument("--workers", type=int, default=0, help="processes that load batches")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0: torch's default")
    parser.add_argument("--precision", choices=["32-true", "bf16-mixed", "bf16-true"], default="32-true")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--recommend", type=Path, help="write the lists to this npz; see above")
    parser.add_argument("--top-k", type=int, default=200, help="length of the lists")
    return parser.parse_args(given)


def read_events(path: Path, prefix: str = "") -> pd.DataFrame:
    """Events of the npz as a RecTools frame; ordinals become seconds."""
    with np.load(path, allow_pickle=False) as arrays:
        frame = pd.DataFrame({Columns.User: arrays[f"{prefix}user"], Columns.Item: arrays[f"{prefix}item"]})
        frame[Columns.Datetime] = pd.to_datetime(arrays[f"{prefix}timestamp"], unit="s")
    frame[Columns.Weight] = 1.0
    return frame


class TrainingClock:
    """Seconds of every epoch, and the times at which its batches ended."""

    def __init__(self) -> None:
        self.epochs: list[dict[str, Any]] = []

    def start(self) -> None:
        """Note that an epoch starts, before its first batch is loaded."""
        self.epochs.append({"began": time.perf_counter(), "batches": []})

    def batch(self) -> None:
        """Note that a batch ended."""
        self.epochs[-1]["batches"].append(time.perf_counter())

    def end(self) -> None:
        """Note that the epoch ended."""
        self.epochs[-1]["seconds"] = time.perf_counter() - self.epochs[-1]["began"]

    def seconds(self, total_batches: int) -> list[float]:
        """Seconds of each epoch, scaled up to total_batches if it was shortened."""
        times = []
        for epoch in self.epochs:
            counted = epoch["batches"][WARMUP_BATCHES - 1 :]
            is_whole = len(epoch["batches"]) >= total_batches
            per_batch = 0.0 if is_whole else (counted[-1] - counted[0]) / (len(counted) - 1)
            times.append(epoch["seconds"] if is_whole else per_batch * total_batches)
        return times


def learning_rate(options: argparse.Namespace, step: int, steps: int) -> float:
    """The learning rate of step 0, 1, … of `steps`, with the warm-up and decay of the options."""
    rate: float = options.lr * min(1.0, (step + 1) / max(options.warmup_steps, 1))
    return rate * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / steps))) if options.decay else rate


def build(options: argparse.Namespace, clock: TrainingClock) -> SASRecModel | HSTUModel:
    """The model with its trainer."""

    def set_rate(trainer: Trainer) -> None:
        steps = options.epochs * trainer.num_training_batches
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = learning_rate(options, trainer.global_step, steps)

    def trainer() -> Trainer:
        # As RecTools' own trainer, except for the clock, the learning rate and these arguments.
        return Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=options.epochs,
            min_epochs=options.epochs,
            limit_train_batches=options.max_batches or None,
            gradient_clip_val=options.gradient_clip or None,
            precision=options.precision,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            logger=False,
            # Lambdas instead of methods: RecTools deep-copies its trainer, which would also copy the clock.
            callbacks=[
                LambdaCallback(
                    on_train_epoch_start=lambda *_: clock.start(),
                    on_train_batch_start=lambda trainer, *_: set_rate(trainer),
                    on_train_batch_end=lambda *_: clock.batch(),
                    on_train_epoch_end=lambda *_: clock.end(),
                )
            ],
        )

    own = {"use_key_padding_mask": options.mask_padding}
    if options.model == "HSTU":
        own = {"relative_time_attention": options.relative_time}
    return {"SASRec": SASRecModel, "HSTU": HSTUModel}[options.model](
        n_blocks=options.n_blocks,
        n_heads=options.n_heads,
        n_factors=options.n_factors,
        dropout_rate=options.dropout,
        session_max_len=options.session_max_len,
        loss=options.loss,
        n_negatives=options.n_negatives,
        lr=options.lr,
        batch_size=options.batch_size,
        epochs=options.epochs,
        dataloader_num_workers=options.workers,
        get_trainer_func=trainer,
        similarity_module_kwargs={"distance": options.distance},
        lightning_module_kwargs={"logits_t": options.temperature},
        pos_encoding_kwargs={"use_scale_factor": options.scale_inputs},
        **own,
    )


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train, optionally recommend, and return the report to print."""
    if options.threads:
        torch.set_num_threads(options.threads)
    seed_everything(options.seed, verbose=False)
    clock = TrainingClock()
    model = build(options, clock)
    events = read_events(options.data)
    model.fit(Dataset.construct(events))
    lists, metrics = recommend(model, events, options) if options.recommend is not None else ({}, {})
    if lists:
        np.savez(options.recommend, validation=lists["validation"], test=lists["test"])
    interactions = model.data_preparator.train_dataset.interactions.df
    users = int(interactions[Columns.User].nunique())
    total_batches = -(-users // options.batch_size)
    loss = model.fit_trainer.callback_metrics.get("train_loss")
    return {
        "baseline": f"RecTools {options.model}",
        "seconds_per_epoch": clock.seconds(total_batches),
        "estimated": bool(options.max_batches and options.max_batches < total_batches),
        "positions": len(interactions) - users,
        "users": users,
        "items": int(interactions[Columns.Item].nunique()),
        "parameters": sum(parameter.numel() for parameter in model.lightning_model.torch_model.parameters()),
        "train_loss": None if loss is None else float(loss),
        "metrics": metrics,
        "settings": {key: value for key, value in vars(options).items() if key not in ("data", "recommend")},
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("rectools", "pytorch-lightning", "torch", "numpy")},
    }


def recommend(
    model: SASRecModel | HSTUModel, history: pd.DataFrame, options: argparse.Namespace
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """Per part the lists int64 [users, top_k], users in the order of the npz, and RecTools' own metrics of them."""
    lists, metrics = {}, {}
    # With one label per user the best achievable gain is 1, as in other libraries.
    judges = {"hr@10": HitRate(10), "ndcg@10": NDCG(10, divide_by_achievable=True)}
    for part in PARTS:
        asked = read_events(options.data, f"{part}_")
        lists[part], recommended = answers(model, Dataset.construct(history), asked, options.top_k)
        metrics[part] = {name: float(value) for name, value in calc_metrics(judges, recommended, asked).items()}
        history = pd.concat([history, asked], ignore_index=True)
    return lists, metrics


def answers(
    model: SASRecModel | HSTUModel, history: Dataset, asked: pd.DataFrame, top_k: int
) -> tuple[np.ndarray, pd.DataFrame]:
    """The lists int64 [users, top_k] for the users of the events `asked`, and RecTools' frame of the same lists."""
    recommended = model.recommend(
        asked[Columns.User],
        history,
        top_k,
        filter_viewed=True,
        on_unsupported_targets="ignore",
        # RecTools replaces the item by its padding.
        context=asked.copy() if model.require_recommend_context else None,
    )
    lists = np.full((len(asked), top_k), -1, np.int64)
    row = pd.Index(asked[Columns.User]).get_indexer(recommended[Columns.User])
    lists[row, recommended[Columns.Rank] - 1] = recommended[Columns.Item]
    return lists, recommended


def main() -> None:
    """Entry point."""
    warnings.filterwarnings("ignore")  # Lightning warns about workers and logging; the report says what was set
    options = arguments()
    if 0 < options.max_batches <= WARMUP_BATCHES:
        raise SystemExit(f"--max-batches must be above the {WARMUP_BATCHES} batches of warm-up")
    print(json.dumps(train(options)), flush=True)


if __name__ == "__main__":
    main()
