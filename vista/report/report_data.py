"""What a report is about: run folders, runs and baselines as measures over the same cases, and the scorer's latency."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.config import EvaluateConfig, ModelConfig, RefreshOptions, TrainConfig
from vista.config.checks import Target
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.evaluation.baseline_evaluation import measure_baseline, measure_baselines
from vista.evaluation.cases import ImpressionCases, next_item_cases
from vista.evaluation.comparison import AucMeasure, Estimate, MeanMeasure, Measure, PerUserMetrics
from vista.evaluation.evaluate import EvaluationReport, evaluate_model, evaluate_scorer
from vista.evaluation.label_baselines import label_baselines
from vista.evaluation.protocol import split_windows, window_lengths, window_metric
from vista.evaluation.trained_baselines import PooledItemVectors
from vista.files import read_limited
from vista.log.event_log import EventLog
from vista.log.splits import last_refresh, part_counts, split_until
from vista.machine import usable_cores
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.saved_model import CONFIG_FILE, ModelDescription
from vista.model.vista_model import VistaModel
from vista.progress_bar import progress_bar
from vista.refresh import refresh
from vista.runs.run_list import EPOCH_0, RunFiles, RunSummary
from vista.scorer import CandidateSet, Scorer

MAX_CARD_BYTES = 1 << 20
ORACLE = "oracle"
OTHER_NAMES = {"counters": "counter baseline", PooledItemVectors.name: "pooled-vector baseline"}
"""Names in a report of the baselines that are called like parts of a model."""
T = TypeVar("T")
MIN_ROUNDS, MAX_ROUNDS = 3, 9
REQUESTS_PER_ROUND = 30
"""Requests per user and round."""
WIDE_SPREAD = 1.5
"""A round in which the 90th percentile of a user exceeds this multiple of the median is repeated."""


@dataclass(frozen=True, slots=True)
class TrainedRun:
    """The settings, the metrics, and the model card of a run whose model was exported."""

    folder: Path
    config: TrainConfig
    card: str
    """Model card in Markdown; empty if the model has none."""
    files: RunFiles
    summary: RunSummary

    @property
    def model_folder(self) -> Path:
        """Folder of the exported model."""
        return self.folder / "best"

    @property
    def epoch_0(self) -> Path | None:
        """Folder of the model of epoch 0, if the run has one, and a later one is exported."""
        has_both = self.best_epoch > 0 and (self.folder / EPOCH_0 / CONFIG_FILE).exists()
        return self.folder / EPOCH_0 if has_both else None

    @property
    def best_epoch(self) -> int:
        """Epoch of the exported model; -1 if it is not known."""
        return int((self.files.best or {}).get("epoch", -1))

    @property
    def has_summary(self) -> bool:
        """Whether its model reads a summary."""
        model = self.config.model
        return isinstance(model, ModelConfig) and model.num_seeds > 0

    @classmethod
    def read(cls, folder: str | Path, key: str = "run") -> TrainedRun:
        """Read a run folder.

        Args:
            folder: `run_dir` of the training.
            key: of the configuration that names it, for errors.

        Raises:
            ConfigError: it is not a run folder, is of another version of vista, or has no exported model yet.
            CheckpointError: the model's config.json is damaged or of another format.
        """
        folder = Path(folder)
        if (folder / CONFIG_FILE).exists() and not (folder / "config.yaml").exists():
            raise ConfigError(f"{key}={folder}: is an exported model; name its run folder, such as {folder.parent}")
        if not (folder / "config.yaml").exists():
            raise ConfigError(f"{key}={folder}: is not a run folder (no config.yaml); name the run_dir of a training")
        try:
            config = compose_config(TrainConfig, config_file=folder / "config.yaml")
        except ConfigError as error:
            raise ConfigError(
                f"{key}={folder}: its config.yaml cannot be read ({error}); if another version of vista wrote it, "
                "train again"
            ) from error
        if not (folder / "best" / CONFIG_FILE).exists():
            raise ConfigError(
                f"{key}={folder}: has no exported model (best/) yet, because training has not reached its first "
                "validation; rerun its `vista train` command to resume"
            )
        ModelDescription.read(folder / "best")  # A damaged one is an error before anything is measured.
        files = RunFiles.read(folder)
        card = _text(folder / "best" / "README.md", MAX_CARD_BYTES)
        return cls(folder, config, card, files, RunSummary.of_files(files, folder.name))


def _text(path: Path, limit: int) -> str:
    """Text of a file; empty if there is none."""
    try:
        return read_limited(path, limit).decode("utf-8", "replace")
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read ({error}); correct its permissions, or remove it") from error


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """A run and its evaluation."""

    name: str
    record: TrainedRun
    model: RankingModel
    evaluation: EvaluationReport
    scorer: Scorer | None
    """None for a model without summaries. It is open as long as the stack that it was measured with."""

    @classmethod
    def of(
        cls,
        name: str,
        record: TrainedRun,
        log: EventLog,
        config: EvaluateConfig,
        stack: ExitStack,
        *,
        folder: Path | None = None,
        store: str | None = None,
        key: bytes | None = None,
        scratch: Path,
        popularity: bool = False,
    ) -> MeasuredRun:
        """Load a run's model and evaluate it, with summaries from a store if it has summaries.

        Impressions are answered from a store that is refreshed as `data.refresh_days` asks.

        Args:
            name: how the report calls it.
            folder: of the model; None is the exported one.
            config: what to ask; what it says about files is not read.
            stack: closes the scorer, and removes the temporary store.
            store: a store of the model's summaries; None refreshes one.
            key: authenticates the records of `store`.
            scratch: folder in which a temporary store is made.
            popularity: whether to measure how much lists follow it, if the model ranks next items.

        Raises:
            CheckpointError, StoreError: the model or the store cannot be read, or the store is of another model.
            LeakageError, ConfigError: as `evaluate_scorer`.
        """
        model = load_model(folder or record.model_folder)
        if popularity and model.has_retrieval and config.target is Target.next:
            config = replace(config, popularity=True)
        if isinstance(model, HistoryModel):
            if store is not None:
                raise ConfigError(f"store: the model of {record.folder} has no summaries; leave it out")
            return cls(name, record, model, evaluate_model(model, log, config), None)
        assert isinstance(model, VistaModel)
        own = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix=".report-", dir=scratch)))
        if store is None:
            options = RefreshOptions(verify_log=False)
            store = str(own / "store")
            refresh(model, log, store, until=split_until(model.data, config.split), options=options)
        scorer = stack.enter_context(Scorer.open(model, store, key=key))
        later = own if model.data.refresh_days else None
        return cls(name, record, model, evaluate_scorer(scorer, log, config, refreshed=later), scorer)

    def missing_events(self, log: EventLog, split: str) -> Int | None:
        """Events between the last refresh and each impression, int64 [N]; None without impressions or a store."""
        cases = self.evaluation.impressions
        if cases is None or self.scorer is None:
            return None
        refresh_of, times = last_refresh(self.model.data, split, cases.timestamp)
        missing = np.zeros_like(cases.seen)
        for index in np.unique(refresh_of).tolist():
            own = refresh_of == index
            missing[own] = cases.seen[own] - log.counts_before(int(times[index]))[cases.user[own]]
        return missing


@dataclass(frozen=True, slots=True)
class ComparisonData:
    """Everything that the sections about quality show."""

    runs: list[str]
    """Names of the runs; the report is about the first one."""
    ranking: dict[str, PerUserMetrics]
    """Metrics of ranking per user, by run or baseline; empty if the model does not rank."""
    impressions: ImpressionCases | None
    probabilities: dict[str, Float32s]
    """{run, baseline, or oracle: [N, tasks]} of the impressions; empty without them."""
    measures: list[Measure]
    """The first task's AUC, and the most important metric of ranking."""
    shown: list[str]
    """What sections that split the cases show: the runs, the oracle, the pooled-vector baseline, the best other one."""
    parts: dict[str, str] = field(default_factory=dict)
    """{predictor: what it reads} of the parts of the model, each with one part more than the one before."""

    @property
    def own(self) -> str:
        """The run that the report is about."""
        return self.runs[0]

    def best_baseline(self, measure: Measure, estimates: Mapping[str, Estimate]) -> str | None:
        """The best baseline of a measure; None without any."""
        others = (*self.runs, ORACLE, *self.parts)
        rest = [name for name in measure.names if name not in others and np.isfinite(estimates[name].value)]
        return max(rest, key=lambda name: estimates[name].value) if rest else None

    def color(self, name: str) -> int:
        """Number of the color of a predictor in all charts."""
        return self.shown.index(name)

    @classmethod
    def of(
        cls, runs: Sequence[MeasuredRun], log: EventLog, config: EvaluateConfig, *, baselines: bool, trees: bool
    ) -> ComparisonData:
        """Measure the baselines on the cases of the runs, and collect all of them.

        Args:
            runs: the run of the report first; all have been measured with `config`.
            trees: whether to fit trees on earlier labels, too.

        Raises:
            ConfigError: a run was measured on other cases, because its data split or its tasks differ.
        """
        own = runs[0]
        ranking = {run.name: run.evaluation.per_user for run in runs if run.evaluation.per_user is not None}
        if own.name not in ranking:
            ranking = {}
        for run in runs[1:]:
            if run.name in ranking and ranking[run.name].question != ranking[own.name].question:
                raise ConfigError(
                    f"others: {run.record.folder} was evaluated on other cases than {own.record.folder}, because its "
                    "data split differs; name runs with the same data.*"
                )
        cases, probabilities = own.evaluation.impressions, {}
        if cases is not None:
            for run in runs:
                asked, answers = run.evaluation.impressions, run.evaluation.probabilities
                if asked is None or answers is None:
                    continue
                if asked.tasks != cases.tasks or not np.array_equal(asked.timestamp, cases.timestamp):
                    raise ConfigError(
                        f"others: {run.record.folder} was measured on other impressions or tasks than "
                        f"{own.record.folder}; name runs with the same data.* and optim.tasks"
                    )
                probabilities[run.name] = answers
        if baselines and ranking:
            ranking |= _as_baselines(_ranking_baselines(own, log, config))
        if baselines and cases is not None:
            probabilities |= _as_baselines(label_baselines(log, own.model.data, cases, trained=trees))
        if cases is not None and cases.probability is not None and own.evaluation.looks is not None:
            probabilities[ORACLE] = cases.probability.astype(np.float32) * own.evaluation.looks
        names = [run.name for run in runs]
        measures: list[Measure] = []
        if cases is not None and cases.tasks:
            mask = cases.mask[:, 0]
            measures.append(
                AucMeasure(
                    cases.tasks[0],
                    cases.user[mask],
                    cases.seen[mask],
                    cases.item[mask],
                    cases.label[mask, 0],
                    {name: values[mask, 0] for name, values in probabilities.items()},
                )
            )
        if ranking:
            measures.append(_ranking_measure(ranking, own, log, config))
        parts = _parts(runs)
        shown = [name for name in names if name != EPOCH_0]
        return cls(names, ranking, cases, probabilities, measures, _shown(shown, measures), parts)


def _as_baselines(measured: Mapping[str, T]) -> dict[str, T]:
    """Baselines by the names that they have in a report."""
    return {OTHER_NAMES.get(name, name): each for name, each in measured.items()}


def _parts(runs: Sequence[MeasuredRun]) -> dict[str, str]:
    """As `ComparisonData.parts`; empty if the first run's model has no summary."""
    own = runs[0]
    if not own.record.has_summary:
        return {}
    what = {
        EPOCH_0: "counters and pooled vectors, no attention",
        own.name: "and to the summary",
    }
    without = without_summary(runs)
    if without is not None:
        what[without] = "with attention to the newest events (K = 0)"
    parts = {}
    for run in sorted(runs, key=lambda run: (run.name != EPOCH_0, run.name != without)):
        if run.name in what:
            is_wide = run.name != EPOCH_0 and run.record.best_epoch == 0
            parts[run.name] = what[run.name] + ("; validation chose epoch 0, without attention" if is_wide else "")
    return parts


def without_summary(runs: Sequence[MeasuredRun]) -> str | None:
    """Name of the run with a vista model that reads no summary; None without one."""
    is_vista = (run for run in runs[1:] if isinstance(run.model, VistaModel) and not run.record.has_summary)
    return next((run.name for run in is_vista), None)


def _ranking_baselines(own: MeasuredRun, log: EventLog, config: EvaluateConfig) -> dict[str, PerUserMetrics]:
    horizon = 1 if config.target is Target.next else config.horizon_events[0]
    columns = own.model.rows_of(log.items) - 1
    pooled = PooledItemVectors(horizon_events=horizon)
    assert own.evaluation.per_user is not None
    measured = measure_baselines(own.model, log, config, own.evaluation.per_user).per_user
    return measured | {pooled.name: measure_baseline(pooled, log, own.model.data, config, columns)}


def head_metric(config: EvaluateConfig) -> str:
    """The metric of ranking by which predictors are compared where only one is shown."""
    if config.target is Target.next:
        return f"ndcg@{config.top_k[0]}"
    return window_metric(f"precision@{config.top_k[0]}", next(iter(window_lengths(config))))


def _ranking_measure(
    ranking: dict[str, PerUserMetrics], own: MeasuredRun, log: EventLog, config: EvaluateConfig
) -> MeanMeasure:
    metric = head_metric(config)
    values = {name: each.values[metric] for name, each in ranking.items()}
    if config.target is Target.next:
        asked = next_item_cases(log, *part_counts(log, own.model.data, config.split))
        return MeanMeasure(f"{metric} of the next item", metric, asked.user, asked.seen, asked.item, values)
    windows = next(iter(split_windows(log, own.model.data, config).values()))
    title = f"precision@{config.top_k[0]} of the next {config.horizon_events[0]} events"
    return MeanMeasure(title, metric, windows.user, windows.seen, None, values)


def _shown(runs: list[str], measures: Sequence[Measure]) -> list[str]:
    chosen = [*runs, ORACLE, OTHER_NAMES[PooledItemVectors.name]]
    for measure in measures:
        estimates = measure.estimates()
        named = [name for name in measure.names if name not in chosen]
        others = [name for name in named if np.isfinite(estimates[name].value)]
        chosen += [max(others, key=lambda name: estimates[name].value)] if others else []
    return list(dict.fromkeys(chosen))


@dataclass(frozen=True, slots=True)
class Latency:
    """Times of requests for U users with histories of different lengths."""

    lengths: list[int]
    """Events in each user's history."""
    num_candidates: int
    median_s: list[float]
    """Median over the rounds of each round's median, by user."""
    p90_s: list[float]
    """Median over the rounds of each round's 90th percentile, by user."""
    num_rounds: int
    is_wide: bool
    """Whether the spread was still wide in at least half of the rounds."""
    load: tuple[float, float]
    """Load average over one minute, before and after; NaN where the system has none."""
    num_cores: int
    num_threads: int

    @classmethod
    def measure(
        cls, scorer: Scorer, users: Sequence[int | str], lengths: Sequence[int], candidates: CandidateSet, now: int
    ) -> Latency:
        """Score the candidates for one user at a time, in turns, so that a disturbance affects all users equally.

        A round is repeated while most of the rounds so far had a wide spread, up to MAX_ROUNDS.

        Args:
            users: U ids of users in the scorer's store.
            lengths: events in their histories.
            candidates: the same for all users.
            now: time of the requests, ms.
        """
        before = _load()
        _time_round(scorer, users, candidates, now, 5)  # fills caches
        rounds: list[NDArray[np.float64]] = []
        with progress_bar(desc="latency", unit="round", leave=False) as bar:
            while len(rounds) < MIN_ROUNDS or (len(rounds) < MAX_ROUNDS and _is_wide(rounds)):
                rounds.append(_time_round(scorer, users, candidates, now, REQUESTS_PER_ROUND))
                bar.update()
        return cls(
            list(lengths),
            candidates.rows.shape[-1],
            np.median([np.median(each, axis=0) for each in rounds], axis=0).tolist(),
            np.median([np.percentile(each, 90, axis=0) for each in rounds], axis=0).tolist(),
            len(rounds),
            _is_wide(rounds),
            (before, _load()),
            usable_cores(),
            torch.get_num_threads(),
        )


def _time_round(
    scorer: Scorer, users: Sequence[int | str], candidates: CandidateSet, now: int, num_requests: int
) -> NDArray[np.float64]:
    """Seconds of each request: float64 [num_requests, U]."""
    times = np.zeros((num_requests, len(users)))
    for turn in range(num_requests):
        for index, user in enumerate(users):
            began = time.perf_counter()
            scorer.score([user], candidates, now=now)
            times[turn, index] = time.perf_counter() - began
    return times


def _is_wide(rounds: Sequence[NDArray[np.float64]]) -> bool:
    wide = [bool((np.percentile(each, 90, axis=0) > WIDE_SPREAD * np.median(each, axis=0)).any()) for each in rounds]
    return 2 * sum(wide) >= len(wide)


def _load() -> float:
    """Average number of runnable processes over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")
