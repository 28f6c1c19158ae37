"""Measuring a run of a table: train or count, refresh a store per codec, evaluate through the scorer.

The files of a row lie in its folder (`row_folder`). In a table with `windows`, each part of the split has its own
model, whose run and stores lie in a subfolder with the name of the part.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from scripts.experiments.label_rows import (
    PARTS,
    answers_file,
    baseline_answers,
    baseline_metrics,
    part_cases,
    save_answers,
    stacked_answers,
    trained_answers,
)
from scripts.experiments.results import defined, newest_rows
from scripts.experiments.row_origin import RowOrigin, train_noted
from scripts.experiments.serving_cost import history_model_latency_ms, scorer_latency_ms, training_speed
from scripts.experiments.sets import prepare_set, prepare_simulation, prepare_with_texts, set_folder, source_folder
from scripts.experiments.table_run import (
    UNTRAINED_SEED,
    TableRun,
    command_of,
    part_configs,
    recorded_config,
    train_config,
)
from scripts.experiments.tables import TABLES
from scripts.experiments.tables.label_tables import SERVED, STACK
from scripts.experiments.tables.table import CLICK, Table, TableRow
from vista.arrays import Floats, Int
from vista.config import (
    DataConfig,
    EvaluateConfig,
    SimulateConfig,
    TrainConfig,
)
from vista.config.checks import Split, Target
from vista.errors import ConfigError
from vista.evaluation.baseline_evaluation import (
    asked_horizons,
    measure_by_horizon,
    trained_baselines,
)
from vista.evaluation.cases import impression_cases
from vista.evaluation.comparison import Comparison, PerUserMetrics
from vista.evaluation.counting_baselines import CountingBaseline, counting_baselines
from vista.evaluation.evaluate import EvaluationReport, evaluate_model, evaluate_scorer
from vista.evaluation.protocol import impression_metrics, measure_labels, split_windows, window_metric
from vista.examples.item_statistics import item_counts
from vista.files import make_folders
from vista.log.event_log import EventLog
from vista.log.splits import parse_time, part_counts, split_until
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.scorer import Scorer
from vista.simulation.simulate import generate, oracle_metrics
from vista.simulation.worlds import WORLDS
from vista.store.layout import CURRENT

TOP_K = [10, 50, 200]
SIMULATED = ("whole history", "last 2000", "last 200", "last 32", "pooled")
"""Predictors of `vista.simulation.simulate` that a row may name as `untrained`."""
WINDOW_METRICS = (
    *("precision@10/50-events", "precision@10:returns/50-events", "ndcg@10/50-events"),
    *("recall@50:new/200-events", "ndcg@50:new/200-events"),
)
"""Metrics of a line of a table with `windows`; the file of `per_user_file` has all."""
LABEL_METRICS = ("log_loss", "auc")
"""Metrics of the label of a table with `task`."""
COLD_METRICS = ("recall@50:cold/200-events", "ndcg@50:cold/200-events")
"""More metrics of a line of a table with `cold`."""


class PopularityAfterwards:
    """The popularity of items after the question, which nobody knows when it is asked: an upper bound.

    The same scores for all users: float64 counts of the events that are not visible.
    """

    name = "popularity afterwards"

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._counts: Floats = (item_counts(log) - item_counts(log, counts)).astype(np.float64)

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        return np.tile(self._counts, (len(user), 1))


def yambda_metrics(
    per_user: Mapping[str, Floats], log: EventLog, data: DataConfig, asked: EvaluateConfig
) -> dict[str, float]:
    """Recall and NDCG as Yambda's benchmark (github.com/homutov/yambda-benchmark) computes them.

    They are computed from the metrics per user of one window that reaches to the end of the log.

    With n events of a user in the test, repeats included, recall@k is the number of different hits over n, averaged
    over users. NDCG@k is the discounted gain of these hits over that of min(k, n) hits in front, each summed over all
    users. vista's own recall and NDCG count an item once, divide by at most k, and average per user.

    Args:
        per_user: {"precision@10/50-events": float64 [N], …} of `measure_windows`.
        data: the split.
        asked: how they were measured.

    Returns:
        {"recall@10": …, "ndcg@10": …} for each k of `asked`.
    """
    ((window, cases),) = split_windows(log, data, asked).items()
    _, first, _ = part_counts(log, data, asked.split)
    num_events, num_items = (log.lengths - first)[cases.user], np.diff(cases.offsets)
    best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(max(asked.top_k)) + 2))])
    metrics = {}
    for k in asked.top_k:
        precision, ndcg = (per_user[window_metric(f"{name}@{k}", window)] for name in ("precision", "ndcg"))
        gain = ndcg * best[np.minimum(num_items, k)]
        metrics[f"recall@{k}"] = float((precision * k / num_events).mean())
        metrics[f"ndcg@{k}"] = float(gain.sum() / best[np.minimum(num_events, k)].sum())
    return metrics


@dataclass(frozen=True, slots=True)
class _RowModel:
    """A model, and the folder with its run, origins, and stores."""

    model: RankingModel
    folder: Path


@dataclass(frozen=True, slots=True)
class RowMeasurement:
    """One line of a row: how the model was served, and its metrics."""

    name: str
    metrics: dict[str, float]
    origin: RowOrigin
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors over users, in tables with `windows` or `task`."""


def measure(settings: argparse.Namespace, run: TableRun, log: EventLog) -> Iterator[RowMeasurement]:
    """Measure the missing lines of a run."""
    table, row = TABLES[settings.table], run.row
    folder, configs = row_folder(settings, run.name, run.seed), part_configs(table, row)
    if table.task:
        yield _measured_labels(settings, run, configs["test"], log, folder)
    elif table.answers_labels(row):
        began = time.perf_counter()
        metrics = baseline_metrics(log, configs["test"].data, CLICK, row.untrained)
        yield RowMeasurement(run.name, metrics, RowOrigin(time.perf_counter() - began))
    elif row.untrained == "oracle":
        yield RowMeasurement(run.name, _oracle_metrics(log, configs["test"]), RowOrigin(0.0))
    elif row.untrained in SIMULATED:
        yield RowMeasurement(run.name, _reference_metrics(table, row.untrained), RowOrigin(0.0))
    elif row.untrained:
        reports = {}
        for part, config in configs.items():
            reports[part] = _counted(row.untrained, log, config.data, _asked(table, part))
        origin = RowOrigin(sum(report.seconds for report in reports.values()))
        yield _measurement(table, run.name, reports, {}, origin, folder)
    else:
        models = {}
        for part, config in configs.items():
            models[part] = _trained(settings, run, config, log, folder / part if table.windows else folder)
        trained = RowOrigin.read({part: one.folder for part, one in models.items()})
        if all(isinstance(one.model, VistaModel) for one in models.values()):
            yield from _served(run, log, table, models, folder, trained)
            return
        reports, costs = {}, {}
        for part, one in models.items():
            assert isinstance(one.model, HistoryModel)
            asked = _asked(table, part)
            reports[part] = _reported(table, evaluate_model(one.model, log, asked), log, one.model.data, asked)
            if table.costs:
                costs = {
                    "train events/s": training_speed(one.folder / "run" / "metrics.jsonl"),
                    "request ms": history_model_latency_ms(one.model, log),
                }
        yield _measurement(table, run.name, reports, costs, trained, folder)


def _measured_labels(
    settings: argparse.Namespace, run: TableRun, config: TrainConfig, log: EventLog, folder: Path
) -> RowMeasurement:
    """The line of a row of a table with `task`."""
    table, name = TABLES[settings.table], run.row.untrained
    began, origin = time.perf_counter(), None
    if not name:
        one = _trained(settings, run, config, log, folder)
        origin = RowOrigin.read({"test": folder})
        answered = list(trained_answers(one.model, log, folder, table.task))
    else:
        cases = part_cases(log, config.data, "test", table.task)
        if name == STACK:
            answers = stacked_answers(log, config.data, table.task, _answers_of_served(settings))
        else:
            answers = baseline_answers(log, config.data, table.task)[name]
        answered = [("test", cases, answers)]
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    for part, cases, answers in answered:
        save_answers(folder, run.name, part, answers)
        per_user = measure_labels(log, cases, answers, part)
        file = per_user_file(folder, run.name, part)
        make_folders(file.parent)
        per_user.save(file)
        prefix, own, error = "" if part == "test" else f"{part} ", per_user.means(), per_user.standard_errors()
        metrics |= {prefix + metric: own[metric] for metric in reported_metrics(table)}
        errors |= {prefix + metric: error[metric] for metric in reported_metrics(table)}
    return RowMeasurement(run.name, metrics, origin or RowOrigin(time.perf_counter() - began), errors)


def _answers_of_served(settings: argparse.Namespace) -> list[dict[str, Path]]:
    """{part: file of the answers} of the rows that the stack reads, of the first seed.

    Raises:
        ConfigError: if one of them was not measured in this work folder.
    """
    seed, found = settings.seeds[0], []
    for row in SERVED:
        folder = row_folder(settings, row, seed)
        files = {part: answers_file(folder, row, part) for part in PARTS}
        if not all(file.exists() for file in files.values()):
            raise ConfigError(f"--rows {STACK}: needs the row {row} with seed {seed} in {settings.work}; run it first")
        found.append(files)
    return found


def reported_metrics(table: Table) -> tuple[str, ...]:
    """Metrics of a line of a table with `windows` or `task`."""
    if table.task:
        return tuple(f"{metric}/{table.task}" for metric in LABEL_METRICS)
    return (*WINDOW_METRICS, *COLD_METRICS) if table.cold else WINDOW_METRICS


def per_user_file(folder: Path, line: str, part: str) -> Path:
    """Where a line of a table with `windows` or `task` keeps the metrics per user, for paired comparisons."""
    return folder / "per-user" / f"{line}, {part}.npz"


def paired_lines(settings: argparse.Namespace, lines: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """A result for each pair of rows of the table whose metrics per user exist, unless `lines` has it already.

    The metrics per user lie in the work folder, next to the models, so a difference is measured where its rows were.
    Its metrics are those of the pair's first row minus those of the second on test, averaged over seeds per user first,
    as `vista compare` shows them with the second row as `a`. Its errors are their standard errors over users.
    """
    table = TABLES[settings.table]
    title = f"{settings.table}, paired differences"
    newest = newest_rows(lines)
    for pair in table.pairs:
        seeds = _common_seeds(settings, pair, newest)
        files = {row: _files(settings, row, seeds) for row in pair}
        if not seeds or not all(file.exists() for own in files.values() for file in own):
            continue
        row, reference = ([PerUserMetrics.load(file) for file in files[name]] for name in pair)
        differences, reported = Comparison.of(reference, row).differences, reported_metrics(table)
        line = {
            "table": title,
            "data": table.data,
            "model": " − ".join(pair),
            "seed": seeds[0],
            "seeds": seeds,
            "metrics": defined({name: differences[name].difference for name in reported}),
            "errors": defined({name: differences[name].standard_error for name in reported}),
            "command": command_of(settings, pair, seeds),
            "config": {"seeds": seeds, "runs": {row: own[0].parts[-3] for row, own in files.items()}},
            **RowOrigin(0.0).fields(),
        }
        before = newest.get((title, table.data, line["model"]), [])
        if not any(all(old[key] == line[key] for key in ("metrics", "config")) for old in before):
            yield line


def _common_seeds(
    settings: argparse.Namespace,
    pair: Sequence[str],
    newest: Mapping[tuple[str, str, str], Sequence[Mapping[str, Any]]],
) -> list[int]:
    """Seeds of all trained rows of a pair."""
    table = TABLES[settings.table]
    trained = [row for row in pair if not table.rows[row].untrained]
    seeds = [{line["seed"] for line in newest.get((settings.table, table.data, row), [])} for row in trained]
    return sorted(set.intersection(*seeds)) if seeds else [UNTRAINED_SEED]


def _files(settings: argparse.Namespace, row: str, seeds: Sequence[int]) -> list[Path]:
    own = [UNTRAINED_SEED] if TABLES[settings.table].rows[row].untrained else seeds
    return [per_user_file(row_folder(settings, row, seed), row, "test") for seed in own]


def _asked(table: Table, part: str) -> EvaluateConfig:
    target = Target.window if table.windows or table.as_yambda else Target.next
    usual = {"target": target, "top_k": TOP_K, "popularity": table.popularity}
    return EvaluateConfig(**{**usual, **table.asked}, split=part)


def _reported(
    table: Table, report: EvaluationReport, log: EventLog, data: DataConfig, asked: EvaluateConfig
) -> EvaluationReport:
    """The report with the metrics that the table asks for."""
    if not table.as_yambda:
        return report
    assert report.per_user is not None
    return replace(report, metrics=yambda_metrics(report.per_user.values, log, data, asked))


def _measurement(
    table: Table,
    name: str,
    reports: Mapping[str, EvaluationReport],
    costs: Mapping[str, float],
    origin: RowOrigin,
    folder: Path,
) -> RowMeasurement:
    """The line of evaluations by part of the split. In a table with `windows`, it also keeps the metrics per user."""
    if not table.windows:
        return RowMeasurement(name, {**reports["test"].metrics, **costs}, origin)
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    reported = reported_metrics(table)
    for part, report in reports.items():
        assert report.per_user is not None
        prefix, error = "" if part == "test" else f"{part} ", report.per_user.standard_errors()
        metrics |= {prefix + metric: report.metrics[metric] for metric in reported}
        errors |= {prefix + metric: error[metric] for metric in reported}
        file = per_user_file(folder, name, part)
        make_folders(file.parent)
        report.per_user.save(file)
    return RowMeasurement(name, {**metrics, **costs}, origin, errors)


def _counted(name: str, log: EventLog, data: DataConfig, asked: EvaluateConfig) -> EvaluationReport:
    """A baseline's quality, with a version per horizon. All items of the log are ranked."""
    began = time.perf_counter()
    versions = {horizon: _baseline(name, log, data, horizon) for horizon in asked_horizons(asked)}
    per_user = measure_by_horizon(versions, log, data, asked, np.arange(log.num_items))
    return EvaluationReport(per_user.means(), len(per_user.users), time.perf_counter() - began, per_user=per_user)


def _baseline(name: str, log: EventLog, data: DataConfig, horizon: int) -> CountingBaseline:
    """A baseline by its name, made for the items of so many next events."""
    if name == PopularityAfterwards.name:
        return PopularityAfterwards()
    known = counting_baselines(has_time=log.has_time, horizon_events=horizon, has_features=bool(log.item_features))
    if name not in [baseline.name for baseline in known]:  # these need scikit-learn
        known = trained_baselines(horizon_events=horizon, at_one_time=data.split is Split.time)
    (chosen,) = (baseline for baseline in known if baseline.name == name)
    return chosen


def row_folder(settings: argparse.Namespace, name: str, seed: int) -> Path:
    """Folder of a row and seed, named by the configuration: equal configurations of several tables share a run."""
    table = TABLES[settings.table]
    return Path(settings.work) / table.data / f"{_digest(recorded_config(table, table.rows[name]))}-{seed}"


def _placed(settings: argparse.Namespace, config: TrainConfig, seed: int, log: EventLog, folder: Path) -> TrainConfig:
    """A configuration of a run in `folder`."""
    config = replace(config, run_dir=str(folder / "run"), seed=seed, num_threads=settings.threads)
    config.data.path = str(log.path)
    return config


def _trained(
    settings: argparse.Namespace, run: TableRun, config: TrainConfig, log: EventLog, folder: Path
) -> _RowModel:
    """Train or resume in a folder, or load the finished model."""
    config = _placed(settings, config, run.seed, log, folder)
    if run.row.base:
        config = _downstream_config(settings, run, config, log)
    return _RowModel(train_noted(config, log, folder), folder)


def _downstream_config(settings: argparse.Namespace, run: TableRun, config: TrainConfig, log: EventLog) -> TrainConfig:
    """The configuration on top of the base; trains the base and refreshes its store if they are missing."""
    table, folder = TABLES[settings.table], row_folder(settings, run.row.base, run.seed)
    base = _placed(settings, train_config(table, table.rows[run.row.base]), run.seed, log, folder)
    model, store = train_noted(base, log, folder), folder / f"until-{run.row.until}"
    assert isinstance(model, VistaModel)
    if not (store / CURRENT).exists():  # another generation would make it another run
        refresh(model, log, store, until=run.row.until)
    return replace(config, base=str(folder / "run" / "best"), store=str(store))


def _served(
    run: TableRun,
    log: EventLog,
    table: Table,
    models: Mapping[str, _RowModel],
    folder: Path,
    trained: RowOrigin,
) -> Iterator[RowMeasurement]:
    """The missing lines of a trained row, through the scorer, from a store of each codec and part of the split."""
    served = {name: how for name, how in run.row.served(run.name).items() if name in run.missing}
    refreshed: dict[Path, float] = {}
    for name, how in served.items():
        reports, costs = {}, {}
        for part, one in models.items():
            assert isinstance(one.model, VistaModel)
            model = one.model
            store = one.folder / (f"{how.codec.value}-{how.staleness}" if how.staleness else how.codec.value)
            until = split_until(model.data, part)
            if how.staleness:
                until = replace(until, held_out=until.held_out + how.staleness)
            if store not in refreshed:
                report = refresh(model, log, store, until=until, options=RefreshOptions(codec=how.codec))
                refreshed[store] = report.seconds / max(report.num_users - report.resumed_at, 1)
            shown = model if how.tail_len is None else model.with_tail(how.tail_len)
            asked = _asked(table, part)
            asked.staleness = how.staleness
            with Scorer.open(shown, store) as scorer:
                is_scheduled = model.data.refresh_days > 0 and not how.staleness
                later = store.parent if is_scheduled else None
                evaluation = evaluate_scorer(scorer, log, asked, refreshed=later)
                reports[part] = _reported(table, evaluation, log, model.data, asked)
                if table.costs:
                    costs = {
                        "train events/s": training_speed(one.folder / "run" / "metrics.jsonl"),
                        "refresh ms/user": 1e3 * refreshed[store],
                    }
                    if not how.staleness:  # the timed requests do not bring their own tail
                        costs["request ms"] = scorer_latency_ms(scorer, log)
        yield _measurement(table, name, reports, costs, trained, folder)


def _oracle_metrics(log: EventLog, config: TrainConfig) -> dict[str, float]:
    """The best possible metrics: those of the simulation's true probabilities."""
    assert config.data.test_from is not None
    cases = impression_cases(log, parse_time(config.data.test_from), None)
    assert cases.probability is not None
    return impression_metrics(cases, cases.probability)


def _reference_metrics(table: Table, predictor: str) -> dict[str, float]:
    """The best possible metrics of a predictor that knows part of a history."""
    assert table.simulation is not None
    simulated = generate(SimulateConfig(**table.simulation))
    rows = oracle_metrics(simulated, tasks=WORLDS[simulated.config.world].tasks)
    own = [row for row in rows if row.predictor == predictor]
    return {f"{metric}/{row.task}": getattr(row, metric) for metric in ("auc", "ne") for row in own}


def table_log(settings: argparse.Namespace, row: TableRow) -> EventLog:
    """The table's EventLog, which is created if missing; with the features of the row's `texts`."""
    table = TABLES[settings.table]
    # Simulations of different sizes may share a name but not a log.
    name = table.data if table.simulation is None else f"{table.data}-{_digest(table.simulation)}"
    suffix = f"-text-{row.texts}" if row.texts else ""
    path = settings.work / "logs" / f"{name}{suffix}"
    if not path.exists():
        if row.texts:
            prepare_with_texts(table.data, set_folder(table.data, settings.data), path, row.texts)
        elif table.simulation is None:
            prepare_set(table.data, set_folder(table.data, settings.data), path)
        else:
            simulated = SimulateConfig(out=str(source_folder(path)), **table.simulation)
            prepare_simulation(simulated, path)
    return EventLog.open(path)


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]
