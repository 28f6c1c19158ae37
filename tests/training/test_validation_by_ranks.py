"""Validation that is divided among ranks: the metrics of one process."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import Served, small_config
from tests.thread_ranks import on_ranks
from vista.config.choices import Architecture, Split
from vista.log.event_log import EventLog
from vista.ranks import Ranks
from vista.training.trainer import Trainer
from vista.training.validation import Validation


def assert_ranks_measure_the_same(made: Trainer) -> None:
    model = made.model.eval()

    def measured(ranks: Ranks | None) -> dict[str, float]:
        return Validation(made.log, model.rows_of(made.log.items), made.config, ranks)(model)

    expected = measured(None)
    assert expected
    for num_ranks in (2, 13):
        for found in on_ranks(num_ranks, measured):
            assert found.keys() == expected.keys()
            for name, value in found.items():
                # Other batches round otherwise, which may swap two scores that are almost equal.
                rel = 1e-2 if "auc" in name else 1e-5
                assert value == pytest.approx(expected[name], rel=rel, nan_ok=True), name


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
