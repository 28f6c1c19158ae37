"""Validation during training: the protocol's questions, answered by the model with float32 summaries, without a store."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from vista.config import TrainConfig
from vista.data.event_log import EventLog
from vista.data.histories import Histories
from vista.data.splits import parse_time, split_until, visible_counts
from vista.model import inference
from vista.model.recommender import Recommender
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
CASES_PER_BATCH = 512


class Validation:
    """Validation metrics of a model; the cases are chosen once."""

    def __init__(self, log: EventLog, item_rows: Int, config: TrainConfig) -> None:
        self._log, self._item_rows = log, item_rows
        self._cut = visible_counts(log, split_until(config.data, "validation"))
        self._impressions: ImpressionCases | None = None
        self._next: NextItemCases | None = None
        data, limit = config.data, config.optim.validation_users
        if log.impressions is not None and data.validation_from is not None:
            end = None if data.test_from is None else parse_time(data.test_from)
            self._impressions = impression_cases(log, parse_time(data.validation_from), end, max_cases=limit * 4)
        if config.optim.next_weight > 0:
            self._next = next_item_cases(log, self._cut, max_users=limit)
        self.metric = f"ne/{self._impressions.tasks[0]}" if self._impressions is not None else "ndcg@10"
        """What decides which model is best: NE of the first task (smaller is better), or NDCG@10."""

    def better(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value < best if self.metric.startswith("ne/") else value > best

    def __call__(self, model: Recommender) -> dict[str, float]:
        """All metrics of the validation split."""
        was_training = model.training
        model.eval()
        metrics: dict[str, float] = {}
        if self._next is not None:
            columns = self._item_rows - 1
            ranks = rank_next_items(
                self._log,
                self._next,
                columns,
                lambda cases: self._scores(model, cases),
                exclude_seen=True,
                users_per_batch=CASES_PER_BATCH,
                progress=False,
            )
            metrics |= ranking_metrics(ranks, [10])
        if self._impressions is not None:
            metrics |= impression_metrics(self._impressions, self._probabilities(model, self._impressions))
        model.train(was_training)
        return metrics

    def _summaries(self, model: Recommender, users: Int) -> torch.Tensor:
        return inference.summarize(model, self._model_rows(self._log.gather(users, self._cut[users])))

    def _model_rows(self, histories: Histories) -> Histories:
        return dataclasses.replace(histories, item=self._item_rows[histories.item])

    def _tail(self, model: Recommender, users: Int, seen: Int) -> inference.PaddedTail:
        tail = self._log.gather_ranges(users, seen - model.config.tail_len, seen)
        return inference.pad_tail(
            model, self._item_rows[tail.item], np.asarray(tail.timestamp), np.asarray(tail.action), tail.offsets
        )

    def _scores(self, model: Recommender, cases: NextItemCases) -> NDArray[np.float32]:
        tail = self._tail(model, cases.user, cases.seen)
        label = self._log.gather_ranges(cases.user, cases.seen, cases.seen + 1)
        context = inference.request_context(model, self._summaries(model, cases.user), tail)
        now = np.asarray(label.timestamp) if self._log.has_time else None
        users = inference.user_vectors(model, context, inference.request_gap(model, now, tail))
        scores: NDArray[np.float32] = (users @ inference.item_vectors(model).t()).float().cpu().numpy()
        return scores

    def _probabilities(self, model: Recommender, cases: ImpressionCases) -> NDArray[np.float32]:
        users, row = np.unique(cases.user, return_inverse=True)
        summaries = torch.cat(
            [self._summaries(model, users[low : low + CASES_PER_BATCH]) for low in range(0, len(users), CASES_PER_BATCH)]
        )
        out = np.zeros(cases.label.shape, np.float32)
        for low in range(0, len(cases.user), CASES_PER_BATCH):
            part = slice(low, low + CASES_PER_BATCH)
            tail = self._tail(model, cases.user[part], cases.seen[part])
            context = inference.request_context(model, summaries[torch.from_numpy(row[part])], tail)
            gap = inference.request_gap(model, cases.timestamp[part], tail)
            candidates = torch.from_numpy(self._item_rows[cases.item[part], None]).to(model.device)
            logits = inference.candidate_logits(model, context, gap, candidates)
            out[part] = logits[:, 0].sigmoid().float().cpu().numpy()
        return out
