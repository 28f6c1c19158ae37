"""Position bias is corrected in training, and serving asks for no position."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import small_config
from tests.examples.test_batch_source import listed_log
from vista.config.checks import Split
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.training.trainer import train


@pytest.mark.parametrize("column", ["propensity", "position"])
def test_a_corrected_model_predicts_clicks_of_items_that_are_looked_at(tmp_path: Path, column: str) -> None:
    """Of the items that are looked at, 80% are clicked; users look at 1, 1/2, and 1/4 of the three places of a list."""
    log, means = listed_log(tmp_path, column), {}
    times = {"data__validation_from": "1970-01-01T00:12:00", "data__test_from": "1970-01-01T00:14:00"}
    for name, tasks in (("naive", []), ("corrected", ["click"])):
        config = small_config(
            log,
            tmp_path / name,
            data__split=Split.time,
            optim__examined_tasks=tasks,
            optim__epochs=4,
            optim__next_weight=0.0,
            optim__learning_rate=2e-2,
            **times,
        )
        train(config, log)
        model = VistaModel.from_pretrained(tmp_path / name / "best")
        assert model.schema.request_features == [], "no model reads a position"
        refresh(model, log, tmp_path / name / "store")
        users = log.users.ids(np.arange(log.num_users))
        with Scorer.open(model, tmp_path / name / "store") as scorer:
            predicted = scorer.predict(users, log.items.ids(np.arange(log.num_items)), now=None)
            with pytest.raises(ValueError, match="reads no features of requests"):
                scorer.predict(users, [1], request={column: 1.0})
        means[name] = {task: float(values.mean()) for task, values in predicted.items()}
    assert means["naive"]["click"] == pytest.approx(0.8 * 1.75 / 3, abs=0.08)
    assert means["corrected"]["click"] == pytest.approx(0.8, abs=0.1)
    assert means["corrected"]["buy"] == pytest.approx(0.5, abs=0.1)
