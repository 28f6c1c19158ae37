"""The commands `vista train`, `vista evaluate`, and `vista compare`."""

from __future__ import annotations

from vista.config import CompareConfig, EvaluateConfig, TrainConfig
from vista.device import keep_freed_memory
from vista.evaluation.compare import compare
from vista.evaluation.comparison import Comparison
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


def run_compare(config: CompareConfig) -> Comparison:
    """`vista compare`; errors as of `compare`."""
    return compare(config)
