"""Logs with the same visible events, and plain loops over them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vista.arrays import Int
from vista.config import SourceColumns
from vista.evaluation.cases import WindowCases
from vista.evaluation.counting_baselines import CountingBaseline, scores_in_columns
from vista.evaluation.protocol import case_batches, rank_windows
from vista.log.event_log import EventLog

HOUR = 3_600_000


def order_only_log(histories: list[list[int]], folder: Path) -> EventLog:
    """A log without times; items are ids 0 … V-1, all of which occur, so that they are also rows."""
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    frame = {"user": user, "item": np.concatenate(histories)}
    return EventLog.from_frame(frame, folder / "log", columns=SourceColumns(timestamp=None))


def timed_log(histories: list[list[tuple[int, float]]], folder: Path) -> EventLog:
    """A log of (item, hours since the start) per event."""
    user = np.repeat(np.arange(len(histories)), [len(history) for history in histories])
    item, hours = np.concatenate([np.array(history).reshape(-1, 2) for history in histories]).T
    time = 1_600_000_000_000 + np.round(hours * HOUR).astype(np.int64)
    frame = {"user": user, "item": item.astype(np.int64), "timestamp": time}
    return EventLog.from_frame(frame, folder / "log", time_unit="ms")


NUM_ITEMS = 30


def shopping_log(folder: Path, seed: int = 0, *, future: int = 0, users: int = 40) -> tuple[EventLog, Int]:
    """Users who return to favorites; the number of visible events, and a future drawn by another seed.

    Returns:
        The log, and int64 [users] visible events; the last 12 events of each user are hidden.
    """
    rng, later = np.random.default_rng(seed), np.random.default_rng([seed, future])
    histories = []
    for _ in range(users):
        favorites = rng.choice(NUM_ITEMS, 6, replace=False)
        length = int(rng.integers(90, 160))
        item = np.where(rng.random(length) < 0.6, rng.choice(favorites, length), rng.integers(0, NUM_ITEMS, length))
        hours = np.cumsum(rng.choice([0.1, 20.0], length, p=[0.8, 0.2]))
        hidden = later.integers(0, NUM_ITEMS, 12)
        gaps = np.cumsum(later.choice([0.1, 20.0], 12))
        histories.append([*zip(item, hours, strict=True), *zip(hidden, hours[-1] + gaps, strict=True)])
    histories.append([(item, float(item)) for item in range(NUM_ITEMS)])  # every item is in every log
    log = timed_log(histories, folder)
    return log, np.maximum(log.lengths - 12, 0)


@pytest.fixture(scope="package")
def shopping(tmp_path_factory: pytest.TempPathFactory) -> tuple[EventLog, Int]:
    """A `shopping_log` and its visible events."""
    return shopping_log(tmp_path_factory.mktemp("shopping"))


def quality(baseline: CountingBaseline, log: EventLog, cases: WindowCases, metric: str) -> float:
    """Mean of a window metric, such as "recall@50:new", over the cases that have it."""
    score = partial(scores_in_columns, baseline, np.arange(log.num_items))
    batches, top_k = case_batches(cases, log.num_items, 128), [int(metric.partition(":")[0].partition("@")[2])]
    metrics = rank_windows(log, {"window": cases}, np.arange(log.num_items), score, batches, top_k)
    return float(np.nanmean(metrics["window"][metric]))


def visible_items(log: EventLog, counts: Int) -> list[list[int]]:
    """The visible events of every user."""
    return [log.slice(user, 0, int(count)).item.tolist() for user, count in enumerate(counts)]
