"""Quality as served: summaries and tails from the store, scores from the scorer, cases from the protocol."""

from __future__ import annotations

import hashlib
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from vista.arrays import Float32s, Int
from vista.config import EvaluateConfig
from vista.config.checks import AskedBaselines, Target, require, to_dict
from vista.device import cpu_settings, resolve_device
from vista.errors import ConfigError, LeakageError
from vista.evaluation.answers import RawHistoryAnswers, RefreshedAnswers, ScorerAnswers
from vista.evaluation.baseline_evaluation import BaselineReport, measure_baselines, measure_label_baselines
from vista.evaluation.cases import ImpressionCases, impression_cases, looks_at, with_tasks
from vista.evaluation.comparison import PerUserMetrics, per_user_path
from vista.evaluation.popularity_report import PopularityReport, popularity_report
from vista.evaluation.protocol import (
    USERS_PER_BATCH,
    RecommendedLists,
    WindowReport,
    impression_metrics,
    measure_labels,
    measure_next_items,
    measure_windows,
)
from vista.examples.item_statistics import item_counts
from vista.files import replace_text, writable_file
from vista.installation import __version__
from vista.log.event_log import EventLog, log_digest
from vista.log.splits import leaves_out_seen, parse_until, part_times, split_until, visible_counts
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.saved_model import CONFIG_FILE
from vista.model.serving_model import Adapter
from vista.model.vista_model import VistaModel
from vista.ranks import ALONE, Ranks
from vista.refresh import check_log
from vista.scorer import Scorer
from vista.store.record_encoding import read_key
from vista.text_table import fitted


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics, and the cases that they were computed from, for reports."""

    metrics: dict[str, float]
    num_cases: int
    seconds: float
    ranks: Int | None = None
    impressions: ImpressionCases | None = None
    probabilities: Float32s | None = None
    """[N, num_tasks] of the labels as they were observed: scores times `looks`."""
    looks: Float32s | None = None
    """[N, num_tasks] probabilities that users looked at impressions; 1 for tasks that are not examined."""
    popularity: PopularityReport | None = None
    per_user: PerUserMetrics | None = None
    windows: WindowReport | None = None
    labels: PerUserMetrics | None = None
    """Metrics of the labels of impressions."""
    baselines: BaselineReport | None = None
    """Of next items or windows."""
    label_baselines: BaselineReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: metrics (null where undefined), standard errors over users, num_cases, seconds, baselines."""
        parts = [part for part in (self.per_user, self.labels) if part is not None]
        errors = {name: error for part in parts for name, error in part.standard_errors().items()}
        of_labels = {} if self.labels is None else self.labels.means()
        values = {
            "metrics": _finite(of_labels | self.metrics),
            "standard_errors": _finite(errors),
            "num_cases": self.num_cases,
            "seconds": self.seconds,
        }
        if reports := self.baseline_reports():
            found: dict[str, dict[str, float | None]] = {}
            for report in reports.values():
                for name, metrics in report.metrics().items():
                    found.setdefault(name, {}).update(_finite(metrics))
            values["baselines"] = found
        return values

    def baseline_reports(self) -> dict[str, BaselineReport]:
        """Reports of baselines by what is added to the name of `out`: nothing, or LABELS."""
        found = {"": self.baselines, LABELS: self.label_baselines}
        return {suffix: report for suffix, report in found.items() if report is not None}

    def __str__(self) -> str:
        # Reports print their own numbers, as tables.
        reports = [report for report in (self.windows, self.popularity) if report is not None]
        hidden = {name for report in reports for name in report.metrics()}
        lines = [f"{self.num_cases} cases in {self.seconds:.1f} s"]
        lines += [f"  {name:<20} {value:.4f}" for name, value in self.metrics.items() if name not in hidden]
        lines = [fitted(line, 4) for line in lines]
        lines += map(str, reports)
        lines += map(str, self.baseline_reports().values())
        return "\n".join(lines)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


PLACES = (
    *("data", "model", "store", "adapter", "out", "authentication_key_file"),
    *("verify_log", "device", "num_threads"),
)
"""Fields of EvaluateConfig that may differ between ranks."""
LABELS = ".labels"
"""Added to the name of `out` for metrics of labels, which have other users than those of next items."""
NO_STORE = "none"
"""Written in place of a codec for a baseline."""


def evaluate(config: EvaluateConfig) -> EvaluationReport:
    """`vista evaluate`: measure, and write the result as JSON to `out` if it is set.

    The ranks of a torchrun job divide the cases. Only rank 0 writes, and only its report has baselines.

    Raises:
        LeakageError: if the store, or a record, covers a label's event.
        ConfigError: if the store was refreshed for another split, or there is nothing to measure.
        LogFormatError: if a file of the log is damaged.
        RankError: if another process of the job has ended.
    """
    device = resolve_device(config.device)
    with Ranks.joined(device) as ranks:
        if config.out is not None and ranks.leads:
            writable_file(Path(config.out), "out")
            writable_file(per_user_path(config.out), "out")
        log = EventLog.open(config.data)
        if config.verify_log and ranks.checks_files:
            log.verify()
        with cpu_settings(config.num_threads):
            model = load_model(config.model, ranks.own_device(device))
            if isinstance(model, HistoryModel):
                require(config.adapter is None, "adapter", "a baseline has none; leave it out")
                _agree(ranks, config, log, NO_STORE)
                result, codec = evaluate_model(model, log, config, ranks), NO_STORE
            else:
                assert isinstance(model, VistaModel)
                key, adapter = read_key(config.authentication_key_file), config.adapter
                with Scorer.open(model, config.store, key=key, adapter=adapter) as scorer:
                    if adapter is not None:
                        trained = Adapter.read(adapter, scorer.served)
                        schema = replace(model.schema, examined_tasks=trained.examined_tasks)
                        model.data, model.schema = trained.data, schema
                    _agree(ranks, config, log, scorer.store.manifest.records_digest)
                    result = evaluate_scorer(scorer, log, config, ranks)
                    codec = scorer.store.manifest.codec
    if config.out is not None and ranks.leads:
        asked: dict[str, Any] = {
            name: getattr(config, name) for name in ("data", "model", "adapter", "split", "top_k", "staleness")
        }
        asked |= {"codec": codec, "target": config.target.value}
        if config.target is Target.window:
            asked |= {
                name: getattr(config, name) for name in ("horizon_events", "horizon_days", "min_seen", "min_after")
            }
        else:
            asked |= {"exclude_seen": leaves_out_seen(log, model.data)}
        replace_text(Path(config.out), json.dumps(asked | result.to_dict(), indent=2) + "\n")
        for suffix, own in (("", result.per_user), (LABELS, result.labels)):
            if own is not None:
                own.save(per_user_path(config.out + suffix))
        for suffix, report in result.baseline_reports().items():
            report.save(config.out + suffix)
    return result


def evaluate_scorer(
    scorer: Scorer, log: EventLog, config: EvaluateConfig, ranks: Ranks = ALONE, *, refreshed: Path | None = None
) -> EvaluationReport:
    """Measure a scorer on a part of its model's split of `log`.

    Args:
        config: how to measure; what it says about files is not read.
        ranks: processes that measure together.
        refreshed: folder for stores that are refreshed for impressions as `data.refresh_days` of the model asks; None
            answers all of them from the scorer's store.

    Raises:
        LeakageError, ConfigError: as `evaluate`.
    """
    _check(scorer.model, log, config)
    check_store(scorer, config)
    if refreshed is None:
        answers = ScorerAnswers(scorer, log, requests_per_batch=USERS_PER_BATCH)
    else:
        answers = RefreshedAnswers(scorer, log, config.split, refreshed, requests_per_batch=USERS_PER_BATCH)
    return _measure(scorer.model, log, config, answers, ranks)


def evaluate_model(
    model: HistoryModel, log: EventLog, config: EvaluateConfig, ranks: Ranks = ALONE
) -> EvaluationReport:
    """Measure a baseline on a part of its split of `log`. It reads the raw history up to each label.

    Args:
        config: how to measure; what it says about files and staleness is not read.
        ranks: processes that measure together.

    Raises:
        ConfigError: if there is nothing to measure.
    """
    _check(model, log, config)
    return _measure(model, log, config, RawHistoryAnswers(model, log, model.rows_of(log.items)), ranks)


def _agree(ranks: Ranks, config: EvaluateConfig, log: EventLog, store: str) -> None:
    """Check that all ranks measure the same thing; store: digest of its records."""
    asked = {key: value for key, value in to_dict(config).items() if key not in PLACES}
    model = hashlib.sha256((Path(config.model) / CONFIG_FILE).read_bytes()).hexdigest()[:12]
    ranks.agree({"vista": __version__, "log": log_digest(log), "model": model, "store": store, **asked})


def _check(model: RankingModel, log: EventLog, config: EvaluateConfig) -> None:
    if config.popularity and not model.has_retrieval:
        raise ConfigError("popularity=true: this model's retrieval head was not trained; set popularity=false")
    if config.target is Target.window and not model.has_retrieval:
        raise ConfigError(
            "target=window: this model's retrieval head was not trained; train it with optim.next_weight above 0"
        )
    check_log(model, log, requests=True)


def check_store(scorer: Scorer, config: EvaluateConfig) -> None:
    """A store refreshed beyond the split covers labels; a store of another age answers another question."""
    stored, limit = parse_until(scorer.store.manifest.until), split_until(scorer.model.data, config.split)
    asked = replace(limit, held_out=limit.held_out + config.staleness)
    if stored == asked:
        return
    labels = f"the {config.split} labels of this model begin after until={limit}"
    remedy = (
        f"run `vista refresh until={asked}` with another store, and keep this one for serving (`vista report` makes "
        "a store of its own if none is named)"
    )
    leaks = stored.held_share < limit.held_share if limit.held_share else stored.held_out < limit.held_out
    if limit.before is not None:
        leaks = stored.before is None or stored.before > limit.before
    if leaks:
        raise LeakageError(
            f"{scorer.store.path} was refreshed with until={stored}, but {labels}: its records cover them; {remedy}"
        )
    age = f", and staleness={config.staleness} asks for until={asked}" if config.staleness else ""
    raise ConfigError(f"store={scorer.store.path}: was refreshed with until={stored}, but {labels}{age}; {remedy}")


def _measure(
    model: RankingModel,
    log: EventLog,
    config: EvaluateConfig,
    answers: ScorerAnswers | RawHistoryAnswers,
    ranks: Ranks,
) -> EvaluationReport:
    """Ask all cases, and baselines too if they are asked for, and compute the metrics."""
    began, columns = time.perf_counter(), model.rows_of(log.items) - 1
    if config.target is Target.window:
        windows, per_user = measure_windows(log, model.data, columns, config, answers.catalog_scores, ranks)
        evaluation = EvaluationReport(windows.metrics(), len(per_user.users), 0.0, per_user=per_user, windows=windows)
    else:
        evaluation = _measure_next_items(model, log, columns, config, answers, ranks)
    evaluation = replace(evaluation, seconds=time.perf_counter() - began)
    if config.baselines is AskedBaselines.none or not ranks.leads:
        return evaluation
    if (ranked := evaluation.per_user) is not None:
        evaluation = replace(evaluation, baselines=measure_baselines(model, log, config, ranked))
    if (cases := evaluation.impressions) is not None and (labels := evaluation.labels) is not None:
        of_labels = measure_label_baselines(model, log, config, cases, labels)
        evaluation = replace(evaluation, label_baselines=of_labels)
    return evaluation


def _measure_next_items(
    model: RankingModel,
    log: EventLog,
    columns: Int,
    config: EvaluateConfig,
    answers: ScorerAnswers | RawHistoryAnswers,
    ranks: Ranks,
) -> EvaluationReport:
    """Next items, and labels of impressions."""
    metrics: dict[str, float] = {}
    places = impressions = probabilities = looks = report = per_user = labels = None
    num_cases = 0
    if model.has_retrieval:
        lists = RecommendedLists(len(model.items), config.top_k[0]) if config.popularity else None
        observe = None if lists is None else lists.add
        places, per_user = measure_next_items(
            log, model.data, columns, config, answers.catalog_scores, ranks, observe=observe
        )
        metrics |= per_user.means()
        if lists is not None:
            lists.take_all(ranks)
            report = _popularity(model, log, columns, lists, places)
            metrics |= report.metrics()
        num_cases += len(places)
    begin, end = part_times(model.data, config.split)
    if log.impressions is not None and model.schema.tasks and begin is not None:
        impressions = with_tasks(impression_cases(log, begin, end), model.schema.tasks)
        own = impressions.part(ranks.part_of(np.ones_like(impressions.user)))
        answered = answers.probabilities(own)
        looks = looks_at(log, impressions, model.schema.examined_tasks, model.data)
        probabilities = ranks.of_all_cases({"probability": answered})["probability"] * looks
        metrics |= impression_metrics(impressions, probabilities)
        labels = measure_labels(log, impressions, probabilities, config.split)
        num_cases += len(impressions.user)
    if num_cases == 0:
        raise ConfigError(
            f"{log.path} has no {config.split} case for this model: no label after "
            f"{split_until(model.data, config.split)}, and no impression of its tasks; choose another split"
        )
    return EvaluationReport(
        metrics, num_cases, 0.0, places, impressions, probabilities, looks, report, per_user=per_user, labels=labels
    )


def _popularity(
    model: RankingModel, log: EventLog, columns: Int, lists: RecommendedLists, ranks: Int
) -> PopularityReport:
    """The report over the model's items; columns int64 [log.num_items] of the log's items, -1 unknown to the model."""
    events = item_counts(log, visible_counts(log, split_until(model.data, "train")))
    counts = np.zeros(len(model.items), np.int64)
    np.add.at(counts, columns[columns >= 0], events[columns >= 0])
    norms = model.catalog_vectors().detach().float().norm(dim=1).cpu().numpy()
    return popularity_report(counts, lists, ranks, norms)
