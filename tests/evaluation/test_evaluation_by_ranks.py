"""An evaluation that is divided among ranks: the report of one process."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from tests.conftest import Served, small_config
from tests.thread_ranks import on_ranks
from vista.config import EvaluateConfig, PrepareConfig, SourceConfig
from vista.config.checks import Architecture, AskedBaselines, Target
from vista.evaluation.evaluate import EvaluationReport, evaluate_model, evaluate_scorer
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.model.baselines.history_model import HistoryModel
from vista.ranks import ALONE, Ranks
from vista.scorer import Scorer
from vista.training.trainer import Trainer


@pytest.fixture(scope="module")
def tie_free_log(impression_log: EventLog, tmp_path_factory: pytest.TempPathFactory) -> EventLog:
    """`impression_log`, in which no request shows an item twice: rounding may order two equal scores."""
    folder = tmp_path_factory.mktemp("tie-free-log")
    shutil.copytree(impression_log.path.parent / "source", folder / "source")
    shown = folder / "source" / "impressions.parquet"
    request_item = ["user", "timestamp", "item"]
    pl.read_parquet(shown).unique(request_item, keep="first", maintain_order=True).write_parquet(shown)
    source = SourceConfig(kind="simulated", paths=[str(folder / "source")])
    prepare(PrepareConfig(out=str(folder / "log"), events=source))
    log = EventLog.open(folder / "log")
    assert log.items.digest() == impression_log.items.digest()
    return log


def assert_same_metrics(found: dict[str, float], expected: dict[str, float]) -> None:
    assert found.keys() == expected.keys() and expected
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


def assert_same_report(found: EvaluationReport, expected: EvaluationReport) -> None:
    assert_same_metrics(found.metrics, expected.metrics)
    if expected.probabilities is not None:
        assert found.probabilities is not None
        np.testing.assert_allclose(found.probabilities, expected.probabilities, rtol=1e-5)
    assert found.num_cases == expected.num_cases
    assert found.per_user is not None and expected.per_user is not None
    assert np.array_equal(found.per_user.users, expected.per_user.users)
    for name, values in expected.per_user.values.items():
        np.testing.assert_allclose(found.per_user.values[name], values, rtol=1e-5)


@pytest.mark.parametrize("num_ranks", [30])
def test_next_items_popularity_and_impressions(served_tasks: Served, tie_free_log: EventLog, num_ranks: int) -> None:
    """Of 30 ranks, most have no user to rank items for."""
    config = EvaluateConfig(top_k=[5, 10], popularity=True, baselines=AskedBaselines.counting)

    def measured(ranks: Ranks) -> EvaluationReport:
        with Scorer.open(served_tasks.model_dir, served_tasks.test_store) as scorer:
            return evaluate_scorer(scorer, tie_free_log, config, ranks)

    expected = measured(ALONE)
    leading, *others = on_ranks(num_ranks, measured)
    assert_same_report(leading, expected)
    assert leading.baselines is not None
    own = {name: value for name, value in expected.metrics.items() if name in others[0].metrics}
    for found in others:
        assert_same_metrics(found.metrics, own)
        assert found.baselines is None


def test_windows(served: Served) -> None:
    config = EvaluateConfig(target=Target.window, horizon_events=[1, 2], min_seen=2, min_after=1, top_k=[5])

    def measured(ranks: Ranks) -> EvaluationReport:
        with Scorer.open(served.model_dir, served.test_store) as scorer:
            return evaluate_scorer(scorer, served.log, config, ranks)

    expected = measured(ALONE)
    for num_ranks in (3, 20):
        for found in on_ranks(num_ranks, measured):
            assert_same_report(found, expected)


def test_baselines_of_raw_histories(served_tasks: Served, tie_free_log: EventLog, tmp_path: Path) -> None:
    changes = {"model__architecture": Architecture.sasrec, "model__history_limit": 9}
    data = served_tasks.config.data
    changes |= {f"data__{name}": getattr(data, name) for name in ("split", "validation_from", "test_from")}
    model = Trainer(small_config(tie_free_log, tmp_path / "run", **changes), tie_free_log).model.eval()
    assert isinstance(model, HistoryModel)
    config = EvaluateConfig(top_k=[5])
    expected = evaluate_model(model, tie_free_log, config)
    for found in on_ranks(3, lambda ranks: evaluate_model(model, tie_free_log, config, ranks)):
        assert_same_report(found, expected)
