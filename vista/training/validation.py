"""Validation during training: the protocol's cases, answered by the model with float32 summaries and no store."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import TrainConfig
from vista.counters.counter_spec import CounterSpec
from vista.errors import NonFiniteLossError
from vista.evaluation.baseline_evaluation import scores_in_columns
from vista.evaluation.baselines.all_baselines import counting_baselines
from vista.evaluation.cases import (
    ImpressionCases,
    NextItemCases,
    case_requests,
    impression_cases,
    next_item_cases,
    with_tasks,
)
from vista.evaluation.protocol import (
    EVENTS_PER_BATCH,
    case_batches,
    impression_metrics,
    rank_next_items,
    ranking_metrics,
)
from vista.evaluation.raw_history import RawHistoryAnswers
from vista.examples.batch_source import trained_tasks
from vista.examples.history_counters import CounterRequests, HistoryCounters
from vista.log.event_log import EventLog
from vista.log.histories import Histories, token_groups
from vista.log.repeats import leaves_out_seen
from vista.log.splits import part_counts, part_times
from vista.model import inference
from vista.model.baselines.history_model import HistoryModel
from vista.model.padded_tail import PaddedTail, pad_tail
from vista.model.ranking_model import RankingModel
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel

Floats = NDArray[np.float32]
CASES_PER_BATCH = 512

_ContextOf = Callable[[Int, PaddedTail], TargetContext]
"""(rows of users int64 [B], their tails) -> their contexts."""


class Validation:
    """Validation metrics of a model. The cases are chosen once."""

    def __init__(
        self, log: EventLog, item_rows: Int, config: TrainConfig, *, events_per_batch: int = EVENTS_PER_BATCH
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            events_per_batch: most events of histories that are read at once (a longer history is read alone).
        """
        self._log, self._item_rows, self._events_per_batch = log, item_rows, events_per_batch
        self._exclude_seen = leaves_out_seen(log, config.data)
        optim, limit = config.optim, config.optim.validation_users
        self._cut, stop = part_counts(log, config.data, "validation")
        begin, end = part_times(config.data, "validation")
        self._impressions: ImpressionCases | None = None
        self._next: NextItemCases | None = None
        if (tasks := trained_tasks(log, optim)) and begin is not None:
            shown = with_tasks(impression_cases(log, begin, end, max_cases=limit * 4), tasks)
            self._impressions = shown if len(shown.user) else None
        if config.ranks_items:
            cases = next_item_cases(log, self._cut, stop, max_users=limit)
            self._next = cases if len(cases.user) else None
        self.metric = self._deciding_metric()
        """The metric that decides which model is best: NE of the first task with labels of both kinds (smaller is
        better), else NDCG@10; empty if the log has no cases."""

    def _deciding_metric(self) -> str:
        if (cases := self._impressions) is not None:
            for index, task in enumerate(cases.tasks):
                if len(np.unique(cases.label[cases.mask[:, index], index])) == 2:
                    return f"ne/{task}"
        return "ndcg@10" if self._next is not None else ""

    def better(self, value: float, best: float | None) -> bool:
        """Whether a value of `metric` is better than the best so far; None means that there is no best yet."""
        if best is None:
            return True
        return value < best if self.metric != "ndcg@10" else value > best

    def baselines(self) -> dict[str, dict[str, float]]:
        """Metrics of the counting baselines on the next-item cases, by name; empty if there are no such cases."""
        if self._next is None:
            return {}
        chosen = counting_baselines(
            has_time=self._log.has_time,
            horizon_events=1,
            returns=not self._exclude_seen,
        )
        measured = {}
        for baseline in chosen:
            baseline.fit(self._log, self._cut, np.random.default_rng(0))
            score = partial(scores_in_columns, baseline, self._item_rows - 1)
            measured[baseline.name] = self._ranking_metrics(self._next, score)
        return measured

    def _ranking_metrics(
        self, cases: NextItemCases, score: Callable[[NextItemCases], NDArray[np.floating[Any]]]
    ) -> dict[str, float]:
        batches = case_batches(cases, self._log.num_items, CASES_PER_BATCH, self._events_per_batch)
        columns = self._item_rows - 1
        ranks = rank_next_items(self._log, cases, columns, score, batches, exclude_seen=self._exclude_seen)
        return ranking_metrics(ranks, [10])

    def __call__(self, model: RankingModel) -> dict[str, float]:
        """All metrics of the validation split."""
        was_training = model.training
        model.eval()
        next_scores, probabilities = self._answers(model)
        metrics: dict[str, float] = {}
        if self._next is not None:
            metrics |= self._ranking_metrics(self._next, lambda cases: self._finite(next_scores(cases), cases.user))
        if self._impressions is not None:
            predicted = self._finite(probabilities(self._impressions), self._impressions.user)
            metrics |= impression_metrics(self._impressions, predicted)
        model.train(was_training)
        return metrics

    def _answers(
        self, model: RankingModel
    ) -> tuple[Callable[[NextItemCases], Floats], Callable[[ImpressionCases], Floats]]:
        if isinstance(model, HistoryModel):
            answers = RawHistoryAnswers(model, self._log, self._item_rows)
            return answers.catalog_scores, answers.probabilities
        assert isinstance(model, VistaModel)
        users = np.unique(
            np.concatenate([cases.user for cases in (self._next, self._impressions) if cases is not None])
        )
        summaries = self._summaries(model, users)

        def context(user: Int, tail: PaddedTail) -> TargetContext:
            own = torch.from_numpy(np.searchsorted(users, user)).to(model.device)
            return inference.request_context(model, summaries[own], tail)

        items = inference.item_vectors(model) if self._next is not None else None
        return partial(self._scores, model, context, items), partial(self._probabilities, model, context)

    def _summaries(self, model: VistaModel, users: Int) -> torch.Tensor:
        """Summaries of many users, computed for a few at a time because histories may be long."""
        groups = [users[part] for part in token_groups(self._cut[users], self._events_per_batch)]
        histories = (self._model_rows(self._log.gather(group, self._cut[group])) for group in groups)
        return torch.cat([inference.summarize(model, each) for each in histories])

    def _model_rows(self, histories: Histories) -> Histories:
        return dataclasses.replace(histories, item=self._item_rows[histories.item].astype(np.int32))

    def _tail(self, model: VistaModel, users: Int, seen: Int) -> PaddedTail:
        tail = self._log.gather_ranges(users, seen - model.config.tail_len, seen)
        return pad_tail(
            model, self._item_rows[tail.item], np.asarray(tail.timestamp), np.asarray(tail.action), tail.offsets
        )

    def _scores(
        self, model: VistaModel, context: _ContextOf, items: torch.Tensor | None, cases: NextItemCases
    ) -> Floats:
        assert items is not None  # there are such cases
        tail = self._tail(model, cases.user, cases.seen)
        gap = inference.request_gap(model, cases.now, tail)
        users = inference.user_vectors(model, context(cases.user, tail), gap)
        counters = None
        if model.counter_spec is not None:
            histories, requests = self._requests(model, model.counter_spec, cases.user, cases.seen, cases.now)
            counters = histories.at(requests)
        scores: Floats = inference.catalog_scores(model, users, items, counters).float().cpu().numpy()
        return scores

    def _requests(
        self, model: VistaModel, spec: CounterSpec, user: Int, seen: Int, now: Int | None
    ) -> tuple[HistoryCounters, CounterRequests]:
        """Requests for counters of the events before the validation part, and of the tail."""
        covered, tail_len = self._cut[user], model.config.tail_len
        return case_requests(spec, self._log, self._item_rows, user, seen, now, covered=covered, tail_len=tail_len)

    def _probabilities(self, model: VistaModel, context: _ContextOf, cases: ImpressionCases) -> Floats:
        out = np.zeros(cases.label.shape, np.float32)
        for low in range(0, len(cases.user), CASES_PER_BATCH):
            part = slice(low, low + CASES_PER_BATCH)
            tail = self._tail(model, cases.user[part], cases.seen[part])
            gap = inference.request_gap(model, cases.timestamp[part], tail)
            candidates = torch.from_numpy(self._item_rows[cases.item[part], None]).to(model.device)
            codes = None
            if model.counter_spec is not None:
                histories, requests = self._requests(
                    model, model.counter_spec, cases.user[part], cases.seen[part], cases.timestamp[part]
                )
                of_items = histories.of_items(requests, self._item_rows[cases.item[part]])
                codes = torch.from_numpy(of_items[:, None]).to(model.device)
            logits = inference.candidate_logits(model, context(cases.user[part], tail), gap, candidates, codes)
            out[part] = logits[:, 0].sigmoid().float().cpu().numpy()
        return out

    def _finite(self, scores: Floats, users: Int) -> Floats:
        bad = users[~np.isfinite(scores).all(axis=1)]
        if len(bad):
            named = self._log.users.ids(np.unique(bad)[:20]).tolist()
            raise NonFiniteLossError(
                f"validation: the scores of users {named} are not finite; lower optim.learning_rate, or look at the "
                "features of these users"
            )
        return scores
