"""Reproduce a table of docs/results, or some of its rows: train, refresh a store, evaluate through the scorer.

A baseline has no store; it is evaluated on the raw history up to each label.

    python -m scripts.experiments.reproduce ml-1m --list
    python -m scripts.experiments.reproduce ml-1m --data path/to/ml-1m --seeds 1 2 3
    python -m scripts.experiments.reproduce simulation --rows vista tail-only --minutes 30

Every model and seed adds lines to docs/results/<table>.jsonl; at the end docs/results/<table>.md is written from it.
Lines that exist with the same configuration are not run again, and a stopped run resumes. The exit status is 0 if all
lines exist, 1 after an error, and 130 after the time limit or Ctrl-C. scripts/experiments/tables defines the tables.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.experiments.results import (
    append_result,
    markdown_table,
    read_results,
)
from scripts.experiments.row_origin import RowOrigin, train_noted
from scripts.experiments.row_progress import RowProgress
from scripts.experiments.serving_cost import history_model_latency_ms, scorer_latency_ms, training_speed
from scripts.experiments.sets import prepare_set, set_folder, source_folder
from scripts.experiments.table_run import TableRun, command_of, listing, recorded_config, table_runs, train_config
from scripts.experiments.tables import TABLES
from vista.config import EvaluateConfig, PrepareConfig, SimulateConfig, SourceConfig, TrainConfig
from vista.config.choices import Stage
from vista.device import cpu_settings, keep_freed_memory
from vista.errors import VistaError
from vista.evaluation.cases import impression_cases
from vista.evaluation.counting_baselines import CountingBaseline, evaluate_counting_baseline
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.evaluation.protocol import impression_metrics
from vista.files import replace_text, writable_folder
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


def main(
    arguments: Sequence[str] | None = None,
    progress_of: Callable[[Sequence[float], float | None], RowProgress] = RowProgress,
) -> int:
    """Run or list the missing lines of a table; returns the exit status.

    Args:
        arguments: words of the command line; None for this process's own.
        progress_of: makes the progress bar from the estimates and the limit in seconds.
    """
    settings = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # --minutes interrupts as Ctrl-C does, but a shell makes background jobs ignore that signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = Path(settings.results) / f"{settings.table}.jsonl"
    keep_freed_memory()
    try:
        with cpu_settings(settings.threads):
            runs = table_runs(settings, read_results(results) if results.exists() else [])
            if settings.list:
                print(listing(settings, runs))
                return 0
            writable_folder(settings.results, "--results")
            try:
                return _run_all(settings, [run for run in runs if run.missing], results, progress_of)
            finally:
                if results.exists():
                    replace_text(results.with_suffix(".md"), markdown_table(read_results(results)))
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="rows of the table; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data", type=Path, help="folder of the data set; default: $VISTA_DATA_DIR/<set>")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder for logs, runs and stores")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the result files")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: torch's default")
    parser.add_argument("--minutes", type=_minutes, help="stop after this time, as Ctrl-C does; rerun to resume")
    parser.add_argument("--list", action="store_true", help="list finished and missing lines and the estimated time")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number of minutes, got {text}")
    return minutes


def _run_all(
    settings: argparse.Namespace,
    runs: Sequence[TableRun],
    results: Path,
    progress_of: Callable[[Sequence[float], float | None], RowProgress],
) -> int:
    if not runs:
        print(f"{settings.table}: all runs are done")
        return 0
    limit_s = None if settings.minutes is None else 60 * settings.minutes
    try:
        with logging_redirect_tqdm(), progress_of([run.estimate_s for run in runs], limit_s) as progress:
            log = _log(settings)
            for run in runs:
                with progress.run(run.label):
                    for served, metrics, trained in _measure(settings, run, log, progress):
                        if TABLES[settings.table].validation:
                            kept = {f"validation {name}": value for name, value in trained.validation.items()}
                            metrics = kept | metrics
                        append_result(results, _line(settings, run, served, metrics, trained))
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped; rerun the command to resume")
        return 130
    return 0


def _measure(
    settings: argparse.Namespace, run: TableRun, log: EventLog, progress: RowProgress
) -> Iterator[tuple[str, dict[str, float], RowOrigin]]:
    """Measure the missing lines of a run: (name of the line, test metrics, origin of the model)."""
    folder, config = _placed(settings, run.name, run.seed, log)
    if run.row.untrained == "oracle":
        yield run.name, _oracle_metrics(log, config), RowOrigin(0.0)
    elif run.row.untrained:
        evaluation = evaluate_counting_baseline(CountingBaseline(run.row.untrained), log, config.data, top_k=TOP_K)
        yield run.name, evaluation.metrics, RowOrigin(evaluation.seconds)
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
            yield run.name, metrics, trained
            return
        assert isinstance(model, VistaModel)
        for served, metrics in _served_metrics(settings, run, log, model, folder, progress):
            yield served, metrics, trained


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


def _line(
    settings: argparse.Namespace, run: TableRun, served: str, metrics: Mapping[str, float], trained: RowOrigin
) -> dict[str, Any]:
    return {
        "table": settings.table,
        "data": TABLES[settings.table].data,
        "model": served,
        "seed": run.seed,
        "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        "command": command_of(settings, run, [run.seed]),
        "config": run.config,
        **trained.fields(),
    }


def _log(settings: argparse.Namespace) -> EventLog:
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


if __name__ == "__main__":
    sys.exit(main())
