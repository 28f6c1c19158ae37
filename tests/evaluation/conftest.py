"""An evaluation from a store in one call, and a model of a log without times."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served, small_config
from vista.config import EvaluateConfig
from vista.evaluation.evaluate import EvaluationReport, evaluate_scorer
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import Trainer


def evaluated(model: VistaModel | Path, store: Path, log: EventLog, **settings: Any) -> EvaluationReport:
    """The report of `evaluate_scorer` with these settings of EvaluateConfig."""
    with Scorer.open(model, store) as scorer:
        return evaluate_scorer(scorer, log, EvaluateConfig(**settings))


@pytest.fixture(scope="package")
def served_order(order_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """An untrained model of a log without times and with string ids; its stores are one, for the test labels."""
    folder = tmp_path_factory.mktemp("served-order")
    config = small_config(order_log, folder / "run")
    model = Trainer(config, order_log).model.eval()
    assert isinstance(model, VistaModel)
    model.save_pretrained(folder / "run" / "best")
    refresh(model, order_log, folder / "store", until="leave-last-out")
    return Served(order_log, config, model, folder / "run" / "best", *[folder / "store"] * 3)
