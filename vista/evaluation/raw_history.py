"""The protocol's cases, answered by a baseline from the raw history before each label.

Letters: N cases, B requests, V items of the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch

from vista.arrays import Float32s, Int
from vista.evaluation.cases import ImpressionCases, NextItemCases, case_requests, request_starts
from vista.evaluation.window_cases import WindowCases
from vista.log.event_log import EventLog
from vista.log.histories import Histories, token_groups
from vista.model.baselines.history_model import HistoryModel
from vista.model.inference import catalog_scores, item_vectors
from vista.model.log_users import LogUsers
from vista.model.row_feature_reader import log_encoder
from vista.progress_bar import progress_bar


class RawHistoryAnswers:
    """A baseline, and the log that it reads at every request."""

    def __init__(self, model: HistoryModel, log: EventLog, item_rows: Int, *, events_per_batch: int = 1 << 16) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items.
            events_per_batch: events that the model embeds at once (a longer history is embedded alone).
        """
        self._model, self._log, self._item_rows = model, log, item_rows
        self._events_per_batch = events_per_batch
        self._items = item_vectors(model) if model.has_retrieval else None
        self._encode_requests = log_encoder(model.request_features, log.request_features)
        self._recode = model.event_recoder(log.event_features)
        self._log_users = LogUsers(model.user_features, log)

    def catalog_scores(self, cases: NextItemCases | WindowCases) -> Float32s:
        """Scores float32 [N, V] of all items for the users of some cases, at the times of the questions."""
        user, seen, now = cases.user, cases.seen, cases.now
        users = [
            self._model.user_vectors(
                self.histories(user[part], seen[part]),
                None if now is None else now[part],
                self._log_users.encoded(user[part]),
            )
            for part in self._groups(seen, np.ones_like(seen))
        ]
        assert self._items is not None
        counters, keys = None, self._model.item_keys
        if keys is not None:
            histories, requests = case_requests(keys, self._log, self._item_rows, user, seen, now)
            counters = histories.at(requests)
        scores: Float32s = catalog_scores(self._model, torch.cat(users), self._items, counters).float().cpu().numpy()
        return scores

    def probabilities(self, cases: ImpressionCases, *, progress: bool = False) -> Float32s:
        """float32 [N, len(cases.tasks)]; the impressions of one user at one time share the history."""
        out = np.zeros(cases.label.shape, np.float32)
        # By name: the log may have the model's tasks in another order, and not all of them.
        columns = [self._model.schema.tasks.index(task) for task in cases.tasks]
        starts = request_starts(cases)
        requests = [slice(low, high) for low, high in pairwise([*starts.tolist(), len(cases.user)])]
        num_shown = np.diff(np.append(starts, len(cases.user)))
        groups = list(self._groups(cases.seen[starts], num_shown))
        for group in progress_bar(groups, desc="impressions", unit="batch", shown=progress, leave=False):
            parts = requests[group]
            first = starts[group]
            width = max(part.stop - part.start for part in parts)
            index = np.minimum(first[:, None] + np.arange(width), len(cases.user) - 1)
            candidates = torch.from_numpy(self._item_rows[cases.item[index]]).to(self._model.device)
            histories = self.histories(cases.user[first], cases.seen[first])
            features = self._encode_requests(cases.features.select(index.ravel()), index.size)
            features = None if features is None else features.reshape(*index.shape)
            logits = self._model.candidate_logits(
                histories,
                candidates,
                cases.timestamp[first],
                self._candidate_codes(cases, index),
                features,
                self._log_users.encoded(cases.user[first]),
            )
            predicted = logits[..., columns].sigmoid().float().cpu().numpy()
            for row, part in enumerate(parts):
                out[part] = predicted[row, : part.stop - part.start]
        return out

    def _candidate_codes(self, cases: ImpressionCases, index: Int) -> torch.Tensor | None:
        """Codes uint8 [B, C, G * F + 1] of the items of the cases int64 [B, C]; None for a model without counters."""
        own, keys = index.ravel(), self._model.item_keys
        if keys is None:
            return None
        histories, requests = case_requests(
            keys, self._log, self._item_rows, cases.user[own], cases.seen[own], cases.timestamp[own]
        )
        codes = histories.of_items(requests, self._item_rows[cases.item[own]])
        return torch.from_numpy(codes.reshape(*index.shape, -1)).to(self._model.device)

    def histories(self, user: Int, seen: Int) -> Histories:
        """What the model reads of the first `seen` events int64 [B] of users int64 [B] (rows of the log)."""
        limit = self._model.config.history_limit
        events = self._log.gather_ranges(user, np.maximum(seen - limit, 0) if limit else seen * 0, seen)
        features = self._recode(events.features, events.num_events)
        return dataclasses.replace(events, item=self._item_rows[events.item].astype(np.int32), features=features)

    def _groups(self, seen: Int, num_shown: Int) -> Iterator[slice]:
        """Requests with about `events_per_batch` events and candidates together; num_shown: candidates of each."""
        limit = self._model.config.history_limit
        return token_groups((np.minimum(seen, limit) if limit else seen) + num_shown, self._events_per_batch)
