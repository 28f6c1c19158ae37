"""An evaluation from a store, in one call."""

from pathlib import Path
from typing import Any

from vista.config import EvaluateConfig
from vista.evaluation.evaluate import evaluate_scorer
from vista.evaluation.evaluation_report import EvaluationReport
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.scorer import Scorer


def evaluated(model: VistaModel | Path, store: Path, log: EventLog, **settings: Any) -> EvaluationReport:
    """The report of `evaluate_scorer` with these settings of EvaluateConfig."""
    with Scorer.open(model, store) as scorer:
        return evaluate_scorer(scorer, log, EvaluateConfig(**settings))
