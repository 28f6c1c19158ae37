"""The commands `vista train` and `vista evaluate`."""

from __future__ import annotations

from vista.config import EvaluateConfig, TrainConfig
from vista.device import keep_freed_memory
from vista.evaluation.evaluate import evaluate
from vista.evaluation.evaluation_report import EvaluationReport
from vista.log.event_log import EventLog
from vista.training.trainer import train_model


def run_train(config: TrainConfig) -> None:
    """`vista train`; errors as of `train_model`."""
    keep_freed_memory()
    train_model(config, EventLog.open(config.data.path))


def run_evaluate(config: EvaluateConfig) -> EvaluationReport:
    """`vista evaluate`; errors as of `evaluate`."""
    return evaluate(config)
