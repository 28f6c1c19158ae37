"""Rerun a table of docs/results, or some of its rows: train, refresh a store, evaluate through the scorer.

A baseline has no store: it is evaluated from the raw history, right up to each label.

    python -m scripts.experiments.reproduce ml-1m --list
    python -m scripts.experiments.reproduce ml-1m --data path/to/ml-1m --seeds 1 2 3
    python -m scripts.experiments.reproduce simulation --rows vista tail-only --minutes 30

Every model and seed adds lines to docs/results/<table>.jsonl, from which docs/results/<table>.md is written at the end.
What is there, from the same configuration, is not run again; a run that was stopped goes on where it stopped. The
exit status is 0 if all is there, 1 after an error, and 130 if the time or the user's patience ran out before.
What the tables hold: scripts/experiments/tables.py.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import math
import shlex
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm.contrib.logging import logging_redirect_tqdm

from scripts.benchmarks.workloads import movielens_folder
from scripts.experiments.results import (
    append_result,
    changed_settings,
    hardware,
    markdown_table,
    read_results,
)
from scripts.experiments.row_origin import MACHINE, Trained, train_noted
from scripts.experiments.row_progress import RowProgress
from scripts.experiments.serving_cost import history_model_latency_ms, scorer_latency_ms, training_speed
from scripts.experiments.tables import TABLES, Row, Table
from vista.config import EvaluateConfig, PrepareConfig, SimulateConfig, SourceConfig, TrainConfig
from vista.config.choices import Architecture, Stage
from vista.config.composition import compose_config
from vista.config.conversion import to_dict
from vista.device import cpu_settings, keep_freed_memory
from vista.errors import ConfigError, VistaError
from vista.evaluation.cases import impression_cases
from vista.evaluation.counting_baselines import CountingBaseline, evaluate_counting_baseline
from vista.evaluation.evaluate import evaluate_model, evaluate_scorer
from vista.evaluation.protocol import impression_metrics
from vista.files import replace_text, writable_folder
from vista.log.event_log import EventLog
from vista.log.ingest.prepare import prepare
from vista.log.splits import parse_time, split_until
from vista.model.baselines.history_model import HistoryModel
from vista.model.vista_model import VistaModel
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.simulation.simulate import simulate
from vista.store.layout import CURRENT

TOP_K = [10, 50, 200]
UNTRAINED_SEED = 0
SPLIT = ("split", "validation_from", "test_from", "exclude_seen")
"""What of a configuration the untrained rows depend on."""
Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """One model and seed of a table: its lines that are still to be made."""

    name: str
    row: Row
    seed: int
    config: dict[str, Any]
    """As lines record it: what must be the same for a line to count as done."""
    missing: tuple[str, ...]
    changed: tuple[str, ...]
    """Why lines that are there do not count: "optim.epochs (12 -> 20)"."""
    estimate_s: float

    @property
    def label(self) -> str:
        return self.name if self.row.untrained else f"{self.name}, seed {self.seed}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, or list, what a table still lacks; returns the exit status."""
    settings = _arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    # --minutes interrupts as Ctrl-C does, which a shell has switched off for what it started with `&`.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    results = Path(settings.results) / f"{settings.table}.jsonl"
    keep_freed_memory()
    try:
        with cpu_settings(settings.threads):
            runs = _runs(settings, read_results(results) if results.exists() else [])
            if settings.list:
                print(_listing(settings, runs))
                return 0
            writable_folder(settings.results, "--results")
            try:
                return _run_all(settings, [run for run in runs if run.missing], results)
            finally:
                if results.exists():
                    replace_text(results.with_suffix(".md"), markdown_table(read_results(results)))
    except VistaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=sorted(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="models of the table; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--data", type=Path, help="folder of the MovieLens set; default: $VISTA_DATA_DIR/<set>")
    parser.add_argument("--work", type=Path, default=Path("runs/tables"), help="folder of logs, runs and stores")
    parser.add_argument("--results", type=Path, default=Path("docs/results"), help="folder of the tables")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--minutes", type=_minutes, help="stop after this time, as Ctrl-C does; the next call goes on")
    parser.add_argument("--list", action="store_true", help="say what is done and how long the rest will take")
    return parser.parse_args(arguments)


def _minutes(text: str) -> float:
    minutes = float(text)
    if not 0 < minutes < math.inf:
        raise argparse.ArgumentTypeError(f"needs a positive number of minutes, got {text}")
    return minutes


# What is to be done -------------------------------------------------------------------------------------------------


def _runs(settings: argparse.Namespace, lines: Sequence[Line]) -> list[Run]:
    """Runs of the chosen rows and seeds, done ones too: all models of a seed, then the next seed."""
    table = TABLES[settings.table]
    names = list(dict.fromkeys(settings.rows or table.rows))
    unknown = [name for name in names if name not in table.rows]
    if unknown:
        raise ConfigError(
            f"--rows {unknown[0]}: {settings.table} has no such row; take some of {', '.join(table.rows)}"
        )
    newest = {(line["model"], line["seed"]): line for line in lines}
    machine, runs = hardware(), []
    for asked in dict.fromkeys(settings.seeds):
        for name in names:
            row = table.rows[name]
            if row.untrained and asked != settings.seeds[0]:
                continue
            seed = UNTRAINED_SEED if row.untrained else asked
            config = _recorded(table, row)
            missing: list[str] = []
            changed: dict[str, None] = {}
            for served in row.served(name):
                line = newest.get((served, seed))
                changes = changed_settings(line["config"], config) if line else []
                changed |= dict.fromkeys(changes)
                if changes or not line:
                    missing.append(served)
            estimate = _estimate_s(name, row, lines, machine)
            runs.append(Run(name, row, seed, config, tuple(missing), tuple(changed), estimate))
    return runs


def _train_config(table: Table, row: Row) -> TrainConfig:
    return compose_config(TrainConfig, [f"experiment={table.experiment}", *table.words, *row.words])


UNREAD_BY_BASELINES = ("target_attention", "num_target_layers")
"""Keys of ModelConfig that belong to stage 2, which baselines lack: their lines do not record them."""


def _recorded(table: Table, row: Row) -> dict[str, Any]:
    """What a line says of its configuration. Paths are the machine's, not the experiment's."""
    config = _train_config(table, row)
    values = to_dict(config)
    data = {
        key: value for key, value in values["data"].items() if key in SPLIT or (not row.untrained and key != "path")
    }
    if config.model.architecture.ranks_only or row.untrained == "truth":
        del data["exclude_seen"]  # it is about next items
    # A log of another size is another experiment.
    recorded = {"data": data} | ({} if table.simulation is None else {"simulation": table.simulation})
    if row.untrained:
        return recorded
    model = values["model"]
    if config.model.architecture is not Architecture.vista:
        model = {key: value for key, value in model.items() if key not in UNREAD_BY_BASELINES}
    recorded |= {"model": model, "optim": values["optim"]}
    if row.base:
        kept = _recorded(table, table.rows[row.base])
        flat = {f"{group}.{key}": value for group in kept for key, value in kept[group].items()}
        recorded["base"] = {"row": row.base, "until": row.until, **flat}
    return recorded


def _estimate_s(name: str, row: Row, lines: Sequence[Line], machine: Line) -> float:
    """By what the row took before, on such a machine if it can be; else the table's guess."""
    same = [line for line in lines if line["model"] in row.served(name)]
    here = [line for line in same if all(line["hardware"].get(key) == machine[key] for key in MACHINE)]
    return fmean(line["seconds"] for line in here or same) if same else 60 * row.minutes


def _listing(settings: argparse.Namespace, runs: Sequence[Run]) -> str:
    pending = [run for run in runs if run.missing]
    left = sum(run.estimate_s for run in pending) / 60
    lines = [f"{settings.table}: {len(runs) - len(pending)} of {len(runs)} runs done, about {left:.0f} minutes left"]
    for name in dict.fromkeys(run.name for run in runs):
        own = [run for run in runs if run.name == name]
        seeds = " ".join(str(run.seed) for run in own if run.missing)
        state = "done" if not seeds else "to run" if own[0].row.untrained else f"to run with seed {seeds}"
        lines.append(f"\n{name}: {state}; {own[0].estimate_s / 60:.1f} minutes a run")
        changed = dict.fromkeys(change for run in own for change in run.changed)
        lines += [f"  was done with another {', '.join(changed)}"] if changed else []
        lines.append(f"  {_command(settings, own[0], [run.seed for run in own])}")
    return "\n".join(lines)


def _command(settings: argparse.Namespace, run: Run, seeds: Sequence[int]) -> str:
    table = TABLES[settings.table]
    words = ["python", "-m", "scripts.experiments.reproduce", settings.table, "--rows", run.name]
    words += [] if table.simulation is not None else ["--data", table.data]
    words += [] if run.row.untrained else ["--seeds", *map(str, seeds)]
    words += ["--threads", str(settings.threads)] if settings.threads else []
    return shlex.join(words)


# Running ------------------------------------------------------------------------------------------------------------


def _run_all(settings: argparse.Namespace, runs: Sequence[Run], results: Path) -> int:
    if not runs:
        print(f"{settings.table}: all runs are done")
        return 0
    limit_s = None if settings.minutes is None else 60 * settings.minutes
    try:
        with logging_redirect_tqdm(), RowProgress([run.estimate_s for run in runs], limit_s) as progress:
            log = _log(settings)
            for run in runs:
                with progress.run(run.label):
                    for served, metrics, trained in _measure(settings, run, log, progress):
                        if TABLES[settings.table].validation:
                            kept = {f"validation {name}": value for name, value in trained.validation.items()}
                            metrics = kept | metrics
                        append_result(results, _line(settings, run, served, metrics, trained))
    except KeyboardInterrupt as interrupt:
        print(str(interrupt) or "stopped; the same command resumes it")
        return 130
    return 0


def _measure(
    settings: argparse.Namespace, run: Run, log: EventLog, progress: RowProgress
) -> Iterator[tuple[str, dict[str, float], Trained]]:
    """(name of the line, test metrics, how it was trained) of what a run lacks."""
    folder, config = _placed(settings, run.name, run.seed, log)
    if run.row.untrained == "truth":
        yield run.name, _truth(log, config), Trained(0.0)
    elif run.row.untrained:
        found = evaluate_counting_baseline(CountingBaseline(run.row.untrained), log, config.data, top_k=TOP_K)
        yield run.name, found.metrics, Trained(found.seconds)
    else:
        if run.row.base:
            config = _downstream_config(settings, run, config, log)
            progress.check()
        model = train_noted(config, log, folder)
        trained = Trained.read(folder)
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
    """Folder of a row and seed, and how it is trained there."""
    table = TABLES[settings.table]
    row = table.rows[name]
    # Not by the names of table and row: equal configurations are one run.
    folder = settings.work / table.data / f"{_digest(_recorded(table, row))}-{seed}"
    config = replace(
        _train_config(table, row), run_dir=str(folder / "run"), seed=seed, num_threads=settings.threads, progress=False
    )
    config.data.path = str(log.path)
    if config.data.item_categories is not None:  # a file of the simulation
        config.data.item_categories = str(_source(log.path) / config.data.item_categories)
    return folder, config


def _downstream_config(settings: argparse.Namespace, run: Run, config: TrainConfig, log: EventLog) -> TrainConfig:
    """The same over its base, which is trained, and its store, which is refreshed, where they are not there yet."""
    folder, base = _placed(settings, run.row.base, run.seed, log)
    model, store = train_noted(base, log, folder), folder / f"until-{run.row.until}"
    assert isinstance(model, VistaModel)
    if not (store / CURRENT).exists():  # another generation would be another run
        refresh(model, log, store, until=run.row.until)
    return replace(config, stage=Stage.downstream, base=str(folder / "run" / "best"), store=str(store))


def _served_metrics(
    settings: argparse.Namespace, run: Run, log: EventLog, model: VistaModel, folder: Path, progress: RowProgress
) -> Iterator[tuple[str, dict[str, float]]]:
    """Test metrics of a trained model as it is served: from a store of each codec, through the scorer."""
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
            report = refresh(model, log, store, until=until, codec=how.codec)
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
                if not how.staleness:  # a request that brings its own tail costs more than the ones that are timed
                    metrics["request ms"] = scorer_latency_ms(scorer, log)
            yield name, metrics


def _truth(log: EventLog, config: TrainConfig) -> dict[str, float]:
    """The best possible figures: the simulation's own probabilities."""
    assert config.data.test_from is not None
    cases = impression_cases(log, parse_time(config.data.test_from), None)
    assert cases.probability is not None
    return impression_metrics(cases, cases.probability)


def _line(
    settings: argparse.Namespace, run: Run, served: str, metrics: Mapping[str, float], trained: Trained
) -> dict[str, Any]:
    return {
        "table": settings.table,
        "data": TABLES[settings.table].data,
        "model": served,
        "seed": run.seed,
        "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        "command": _command(settings, run, [run.seed]),
        "config": run.config,
        **trained.fields(),
    }


def _log(settings: argparse.Namespace) -> EventLog:
    """The table's EventLog; made if it is not there."""
    table = TABLES[settings.table]
    # A simulation of another size under the same name is another log.
    name = table.data if table.simulation is None else f"{table.data}-{_digest(table.simulation)}"
    path = settings.work / "logs" / name
    if not path.exists():
        if table.simulation is not None:
            source, kind = _source(path), "simulated"
            simulate(SimulateConfig(out=str(source), **table.simulation))
        else:
            source, kind = movielens_folder(settings.data, table.data), "auto"
        prepare(PrepareConfig(out=str(path), events=SourceConfig(kind=kind, paths=[str(source)]), progress=False))
    return EventLog.open(path)


def _source(log: Path) -> Path:
    """Folder of the simulation that a log was made of."""
    return log.with_name(f"{log.name}-source")


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]


if __name__ == "__main__":
    sys.exit(main())
