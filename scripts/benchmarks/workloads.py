"""Inputs of the benchmarks: generated logs, ml-1m if available, and models with random weights.

Timings do not depend on the values of the weights, so only the training benchmark trains a model.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config import DataConfig, ModelConfig, SourceColumns
from vista.config.checks import Mixing
from vista.log.event_log import EventLog
from vista.model.features import Schema
from vista.model.vista_model import VistaModel

TASK = "click"
ACTIONS = ("view", "click", "like", "share")
START_MS = 1_600_000_000_000
MEAN_GAP_MS = 60_000.0


def popular_items(rng: np.random.Generator, num_events: int, num_items: int) -> NDArray[np.int64]:
    """int64 [num_events] in [0, num_items) by Zipf's law: the r-th most popular item is r times rarer than the 1st."""
    cumulative = np.cumsum(1.0 / np.arange(1, num_items + 1))
    drawn: NDArray[np.int64] = np.searchsorted(cumulative, rng.random(num_events) * cumulative[-1])
    return np.minimum(drawn, num_items - 1)


def lifelong_log(folder: Path, lengths: Sequence[int], *, num_items: int = 50_000, seed: int = 0) -> EventLog:
    """Write and open a log with times and four actions, in which users 1, 2, … have `lengths` events."""
    import polars as pl

    rng = np.random.default_rng(seed)
    counts = np.asarray(lengths, np.int64)
    total = int(counts.sum())
    # Every item occurs at least once, so that the vocabulary does not depend on the lengths.
    item = np.concatenate(
        [rng.permutation(num_items)[:total], popular_items(rng, max(total - num_items, 0), num_items)]
    )
    gap = rng.exponential(MEAN_GAP_MS, total).astype(np.int64) + 1
    time = np.cumsum(gap)
    first = np.cumsum(counts) - counts
    time -= np.repeat(time[np.minimum(first, max(total - 1, 0))], counts)  # every history starts at START_MS
    frame = pl.DataFrame(
        {
            "user": np.repeat(np.arange(1, len(counts) + 1), counts),
            "item": item + 1,
            "timestamp": START_MS + time,
            "action": pl.Series(ACTIONS).gather(rng.integers(0, len(ACTIONS), total)),
        }
    )
    return EventLog.from_frame(frame, folder, time_unit="ms", columns=SourceColumns(action="action"))


def untrained(
    log: EventLog,
    *,
    dim: int,
    num_seeds: int,
    mixing: Mixing = Mixing.separable,
    num_layers: int = 2,
    tail_len: int = 32,
    counter_keys: Sequence[str] = (),
    seed: int = 1,
) -> VistaModel:
    """A model for this log with one labeled task and random weights, in eval mode.

    Bidirectional mixing has no convolution, as in the paper.
    """
    torch.manual_seed(seed)
    config = ModelConfig(
        dim=dim,
        num_seeds=num_seeds,
        mixing=mixing,
        num_layers=num_layers,
        conv_width=3 if mixing is Mixing.separable else 1,
        tail_len=tail_len,
        counter_keys=[*counter_keys],
    )
    schema = Schema(list(log.actions), log.has_time, None, [TASK])
    return with_drawn_weights(VistaModel(config, schema, log.items, DataConfig()).eval())


def with_drawn_weights(model: VistaModel) -> VistaModel:
    """The same model, with random values where weights start at zero, so that every part changes the scores."""
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return model


def find_ml_1m(given: Path | None) -> Path | None:
    """Path of ml-1m's events.npz: the given one, else the one under VISTA_DATA_DIR, or None if neither exists.

    Raises:
        SystemExit: if `given` is not a file.
    """
    if given is not None:
        if not given.is_file():
            raise SystemExit(f"error: --data {given}: no such file; give the path of ml-1m's events.npz")
        return given
    folder = os.environ.get("VISTA_DATA_DIR")
    path = Path(folder) / "ml-1m" / "events.npz" if folder else None
    return path if path is not None and path.is_file() else None
