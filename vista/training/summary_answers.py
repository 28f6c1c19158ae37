"""The protocol's cases, answered by VISTA with float32 summaries and no store.

Letters: N cases, V items of the model.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from vista.arrays import Float32s, Int
from vista.counters.counter_codes import ItemKeys
from vista.evaluation.cases import ImpressionCases, NextItemCases, WindowCases, case_requests
from vista.examples.chunks import CounterRequests, HistoryCounters
from vista.log.event_log import EventLog
from vista.log.histories import Histories, rows_that_fit, token_groups
from vista.log.splits import READ_EVENT_BYTES
from vista.model import inference
from vista.model.features import log_encoder
from vista.model.inference import LogUsers, PaddedTail, pad_tail
from vista.model.target_attention import TargetContext
from vista.model.vista_model import VistaModel

CASES_PER_BATCH = 512


class SummaryAnswers:
    """A model, and summaries of the leading events of some users."""

    def __init__(
        self, model: VistaModel, log: EventLog, item_rows: Int, users: Int, covered: Int, events_per_batch: int
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            users: int64 sorted rows of the log, those of all cases.
            covered: int64 [num_users] events that summaries cover.
            events_per_batch: most events that are summarized at once (a longer history is summarized alone); fewer of
                events with features.
        """
        self._model, self._log, self._item_rows = model, log, item_rows
        self._history_rows = model.history_rows(item_rows)
        self._users, self._covered = users, covered
        self._recode = model.event_recoder(log.event_features)
        most = rows_that_fit(events_per_batch, READ_EVENT_BYTES, len(log.event_features))
        groups = [users[part] for part in token_groups(covered[users], most)]
        histories = (self._model_rows(log.gather(group, covered[group])) for group in groups)
        self._summaries = torch.cat([inference.summarize(model, each) for each in histories])
        self._items = inference.item_vectors(model) if model.has_retrieval else None
        self._encode_requests = log_encoder(model.request_features, log.request_features)
        self._log_users = LogUsers(model.user_features, log)

    def catalog_scores(self, cases: NextItemCases | WindowCases) -> Float32s:
        """Scores float32 [N, V] of all items for the users of some cases, at the times of the questions."""
        assert self._items is not None
        model, tail = self._model, self._tail(cases.user, cases.seen)
        gap = inference.request_gap(model, cases.now, tail)
        users = inference.user_vectors(model, self._context(cases.user, tail), gap)
        counters = None
        if model.item_keys is not None:
            histories, requests = self._requests(model.item_keys, cases.user, cases.seen, cases.now)
            counters = histories.at(requests)
        scores: Float32s = inference.catalog_scores(model, users, self._items, counters).float().cpu().numpy()
        return scores

    def probabilities(self, cases: ImpressionCases) -> Float32s:
        """float32 [N, num_tasks]."""
        model, out = self._model, np.zeros(cases.label.shape, np.float32)
        for low in range(0, len(cases.user), CASES_PER_BATCH):
            part = slice(low, low + CASES_PER_BATCH)
            user, seen, time, item = cases.user[part], cases.seen[part], cases.timestamp[part], cases.item[part]
            tail, codes = self._tail(user, seen), None
            if model.item_keys is not None:
                histories, requests = self._requests(model.item_keys, user, seen, time)
                of_items = histories.of_items(requests, self._item_rows[item])
                codes = torch.from_numpy(of_items[:, None]).to(model.device)
            candidates = torch.from_numpy(self._item_rows[item, None]).to(model.device)
            features = self._encode_requests(cases.features.select(part), len(user))
            asked = inference.request_vectors(model, time, tail, features)
            logits = inference.candidate_logits(model, self._context(user, tail), asked, candidates, codes)
            out[part] = logits[:, 0].sigmoid().float().cpu().numpy()
        return out

    def _context(self, user: Int, tail: PaddedTail) -> TargetContext:
        own = torch.from_numpy(np.searchsorted(self._users, user)).to(self._model.device)
        # A store has no record of a user without covered events, so the scorer does not know the user's features.
        users = self._log_users.encoded(np.where(self._covered[user] > 0, user, -1))
        return inference.request_context(self._model, self._summaries[own], tail, users=users)

    def _tail(self, user: Int, seen: Int) -> PaddedTail:
        tail = self._model_rows(self._log.gather_ranges(user, seen - self._model.config.tail_len, seen))
        return pad_tail(
            self._model,
            tail.item,
            np.asarray(tail.timestamp),
            np.asarray(tail.action),
            tail.offsets,
            tail.features.columns,
        )

    def _requests(
        self, keys: ItemKeys, user: Int, seen: Int, now: Int | None
    ) -> tuple[HistoryCounters, CounterRequests]:
        """Requests for counters of the events that summaries cover, and of the tail."""
        covered, tail_len = self._covered[user], self._model.config.tail_len
        return case_requests(keys, self._log, self._history_rows, user, seen, now, covered=covered, tail_len=tail_len)

    def _model_rows(self, histories: Histories) -> Histories:
        features = self._recode(histories.features, histories.num_events)
        item = self._history_rows[histories.item].astype(np.int32)
        return dataclasses.replace(histories, item=item, features=features)
