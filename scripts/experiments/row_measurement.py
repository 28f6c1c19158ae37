"""Measuring a run of a table: train or count, refresh a store per codec, evaluate through the scorer."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scripts.experiments.row_origin import RowOrigin, train_noted
from scripts.experiments.row_progress import RowProgress
from scripts.experiments.serving_cost import history_model_latency_ms, scorer_latency_ms, training_speed
from scripts.experiments.sets import prepare_set, set_folder, source_folder
from scripts.experiments.table_run import TableRun, recorded_config, train_config
from scripts.experiments.tables import TABLES
from vista.config import EvaluateConfig, PrepareConfig, SimulateConfig, SourceConfig, TrainConfig
from vista.config.choices import Stage
from vista.evaluation.baselines.evaluate_baseline import evaluate_baseline
from vista.evaluation.baselines.popularity import Popularity
from vista.evaluation.baselines.transitions import Transitions
from vista.evaluation.cases import impression_cases
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.evaluation.protocol import impression_metrics
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import split_until
from vista.log.until import parse_time
from vista.model.baselines.history_model import HistoryModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.simulation.simulate import simulate
from vista.store.layout import CURRENT

TOP_K = [10, 50, 200]


@dataclass(frozen=True, slots=True)
class RowMeasurement:
    """One line of a row: how the model was served, and its metrics."""

    name: str
    metrics: dict[str, float]
    origin: RowOrigin


def measure(
    settings: argparse.Namespace, run: TableRun, log: EventLog, progress: RowProgress
) -> Iterator[RowMeasurement]:
    """Measure the missing lines of a run."""
    folder, config = _placed(settings, run.name, run.seed, log)
    if run.row.untrained == "oracle":
        yield RowMeasurement(run.name, _oracle_metrics(log, config), RowOrigin(0.0))
    elif run.row.untrained:
        baseline = Popularity() if run.row.untrained == "popularity" else Transitions()
        evaluation = evaluate_baseline(baseline, log, config.data, top_k=TOP_K)
        yield RowMeasurement(run.name, evaluation.metrics, RowOrigin(evaluation.seconds))
    else:
        if run.row.base:
            config = _downstream_config(settings, run, config, log)
            progress.check()
        model = train_noted(config, log, folder)
        trained = RowOrigin.read(folder)
        if isinstance(model, HistoryModel):
            progress.check()
            table = TABLES[settings.table]
            asked = EvaluateConfig(top_k=TOP_K, popularity=table.popularity, progress=False)
            metrics = evaluate_model(model, log, asked).metrics
            if table.costs:
                metrics |= {
                    "train events/s": training_speed(folder / "run" / "metrics.jsonl"),
                    "request ms": history_model_latency_ms(model, log),
                }
            yield RowMeasurement(run.name, metrics, trained)
            return
        assert isinstance(model, VistaModel)
        for served, metrics in _served_metrics(settings, run, log, model, folder, progress):
            yield RowMeasurement(served, metrics, trained)


def _placed(settings: argparse.Namespace, name: str, seed: int, log: EventLog) -> tuple[Path, TrainConfig]:
    """Folder of a row and seed, and the configuration of its training there."""
    table = TABLES[settings.table]
    row = table.rows[name]
    # Named by the configuration instead of table and row, so that equal configurations share a run.
    folder = settings.work / table.data / f"{_digest(recorded_config(table, row))}-{seed}"
    config = replace(
        train_config(table, row), run_dir=str(folder / "run"), seed=seed, num_threads=settings.threads, progress=False
    )
    config.data.path = str(log.path)
    if config.data.item_categories is not None:
        config.data.item_categories = str(source_folder(log.path) / config.data.item_categories)
    return folder, config


def _downstream_config(settings: argparse.Namespace, run: TableRun, config: TrainConfig, log: EventLog) -> TrainConfig:
    """The configuration on top of the base; trains the base and refreshes its store if they are missing."""
    folder, base = _placed(settings, run.row.base, run.seed, log)
    model, store = train_noted(base, log, folder), folder / f"until-{run.row.until}"
    assert isinstance(model, VistaModel)
    if not (store / CURRENT).exists():  # another generation would make it another run
        refresh(model, log, store, until=run.row.until)
    return replace(config, stage=Stage.downstream, base=str(folder / "run" / "best"), store=str(store))


def _served_metrics(
    settings: argparse.Namespace, run: TableRun, log: EventLog, model: VistaModel, folder: Path, progress: RowProgress
) -> Iterator[tuple[str, dict[str, float]]]:
    """Test metrics of a trained model through the scorer, from a store of each codec."""
    table, optim = TABLES[settings.table], run.config["optim"]
    served = {name: how for name, how in run.row.served(run.name).items() if name in run.missing}
    refreshed: dict[Path, float] = {}
    for name, how in served.items():
        progress.check()
        store = folder / (f"{how.codec.value}-{how.staleness}" if how.staleness else how.codec.value)
        until = split_until(model.data, "test")
        if how.staleness:
            until = replace(until, held_out=until.held_out + how.staleness)
        if store not in refreshed:
            report = refresh(model, log, store, until=until, options=RefreshOptions(codec=how.codec))
            refreshed[store] = report.seconds / max(report.num_users - report.resumed_at, 1)
            progress.check()
        shown = model if how.tail_len is None else model.with_tail(how.tail_len)
        with Scorer.open(shown, store) as scorer:
            asked = EvaluateConfig(
                top_k=TOP_K,
                popularity=table.popularity,
                # Recall reads the decoder, which its own loss trains.
                recall=table.recall and model.summarizer is not None and optim["reconstruction_weight"] > 0,
                staleness=how.staleness,
                progress=False,
            )
            metrics = evaluate_scorer(scorer, log, asked).metrics
            if table.costs:
                metrics |= {
                    "train events/s": training_speed(folder / "run" / "metrics.jsonl"),
                    "refresh ms/user": 1e3 * refreshed[store],
                }
                if not how.staleness:  # the timed requests do not bring their own tail
                    metrics["request ms"] = scorer_latency_ms(scorer, log)
            yield name, metrics


def _oracle_metrics(log: EventLog, config: TrainConfig) -> dict[str, float]:
    """The best possible metrics: those of the simulation's true probabilities."""
    assert config.data.test_from is not None
    cases = impression_cases(log, parse_time(config.data.test_from), None)
    assert cases.probability is not None
    return impression_metrics(cases, cases.probability)


def table_log(settings: argparse.Namespace) -> EventLog:
    """The table's EventLog, which is created if missing."""
    table = TABLES[settings.table]
    # Simulations of different sizes may share a name but not a log.
    name = table.data if table.simulation is None else f"{table.data}-{_digest(table.simulation)}"
    path = settings.work / "logs" / name
    if not path.exists():
        if table.simulation is None:
            prepare_set(table.data, set_folder(table.data, settings.data), path)
        else:
            source = source_folder(path)
            simulate(SimulateConfig(out=str(source), **table.simulation))
            events = SourceConfig(kind="simulated", paths=[str(source)])
            prepare(PrepareConfig(out=str(path), events=events, progress=False))
    return EventLog.open(path)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
