"""Quality as served: summaries and tails from the store, scores from the scorer, questions from the protocol."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.config import EvaluateConfig
from vista.device import cpu_settings, resolve_device
from vista.errors import ConfigError, LeakageError
from vista.evaluation.popularity import PopularityReport, Recommendations, popularity_report
from vista.evaluation.protocol import (
    ImpressionCases,
    NextItemCases,
    impression_cases,
    impression_metrics,
    next_item_cases,
    rank_next_items,
    ranking_metrics,
    request_starts,
    with_tasks,
)
from vista.evaluation.raw_history import RawHistoryAnswers
from vista.evaluation.recall import RecallReport, measure_recall
from vista.examples.frequency import item_counts
from vista.files import replace_text, writable_folder
from vista.log.event_log import EventLog
from vista.log.splits import parse_until, split_until, visible_counts
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.registry import load_model
from vista.model.vista_model import VistaModel
from vista.refresh import check_log
from vista.scorer import Scorer
from vista.store import Tail
from vista.store.format.authentication import read_key

Int = NDArray[np.int64]
Floats = NDArray[np.float32]
PARTS = ("test", "validation")
NO_STORE = "none"
"""In place of a codec, of a baseline."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured: metrics, and the cases behind them for reports."""

    metrics: dict[str, float]
    num_cases: int
    seconds: float
    ranks: Int | None
    impressions: ImpressionCases | None
    probabilities: Floats | None
    popularity: PopularityReport | None = None
    recall: RecallReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: metrics (null where undefined), num_cases, seconds."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {"metrics": metrics, "num_cases": self.num_cases, "seconds": self.seconds}

    def __str__(self) -> str:
        # Reports print their own numbers, as tables.
        reports = [report for report in (self.popularity, self.recall) if report is not None]
        hidden = {name for report in reports for name in report.metrics()}
        lines = [f"{self.num_cases} cases in {self.seconds:.1f} s"]
        lines += [f"  {name:<20} {value:.4f}" for name, value in self.metrics.items() if name not in hidden]
        return "\n".join([*lines, *map(str, reports)])


def evaluate(config: EvaluateConfig) -> Evaluation:
    """`vista evaluate`: measure, and write the result to `out` as JSON if it is set.

    Raises:
        LeakageError: if the store, or a record, has seen a label's event.
        ConfigError: if the store was refreshed for another split, or there is nothing to measure.
    """
    if config.out is not None:
        writable_folder(Path(config.out).absolute().parent, "out")
    log = EventLog.open(config.data)
    options: Options = {
        "top_k": list(config.top_k),
        "users_per_batch": config.users_per_batch,
        "popularity": config.popularity,
        "recall": config.recall,
        "staleness": config.staleness,
        "progress": config.progress,
    }
    with cpu_settings(config.num_threads):
        model = load_model(config.model, resolve_device(config.device))
        exclude_seen = model.data.exclude_seen if config.exclude_seen is None else config.exclude_seen
        options["exclude_seen"] = exclude_seen
        if isinstance(model, HistoryModel):
            result, codec = evaluate_model(model, log, config.split, **options), NO_STORE
        else:
            assert isinstance(model, VistaModel)
            with Scorer.open(model, config.store, key=read_key(config.authentication_key_file)) as scorer:
                result = evaluate_scorer(scorer, log, config.split, **options)
                codec = scorer.store.manifest.codec
    if config.out is not None:
        asked = {name: getattr(config, name) for name in ("data", "model", "split", "top_k", "staleness")}
        asked |= {"exclude_seen": exclude_seen}
        replace_text(Path(config.out), json.dumps(asked | {"codec": codec} | result.to_dict(), indent=2) + "\n")
    return result


class Options(TypedDict, total=False):
    """How a model is measured."""

    exclude_seen: bool
    """Leave items of the visible history out of the ranking, but never the label; by default as the model's own
    `data.exclude_seen` says."""
    top_k: list[int]
    """Cut-offs, [10] by default; the first is the length of the popularity report's lists."""
    users_per_batch: int
    """Users ranked in one pass, 512 by default."""
    popularity: bool
    """Also report how far the retrieval head's lists follow training popularity."""
    recall: bool
    """Also report what the stored summaries remember (`vista.evaluation.recall`)."""
    staleness: int
    """Newest events of each user that the split shows and the store's summaries lack, 0 by default."""
    progress: bool


def _completed(model: RankingModel, options: Options) -> Options:
    """With the defaults of what is not given."""
    usual: Options = {"top_k": [10], "users_per_batch": 512, "staleness": 0, "exclude_seen": model.data.exclude_seen}
    return {**usual, "popularity": False, "recall": False, "progress": False, **options}


def evaluate_scorer(scorer: Scorer, log: EventLog, part: str, **options: Unpack[Options]) -> Evaluation:
    """Measure a scorer on the `part` ("test" or "validation") of its model's split of `log`.

    Raises:
        LeakageError, ConfigError: as `evaluate`.
    """
    options = _completed(scorer.model, options)
    _check(scorer.model, log, part, options)
    _check_store(scorer, part, options["staleness"])
    items = scorer.item_vectors()[1] if scorer.model.has_retrieval else np.zeros((0, 0), np.float32)
    found = _measure(
        scorer.model,
        log,
        part,
        lambda cases: _next_scores(scorer, log, cases, items),
        lambda cases: _impression_probabilities(scorer, log, cases, options),
        options,
    )
    if not options["recall"]:
        return found
    recall = measure_recall(scorer, log)
    return replace(found, metrics=found.metrics | recall.metrics(), recall=recall)


def evaluate_model(model: HistoryModel, log: EventLog, part: str, **options: Unpack[Options]) -> Evaluation:
    """Measure a baseline on the `part` of its split of `log`: it reads the raw history right up to each label.

    Raises:
        ConfigError: if there is nothing to measure.
    """
    options = _completed(model, options)
    _check(model, log, part, options)
    answers = RawHistoryAnswers(model, log, model.rows_of(log.items))
    probabilities = partial(answers.probabilities, progress=options["progress"])
    return _measure(model, log, part, answers.next_scores, probabilities, options)


def _check(model: RankingModel, log: EventLog, part: str, options: Options) -> None:
    if part not in PARTS:
        raise ConfigError(f"split={part}: write {' or '.join(PARTS)}")
    if options["popularity"] and not model.has_retrieval:
        raise ConfigError("popularity=true: this model's retrieval head was not trained; set popularity=false")
    if options["recall"] and not (isinstance(model, VistaModel) and model.decoder is not None):
        raise ConfigError("recall=true: this model has no summaries; set recall=false")
    check_log(model, log)


def _measure(
    model: RankingModel,
    log: EventLog,
    part: str,
    next_scores: Callable[[NextItemCases], Floats],
    impression_probabilities: Callable[[ImpressionCases], Floats],
    options: Options,
) -> Evaluation:
    """The protocol's questions, put to whoever answers."""
    began = time.perf_counter()
    until = split_until(model.data, part)
    metrics: dict[str, float] = {}
    ranks = impressions = probabilities = report = None
    top_k = options["top_k"]
    num_cases = 0
    if model.has_retrieval:
        columns = model.rows_of(log.items) - 1
        stop = visible_counts(log, split_until(model.data, "test")) if part == "validation" else None
        cases = next_item_cases(log, visible_counts(log, until), stop)
        lists = Recommendations(len(model.items), top_k[0]) if options["popularity"] else None
        ranks = rank_next_items(
            log,
            cases,
            columns,
            next_scores,
            exclude_seen=options["exclude_seen"],
            users_per_batch=options["users_per_batch"],
            progress=options["progress"],
            observe=lists.add if lists is not None else None,
        )
        metrics |= ranking_metrics(ranks, top_k)
        if lists is not None:
            report = _popularity(model, log, columns, lists, ranks, columns[cases.item])
            metrics |= report.metrics()
        num_cases += len(ranks)
    if log.impressions is not None and model.schema.tasks and until.before is not None:
        end = split_until(model.data, "test").before if part == "validation" else None
        impressions = with_tasks(impression_cases(log, until.before, end), model.schema.tasks)
        probabilities = impression_probabilities(impressions)
        metrics |= impression_metrics(impressions, probabilities)
        num_cases += len(impressions.user)
    if num_cases == 0:
        raise ConfigError(
            f"{log.path} has no {part} case for this model: no label after {until}, and no impression of its tasks"
        )
    return Evaluation(metrics, num_cases, time.perf_counter() - began, ranks, impressions, probabilities, report)


def _popularity(
    model: RankingModel, log: EventLog, columns: Int, lists: Recommendations, ranks: Int, label: Int
) -> PopularityReport:
    """The report over the model's items; columns int64 [log.num_items] of the log's items, -1 unknown to the model."""
    events = item_counts(log, visible_counts(log, split_until(model.data, "train")))
    counts = np.zeros(len(model.items), np.int64)
    np.add.at(counts, columns[columns >= 0], events[columns >= 0])
    norms = model.catalogue_vectors().detach().float().norm(dim=1).cpu().numpy()
    return popularity_report(counts, lists, ranks, label, norms)


def _check_store(scorer: Scorer, part: str, staleness: int) -> None:
    """A store refreshed further than the split allows has seen labels; one of another age answers another question."""
    stored, limit = parse_until(scorer.store.manifest.until), split_until(scorer.model.data, part)
    asked = replace(limit, held_out=limit.held_out + staleness)
    if stored == asked:
        return
    labels = f"the {part} labels of this model begin after until={limit}"
    remedy = f"run `vista refresh until={asked}` into a store of its own"
    leaks = stored.held_out < limit.held_out
    if limit.before is not None:
        leaks = stored.before is None or stored.before > limit.before
    if leaks:
        raise LeakageError(
            f"{scorer.store.path} was refreshed with until={stored}, but {labels}: its records have seen them; {remedy}"
        )
    age = f", and staleness={staleness} asks for until={asked}" if staleness else ""
    raise ConfigError(f"store={scorer.store.path}: was refreshed with until={stored}, but {labels}{age}; {remedy}")


def _fresh_tail(scorer: Scorer, log: EventLog, user: Int, seen: Int, label_time: Int | None) -> Tail | None:
    """The newest events before each label that its record has not seen, ids as in the log; None where there are none.

    Args:
        user: int64 [n] rows of the log; seen: int64 [n] events before the label.
        label_time: int64 [n] of the labels of a split in time, else None.

    Raises:
        LeakageError: a record has seen a label: by event_count for leave-last-out (equal times are common), else by
            time too.
    """
    ids = log.users.ids(user)
    stored = scorer.store.get_many(ids)
    late = stored.event_count > seen
    if label_time is not None:
        late |= stored.last_event_ts >= label_time
    late &= stored.found
    if late.any():
        first = int(np.flatnonzero(late)[0])
        raise LeakageError(
            f"user {ids.tolist()[first]!r}: the record in {scorer.store.path} has seen "
            f"{stored.event_count[first]} events, only {seen[first]} lie before the label; refresh the store with the "
            "`until` of this split, from this log"
        )
    start = np.maximum(stored.event_count, seen - scorer.model.config.tail_len)
    if (start >= seen).all():
        return None
    events = log.gather_ranges(user, np.minimum(start, seen), seen)
    return Tail(log.items.ids(events.item), np.asarray(events.timestamp), np.asarray(events.action), events.offsets)


def _next_scores(scorer: Scorer, log: EventLog, cases: NextItemCases, items: Floats) -> Floats:
    # What was refreshed lies in the store; what came since is the caller's to bring (none for leave-last-out).
    tail = _fresh_tail(scorer, log, cases.user, cases.seen, None)
    label = log.gather_ranges(cases.user, cases.seen, cases.seen + 1)
    now = np.asarray(label.timestamp) if log.has_time else None
    users = scorer.user_vectors(log.users.ids(cases.user), tail=tail, now=now)
    scores: Floats = users @ items.T
    return scores


def _impression_probabilities(scorer: Scorer, log: EventLog, cases: ImpressionCases, options: Options) -> Floats:
    out = np.zeros(cases.label.shape, np.float32)
    requests_per_batch, quiet = options["users_per_batch"], not options["progress"]
    starts = request_starts(cases)
    stops = np.append(starts, len(cases.user))
    batches = range(0, len(starts), requests_per_batch)
    for low in tqdm(batches, desc="impressions", unit="batch", disable=quiet, leave=False):
        first = starts[low : low + requests_per_batch]
        offsets = stops[low : low + len(first) + 1]
        shown = slice(offsets[0], offsets[-1])
        user, now = cases.user[first], cases.timestamp[first]
        predicted = scorer.predict(
            log.users.ids(user),
            (log.items.ids(cases.item[shown]), offsets - offsets[0]),
            tail=_fresh_tail(scorer, log, user, cases.seen[first], now),
            now=now,
        )
        for index, task in enumerate(cases.tasks):
            out[shown, index] = predicted[task]
    return out
