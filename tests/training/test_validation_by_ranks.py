"""Validation that is divided among ranks: the metrics of one process."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Served, small_config
from vista.config.choices import Architecture, Split
from vista.log.event_log import EventLog
from vista.model.ranking_model import RankingModel
from vista.training.trainer import Trainer
from vista.training.validation import Validation


class ThreadRank:
    """A rank that is a thread of this process."""

    def __init__(self, rank: int, values: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._values, self._barrier = rank, len(values), values, barrier

    def gather(self, value: Any) -> list[Any]:
        self._values[self.rank] = value
        self._barrier.wait(timeout=60)
        values = list(self._values)
        self._barrier.wait(timeout=60)
        return values


def measured_by_ranks(made: Trainer, model: RankingModel, num_ranks: int) -> list[dict[str, float]]:
    """The metrics that each of some ranks gets."""
    values, barrier = [None] * num_ranks, threading.Barrier(num_ranks)

    def measure(rank: int) -> dict[str, float]:
        ranks: Any = ThreadRank(rank, values, barrier)
        return Validation(made.log, model.rows_of(made.log.items), made.config, ranks)(model)

    with ThreadPoolExecutor(num_ranks) as threads:
        return list(threads.map(measure, range(num_ranks)))


def assert_ranks_measure_the_same(made: Trainer) -> None:
    model = made.model.eval()
    expected = Validation(made.log, model.rows_of(made.log.items), made.config)(model)
    assert expected
    for num_ranks in (2, 13):
        for found in measured_by_ranks(made, model, num_ranks):
            assert found == pytest.approx(expected, rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("architecture", [Architecture.vista, Architecture.sasrec])
@pytest.mark.parametrize("users", [0, 3])
def test_next_items(event_log: EventLog, tmp_path: Path, architecture: Architecture, users: int) -> None:
    """With three users, some ranks have none."""
    limit = 0 if architecture is Architecture.vista else 9
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__validation_users": users}
    assert_ranks_measure_the_same(Trainer(small_config(event_log, tmp_path / "run", **changes), event_log))


def test_windows(event_log: EventLog, tmp_path: Path) -> None:
    changes = {"model__counters": True, "data__split": Split.share, "data__test_share": 0.3}
    weights = {"optim__window_weight": 1.0, "optim__next_weight": 0.0, "data__validation_share": 0.3}
    config = small_config(event_log, tmp_path / "run", **changes, **weights)
    assert_ranks_measure_the_same(Trainer(config, event_log))


@pytest.mark.parametrize("architecture", [Architecture.vista, Architecture.din])
@pytest.mark.parametrize("users", [0, 3])
def test_impressions(served_tasks: Served, tmp_path: Path, architecture: Architecture, users: int) -> None:
    """Three users mean twelve impressions, fewer than ranks."""
    limit, config = 0 if architecture is Architecture.vista else 9, served_tasks.config
    changes = {"model__architecture": architecture, "model__history_limit": limit, "optim__validation_users": users}
    changes |= {f"data__{name}": getattr(config.data, name) for name in ("split", "validation_from", "test_from")}
    made = Trainer(small_config(served_tasks.log, tmp_path / "run", **changes), served_tasks.log)
    if architecture is Architecture.vista:
        made.model = served_tasks.model  # because an untrained one predicts ties, up to rounding
    assert_ranks_measure_the_same(made)
