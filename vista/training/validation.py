"""Validation during training: the protocol's cases, answered by the model with float32 summaries and no store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Int
from vista.config import EvaluateConfig, TrainConfig
from vista.errors import NonFiniteLossError
from vista.evaluation.answers import RawHistoryAnswers
from vista.evaluation.baseline_evaluation import counting_baselines, scores_in_columns
from vista.evaluation.cases import (
    ImpressionCases,
    NextItemCases,
    WindowCases,
    impression_cases,
    next_item_cases,
    window_cases,
    with_tasks,
)
from vista.evaluation.protocol import (
    WindowReport,
    case_batches,
    impression_metrics,
    rank_next_items,
    rank_windows,
    ranking_metrics,
    window_lengths,
    window_metric,
)
from vista.examples.batch_source import trained_tasks
from vista.log.event_log import EventLog
from vista.log.splits import EVENTS_PER_BLOCK, leaves_out_seen, part_counts, part_times, refresh_times
from vista.model.baselines.history_model import HistoryModel
from vista.model.ranking_model import RankingModel
from vista.model.vista_model import VistaModel
from vista.ranks import Ranks
from vista.training.summary_answers import SummaryAnswers

USERS_PER_BATCH = 512
logger = logging.getLogger(__name__)


class Validation:
    """Validation metrics of a model. The cases are chosen once. Several ranks each answer some of them."""

    def __init__(
        self,
        log: EventLog,
        item_rows: Int,
        config: TrainConfig,
        ranks: Ranks | None = None,
        *,
        events_per_batch: int = EVENTS_PER_BLOCK,
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            ranks: processes that measure together; None for a single process.
            events_per_batch: most events of histories that are read at once (a longer history is read alone).
        """
        self._log, self._item_rows, self._ranks, data = log, item_rows, ranks, config.data
        self._windows = EvaluateConfig(horizon_events=[data.horizon_events], horizon_days=data.horizon_days)
        ((self._length, _),) = window_lengths(self._windows).items()
        self._events_per_batch = events_per_batch
        self._exclude_seen = leaves_out_seen(log, config.data)
        optim, limit = config.optim, config.optim.validation_users
        self._cut, self._first, stop = part_counts(log, config.data, "validation")
        begin, end = part_times(config.data, "validation")
        self._impressions: ImpressionCases | None = None
        self._ranked: NextItemCases | WindowCases | None = None
        """What users are asked: the next item, or, in a run that trains windows only, the items of a window."""
        if (tasks := trained_tasks(log, optim)) and begin is not None:
            shown = with_tasks(impression_cases(log, begin, end, max_cases=limit * 4), tasks)
            self._impressions = shown if len(shown.user) else None
            last = int(shown.timestamp.max(initial=begin))
            self._refreshes = refresh_times(data, "validation", last + 1)
            """int64 [P] ms when summaries are refreshed."""
        if config.ranks_items:
            if config.next_weight == 0:
                self._ranked = self._window_cases(stop, begin, limit)
            if self._ranked is None:
                cases = next_item_cases(log, self._cut, self._first, stop, max_users=limit)
                self._ranked = cases if len(cases.user) else None
        self.ranking_metric = ""
        """NDCG@10 of the ranked items, by its name in `vista evaluate`; empty if the log has no such cases."""
        if self._ranked is not None:
            is_window = isinstance(self._ranked, WindowCases)
            self.ranking_metric = window_metric("ndcg@10", self._length) if is_window else "ndcg@10"
        self.metric = self._deciding_metric()
        """The metric that decides which model is best: NE of the first task with labels of both kinds (smaller is
        better), else `ranking_metric`; empty if the log has no cases."""

    @classmethod
    def of(cls, log: EventLog, item_rows: Int, config: TrainConfig, ranks: Ranks | None) -> Validation | None:
        """That of a run; None without validations, or if the log has no case."""
        if config.optim.validate_every == 0:
            return None
        validation = cls(log, item_rows, config, ranks)
        if not validation.metric:
            logger.warning("%s has no case to validate on: the last model will be exported, not the best", log)
            return None
        return validation

    def _window_cases(self, stop: Int, now: int | None, max_users: int) -> WindowCases | None:
        """The cases of `vista evaluate target=window split=validation` for the trained length; None without any."""
        least = {"min_seen": self._windows.min_seen, "min_after": self._windows.min_after}
        length = window_lengths(self._windows)[self._length]
        cases = window_cases(
            self._log, self._cut, stop, first=self._first, now=now, max_users=max_users, **least, **length
        )
        if len(cases.item):
            logger.info("validation asks %d users for the items of their next %s", len(cases), self._length)
            return cases
        logger.warning(
            "validation asks for next items, although only windows are trained: no user has %d events before the "
            "validation labels, %d of these, and one in the next %s; train with data=time or data=share, which hold "
            "out more than one event",
            *least.values(),
            self._length,
        )
        return None

    def _deciding_metric(self) -> str:
        if (cases := self._impressions) is not None:
            for index, task in enumerate(cases.tasks):
                if len(np.unique(cases.label[cases.mask[:, index], index])) == 2:
                    return f"ne/{task}"
        return self.ranking_metric

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of `metric` is better than the best so far; None means that there is no best yet."""
        if best is None:
            return True
        return value > best if self.metric == self.ranking_metric else value < best

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of the counting baselines on the same ranked items, by name; empty if there are no such cases."""
        if self._ranked is None:
            return {}
        is_window = isinstance(self._ranked, WindowCases)
        chosen = counting_baselines(
            has_time=self._log.has_time,
            horizon_events=self._windows.horizon_events[0] if is_window else 1,
            returns=is_window or not self._exclude_seen,
        )
        measured = {}
        for baseline in chosen:
            baseline.fit(self._log, self._cut, np.random.default_rng(0))
            score = partial(scores_in_columns, baseline, self._item_rows - 1)
            measured[baseline.name] = self._ranking_metrics(self._ranked, score)
        return measured

    def _ranking_metrics(
        self,
        cases: NextItemCases | WindowCases,
        score: Callable[[NextItemCases | WindowCases], NDArray[np.floating[Any]]],
    ) -> dict[str, float]:
        columns = self._item_rows - 1
        cases = cases.part(self._own_part(cases.seen + 1))
        batches = case_batches(cases, self._log.num_items, USERS_PER_BATCH, self._events_per_batch)
        if isinstance(cases, NextItemCases):
            ranks = rank_next_items(self._log, cases, columns, score, batches, exclude_seen=self._exclude_seen)
            return ranking_metrics(self._joined({"rank": ranks})["rank"], [10])
        measured = rank_windows(self._log, {self._length: cases}, columns, score, batches, [10])[self._length]
        report = WindowReport({self._length: self._joined(measured)})
        # NaN if no window has items of the kind.
        return {k: v for k, v in report.metrics().items() if k.startswith("ndcg@10") and not math.isnan(v)}

    def __call__(self, model: RankingModel) -> dict[str, float]:
        """All metrics of the validation split."""
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        users, shown = [], None
        if self._ranked is not None:
            users.append(self._ranked.user[self._own_part(self._ranked.seen + 1)])
        if self._impressions is not None:
            shown = self._impressions.part(self._own_part(np.ones_like(self._impressions.user)))
            users.append(shown.user)
        answers = self._answers(model, np.unique(np.concatenate(users)))

        def score(cases: NextItemCases | WindowCases) -> Float32s:
            assert answers is not None  # a rank without cases does not score
            return self._finite(answers.catalog_scores(cases), cases.user)

        if self._ranked is not None:
            metrics |= self._ranking_metrics(self._ranked, score)
        if self._impressions is not None and shown is not None:
            predicted = np.zeros(shown.label.shape, np.float32)
            if answers is not None:
                predicted = self._finite(self._probabilities(model, shown, answers), shown.user)
            metrics |= impression_metrics(self._impressions, self._joined({"predicted": predicted})["predicted"])
        model.train(was_training)
        return metrics

    def _probabilities(
        self, model: RankingModel, shown: ImpressionCases, first: RawHistoryAnswers | SummaryAnswers
    ) -> Float32s:
        """float32 [N, num_tasks] of impressions, from the last refresh before each; `first` answers as of the first."""
        if isinstance(first, RawHistoryAnswers) or len(self._refreshes) == 1:
            return first.probabilities(shown)
        out = np.zeros(shown.label.shape, np.float32)
        refresh = np.searchsorted(self._refreshes, shown.timestamp, side="right") - 1
        for index in np.unique(refresh).tolist():
            own = np.flatnonzero(refresh == index)
            cases = shown.part(own)
            covered = self._log.counts_before(int(self._refreshes[index]))
            answers = self._answers(model, np.unique(cases.user), covered)
            assert answers is not None
            out[own] = answers.probabilities(cases)
        return out

    def _answers(
        self, model: RankingModel, users: Int, covered: Int | None = None
    ) -> RawHistoryAnswers | SummaryAnswers | None:
        """None without users.

        Args:
            covered: int64 [num_users] events that summaries cover; None for those before the validation labels.
        """
        if not len(users):
            return None
        if isinstance(model, HistoryModel):
            return RawHistoryAnswers(model, self._log, self._item_rows)
        assert isinstance(model, VistaModel)
        covered = self._cut if covered is None else covered
        return SummaryAnswers(model, self._log, self._item_rows, users, covered, self._events_per_batch)

    def _own_part(self, work: Int) -> slice:
        """The cases that this process answers; `Ranks.part_of`."""
        return slice(0, len(work)) if self._ranks is None else self._ranks.part_of(work)

    def _joined(self, own: dict[str, Any]) -> dict[str, Any]:
        return own if self._ranks is None else self._ranks.of_all_cases(own)

    def _finite(self, scores: Float32s, users: Int) -> Float32s:
        bad = users[~np.isfinite(scores).all(axis=1)]
        if len(bad):
            named = self._log.users.ids(np.unique(bad)[:20]).tolist()
            raise NonFiniteLossError(
                f"validation: the scores of users {named} are not finite; lower optim.learning_rate, or look at the "
                "features of these users"
            )
        return scores
