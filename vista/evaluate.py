"""Quality as served: summaries and tails from the store, scores from the scorer, questions from the protocol."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.config import EvaluateConfig
from vista.data.event_log import EventLog
from vista.data.splits import Until, parse_time, parse_until, split_until, visible_counts
from vista.device import set_threads
from vista.errors import ConfigError, LeakageError
from vista.results import append_result, commit, hardware
from vista.scorer import NEXT_TASK, Scorer
from vista.store import Tail
from vista.training.protocol import (
    ImpressionCases,
    NextItemCases,
    impression_cases,
    impression_metrics,
    next_item_cases,
    rank_next_items,
    ranking_metrics,
)

Int = NDArray[np.int64]
Floats = NDArray[np.float32]
PARTS = ("test", "validation")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What was measured: metrics, and the cases behind them for reports."""

    metrics: dict[str, float]
    num_cases: int
    seconds: float
    ranks: Int | None
    impressions: ImpressionCases | None
    probabilities: Floats | None

    def __str__(self) -> str:
        lines = [f"{self.num_cases} cases in {self.seconds:.1f} s"]
        return "\n".join(lines + [f"  {name:<20} {value:.4f}" for name, value in self.metrics.items()])


def evaluate(config: EvaluateConfig) -> Evaluation:
    """`vista evaluate`: measure, print, and append a row to a table on wish.

    Raises:
        LeakageError: if a record has seen a label's event.
        ConfigError: if the store was not refreshed for this split.
    """
    if config.split not in PARTS:
        raise ConfigError(f"split={config.split}: write {' or '.join(PARTS)}")
    set_threads(config.num_threads)
    log = EventLog.open(config.data)
    with Scorer.open(config.model, config.store) as scorer:
        result = evaluate_scorer(
            scorer,
            log,
            config.split,
            exclude_seen=config.exclude_seen,
            top_k=list(config.top_k),
            users_per_batch=config.users_per_batch,
            progress=config.progress,
        )
    if config.results_dir is not None:
        row: dict[str, Any] = {
            "table": config.table,
            "data": Path(config.data).name,
            "model": config.model_name or Path(config.model).parent.name,
            "seed": config.seed,
            "metrics": result.metrics,
            "command": f"vista evaluate data={config.data} model={config.model} store={config.store} split={config.split}",
            "config": {"split": config.split, "exclude_seen": config.exclude_seen},
            "commit": commit(),
            "hardware": hardware(),
            "seconds": result.seconds,
        }
        append_result(Path(config.results_dir) / f"{config.table}.jsonl", row)
    return result


def evaluate_scorer(
    scorer: Scorer,
    log: EventLog,
    part: str,
    *,
    exclude_seen: bool = True,
    top_k: list[int] | None = None,
    users_per_batch: int = 512,
    progress: bool = False,
) -> Evaluation:
    """Measure a scorer on the `part` ("test" or "validation") of its model's split of `log`."""
    began = time.perf_counter()
    model = scorer.model
    until = split_until(model.data, part)
    _check_store(scorer, until, part)
    metrics: dict[str, float] = {}
    ranks = impressions = probabilities = None
    num_cases = 0
    if model.has_retrieval:
        columns = model.item_rows(log.items.ids(np.arange(log.num_items))) - 1
        cases = next_item_cases(log, visible_counts(log, until))
        _, items = scorer.item_vectors()
        ranks = rank_next_items(
            log,
            cases,
            columns,
            lambda batch: _next_scores(scorer, log, batch, items),
            exclude_seen=exclude_seen,
            users_per_batch=users_per_batch,
            progress=progress,
        )
        metrics |= ranking_metrics(ranks, top_k or [10])
        num_cases += len(ranks)
    if model.schema.tasks and until.before is not None:
        end = parse_time(model.data.test_from) if part == "validation" and model.data.test_from else None
        impressions = impression_cases(log, until.before, end)
        probabilities = _impression_probabilities(scorer, log, impressions, users_per_batch, progress)
        metrics |= impression_metrics(impressions, probabilities)
        num_cases += len(impressions.user)
    return Evaluation(metrics, num_cases, time.perf_counter() - began, ranks, impressions, probabilities)


def _check_store(scorer: Scorer, until: Until, part: str) -> None:
    """A store refreshed further than the split allows has seen labels; one refreshed less is another question."""
    seen = parse_until(scorer.store.manifest.until)
    if seen != until:
        raise LeakageError(
            f"{scorer.store.path} was refreshed with until={seen}, but the {part} labels of this model begin after "
            f"until={until}: run `vista refresh until={until}` into a store of its own"
        )


def _check_seen(scorer: Scorer, log: EventLog, users: Int, seen: Int, label_time: Int | None) -> None:
    """Refuse records that have seen a label: by event_count for leave-last-out (equal times are common), else by time."""
    stored = scorer.store.get_many(log.users.ids(users))
    late = stored.event_count > seen if label_time is None else stored.last_event_ts >= label_time
    late &= stored.found
    if late.any():
        user = log.users.ids(users[late][:1])[0]
        raise LeakageError(
            f"user {user!r}: the record in {scorer.store.path} has seen {stored.event_count[late][0]} events, its label is "
            "among them; refresh the store with the `until` of this split"
        )


def _next_scores(scorer: Scorer, log: EventLog, cases: NextItemCases, items: Floats) -> Floats:
    _check_seen(scorer, log, cases.user, cases.seen, None)
    label = log.gather_ranges(cases.user, cases.seen, cases.seen + 1)
    now = np.asarray(label.timestamp) if log.has_time else None
    # What was refreshed lies in the store; what came since is the caller's to bring (none for leave-last-out).
    tail = _fresh_tail(scorer, log, cases.user, cases.seen)
    users = scorer.user_vectors(log.users.ids(cases.user), tail=tail, now=now)
    scores: Floats = users @ items.T
    return scores


def _fresh_tail(scorer: Scorer, log: EventLog, user: Int, seen: Int) -> Tail | None:
    """The newest events before each label that the record has not seen, ids as in the log."""
    stored = scorer.store.get_many(log.users.ids(user))
    start = np.maximum(stored.event_count, seen - scorer.model.config.tail_len)
    if (start >= seen).all():
        return None
    events = log.gather_ranges(user, np.minimum(start, seen), seen)
    return Tail(log.items.ids(events.item), np.asarray(events.timestamp), np.asarray(events.action), events.offsets)


def _impression_probabilities(
    scorer: Scorer, log: EventLog, cases: ImpressionCases, users_per_batch: int, progress: bool
) -> Floats:
    out = np.zeros(cases.label.shape, np.float32)
    starts = range(0, len(cases.user), users_per_batch)
    for low in tqdm(starts, desc="impressions", unit="batch", disable=not progress, leave=False):
        part = slice(low, low + users_per_batch)
        user, seen = cases.user[part], cases.seen[part]
        _check_seen(scorer, log, user, seen, cases.timestamp[part])
        predicted = scorer.predict(
            log.users.ids(user),
            log.items.ids(cases.item[part])[:, None],
            tail=_fresh_tail(scorer, log, user, seen),
            now=cases.timestamp[part],
        )
        for index, task in enumerate(cases.tasks):
            if task != NEXT_TASK:
                out[part, index] = predicted[task][:, 0]
    return out
