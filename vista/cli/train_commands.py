"""The commands `vista train` and `vista evaluate`."""

from __future__ import annotations

from vista.config import TrainConfig
from vista.device import keep_freed_memory
from vista.evaluation.evaluate import evaluate
from vista.log.event_log import EventLog
from vista.training.trainer import train_model

__all__ = ["evaluate", "train"]


def train(config: TrainConfig) -> None:
    """Train a model on the log at `config.data.path`. Raises what `train_model` raises."""
    keep_freed_memory()
    train_model(config, EventLog.open(config.data.path))
