"""Logs that have grown, and runs that start from an earlier model."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from tests.conftest import DAY, small_frame
from tests.training.feature_world import feature_frame
from vista.config import SourceColumns, TrainConfig
from vista.config.checks import InitFreeze
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.training.checkpoint import latest_checkpoint, load_checkpoint, unpack_state
from vista.training.optimizers import Moments, moments_of
from vista.training.trainer import Trainer
from vista.training.warm_start import WarmStart

COLUMNS = SourceColumns(action="action", rating="rating")
Run: TypeAlias = tuple[TrainConfig, VistaModel]
"""A finished run: its configuration, and its model."""
NEW_ITEMS = [5, 1000, 2000]
"""Items that only the grown logs have; the first one is in the middle of the old ids."""


FROZEN = {"init_freeze": InitFreeze.summarizer}


def part(frame: dict[str, Any], kept: np.ndarray) -> dict[str, Any]:
    """The rows of a frame where `kept` is True."""
    return {name: np.asarray(column)[kept] for name, column in frame.items()}


def more_events() -> dict[str, Any]:
    """Later events of some users, and new users; a fifth is of new items."""
    frame, rng = small_frame(seed=1), np.random.default_rng(2)
    frame["user"] = frame["user"] + 8
    frame["timestamp"] = frame["timestamp"] + 500 * DAY
    is_new = rng.random(len(frame["user"])) < 0.2
    frame["item"] = np.where(is_new, rng.choice(NEW_ITEMS, len(is_new)), frame["item"])
    return frame


def features(items: np.ndarray) -> dict[str, Any]:
    """A table of items, the same for an item in every log. New items have new values, and larger numbers."""
    known = np.arange(0, 400, 10)
    table, place = feature_frame(known), {int(item): row for row, item in enumerate(known)}
    rows = [place.get(int(item), 3) for item in items]
    chosen = {name: [column[row] for row in rows] for name, column in table.items()}
    is_new = ~np.isin(items, known)
    chosen["item"] = items
    chosen["brand"] = ["brand 9" if new else brand for new, brand in zip(is_new, chosen["brand"], strict=True)]
    chosen["price"] = np.where(is_new, 1000.0, np.array(chosen["price"], np.float64))
    return chosen


def grow(path: Path, to: Path) -> EventLog:
    """A copy of a log with `more_events`, and features of their items."""
    shutil.copytree(path, to)
    frame = more_events()
    items = features(np.unique(frame["item"]))
    return EventLog.from_frame(frame, to, time_unit="ms", columns=COLUMNS, items=items, append=True)


def warm_config(config: TrainConfig, log: EventLog, run_dir: Path, **changes: Any) -> TrainConfig:
    """A run that starts from the run of `config`."""
    warm = replace(
        config,
        model=replace(config.model),
        data=replace(config.data, path=str(log.path)),
        optim=replace(config.optim),
        init_from=str(Path(config.run_dir) / "best"),
        run_dir=str(run_dir),
    )
    for key, value in changes.items():
        group, _, name = key.rpartition("__")
        setattr(getattr(warm, group) if group else warm, name, value)
    return warm


def begun(config: TrainConfig, log: EventLog) -> tuple[WarmStart, Trainer]:
    """A warm start before its first step."""
    warm = WarmStart.open(config, log)
    return warm, Trainer(warm.config, log, warm)


def saved_moments(config: TrainConfig) -> Moments:
    """Of the last checkpoint of a run."""
    newest = latest_checkpoint(Path(config.run_dir) / "checkpoints")
    assert newest is not None
    tensors, body = load_checkpoint(newest)
    state = unpack_state(body["run"], tensors)
    return moments_of(state["optimizer"]) | moments_of(state["table_optimizer"])


def kept_ids(base: VistaModel) -> Any:
    """All item ids of a model."""
    return base.items.ids(np.arange(len(base.items)))
