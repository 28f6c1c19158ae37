"""Whether the summary helps: the quality with and without it, by the length of histories."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import EvaluateConfig
from vista.errors import ConfigError
from vista.evaluation.answers import ScorerAnswers
from vista.evaluation.cases import impression_cases, next_item_cases, with_tasks
from vista.evaluation.comparison import AucMeasure, Estimate, MeanMeasure, Measure
from vista.evaluation.evaluate import check_store
from vista.evaluation.protocol import USERS_PER_BATCH, case_batches, rank_next_items
from vista.explore.workspace import escaped
from vista.log.event_log import EventLog
from vista.log.splits import leaves_out_seen, part_counts, part_times
from vista.scorer import Scorer
from vista.scorer.serving_snapshot import Call

NUM_GROUPS = 4
MAX_CASES = 20_000
MAX_USERS = 2_000
TOP_K = 10


class EmptySummaryScorer(Scorer):
    """A scorer that answers every user with the summary of an empty history; the tail and the counters stay. Its model
    was trained with summaries, so a model that was trained without them can do better."""

    @contextmanager
    def _call(self, users: Any, tail: Any, now: Any, adapter: Any = None, *, by_record: bool = False) -> Iterator[Call]:
        with super()._call(users, tail, now, adapter) as call:
            empty = np.broadcast_to(call.snapshot.served.empty, call.request.summary.shape).copy()
            request = replace(call.request, summary=empty)
            yield replace(call, read=lambda: request)


@dataclass(frozen=True, slots=True)
class BenefitRow:
    """Quality for one group of users."""

    group: str
    """Such as "1,924 to 2,301 events"."""
    users: int
    cases: int
    with_summary: float
    """NaN if it cannot be measured, like `without` and `gain`."""
    without: float
    gain: Estimate
    """The first minus the second, with an interval over users."""
    num_positive: int | None = None
    """Of the cases, those with a positive label; None where cases have no labels of two classes."""

    @property
    def unmeasured(self) -> str | None:
        """Why an AUC cannot be measured; None if it can."""
        if self.num_positive == 0:
            return "none of the impressions has a positive label"
        return "all of the impressions have a positive label" if self.num_positive == self.cases else None

    def change(self) -> str:
        """From which value to which, and the verdict, in Markdown. Only of a row that could be measured."""
        value, half_width = self.gain.value, self.gain.half_width
        interval = f"± {half_width:.3f}" if math.isfinite(half_width) else "without an interval: too few users"
        if self.gain.standing in ("ahead", "behind"):
            verdict = f"**{abs(value):.3f} {'more' if value > 0 else 'less'}** ({interval})"
        else:
            verdict = f"no clear difference ({value:+z.3f} {interval})"
        return f"from {self.without:.3f} to {self.with_summary:.3f}: {verdict}"


@dataclass(frozen=True, slots=True)
class SummaryBenefit:
    """Quality by group of users, from short to long histories."""

    metric: str
    """Such as "AUC of click"."""
    rows: list[BenefitRow]

    def answer(self) -> str:
        """The result in two sentences, in Markdown."""
        first, last = self.rows[0], self.rows[-1]
        metric = escaped(self.metric)
        changes = [
            f"the summary changes the {metric} {row.change()}"
            if row.unmeasured is None
            else f"the {metric} cannot be measured: {row.unmeasured}"
            for row in (last, first)
        ]
        return (
            f"For the users with the longest histories ({last.group}), {changes[0]}. For those with the shortest "
            f"({first.group}), {changes[1]}."
        )

    def table(self) -> list[dict[str, Any]]:
        """One row per group as the page shows it."""
        return [
            {
                "group": row.group,
                "users": row.users,
                "without": row.without,
                "with": row.with_summary,
                "gain": round(row.gain.value, 3) + 0.0,  # no negative zero
                "±": row.gain.half_width,
            }
            for row in self.rows
        ]


def summary_benefit(scorer: Scorer, without: Scorer, log: EventLog) -> SummaryBenefit:
    """Held-out quality with the summaries and without, by the length of histories.

    It is measured on the test labels of the model's split, of at most MAX_CASES impressions or MAX_USERS users.

    Args:
        scorer: of a store that ends before the test labels.
        without: an `EmptySummaryScorer` of the same model and store.

    Raises:
        LeakageError, ConfigError: the store is not of this split, or there is nothing to measure.
    """
    model = scorer.model
    check_store(scorer, EvaluateConfig())
    begin, end = part_times(model.data, "test")
    if model.schema.tasks and begin is not None and log.impressions is not None:
        cases = with_tasks(impression_cases(log, begin, end, max_cases=MAX_CASES), model.schema.tasks[:1])
        known = cases.mask[:, 0]
        both = {
            name: ScorerAnswers(one, log, requests_per_batch=USERS_PER_BATCH).probabilities(cases)[known, 0]
            for name, one in (("with", scorer), ("without", without))
        }
        if known.any():
            task, user, label = model.schema.tasks[0], cases.user[known], cases.label[known, 0]

            def auc_of(own: Int) -> Measure:
                parts = {name: values[own] for name, values in both.items()}
                return AucMeasure(task, user[own], user[own], None, label[own], parts)

            return SummaryBenefit(f"AUC of {task}", _rows(log, user, auc_of, label))
    if not model.has_retrieval:
        raise ConfigError("the log has no test labels for this model; choose another split, or prepare impressions")
    questions = next_item_cases(log, *part_counts(log, model.data, "test"), max_users=MAX_USERS)
    if not len(questions):
        raise ConfigError("no user has a test label after the split; choose another split and train again")
    columns, exclude_seen = model.rows_of(log.items) - 1, leaves_out_seen(log, model.data)
    ranks = [
        rank_next_items(
            log,
            questions,
            columns,
            ScorerAnswers(one, log, requests_per_batch=USERS_PER_BATCH).catalog_scores,
            case_batches(questions, log.num_items, USERS_PER_BATCH),
            exclude_seen=exclude_seen,
        )
        for one in (scorer, without)
    ]
    hits = {name: (rank < TOP_K).astype(np.float64) for name, rank in zip(("with", "without"), ranks, strict=True)}

    def hit_rate_of(own: Int) -> Measure:
        user, parts = questions.user[own], {name: values[own] for name, values in hits.items()}
        return MeanMeasure(f"hit rate at {TOP_K}", f"hr@{TOP_K}", user, user, None, parts)

    return SummaryBenefit(f"hit rate at {TOP_K}", _rows(log, questions.user, hit_rate_of))


def _groups(log: EventLog, users: Int) -> Int:
    """The group of each case, so that each group has about as many users."""
    distinct = np.unique(users)
    lengths = log.lengths[distinct]
    order = np.argsort(lengths, kind="stable")
    group = np.empty(len(distinct), np.int64)
    group[order] = np.arange(len(distinct)) * min(NUM_GROUPS, len(distinct)) // len(distinct)
    return group[np.searchsorted(distinct, users)]


def _rows(
    log: EventLog, users: Int, measure_of: Callable[[Int], Measure], label: NDArray[np.floating] | None = None
) -> list[BenefitRow]:
    """A row per group of users.

    Args:
        users: of each case.
        measure_of: what "with" and "without" reach in the cases of some indices.
        label: of each case, 0 or 1; None if cases have no such label.
    """
    rows, groups = [], _groups(log, users)
    for group in np.unique(groups).tolist():
        own = np.flatnonzero(groups == group)
        lengths, measure = log.lengths[np.unique(users[own])], measure_of(own)
        values = {name: each.value for name, each in measure.estimates().items()}
        rows.append(
            BenefitRow(
                f"{int(lengths.min()):,} to {int(lengths.max()):,} events",
                len(lengths),
                len(own),
                values["with"],
                values["without"],
                measure.gains()["without"],
                None if label is None else int(label[own].sum()),
            )
        )
    return rows
