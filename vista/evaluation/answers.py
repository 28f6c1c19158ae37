"""The protocol's cases, answered by a scorer from its store and the events that came after each record.

Letters: N cases, V items of the model.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vista.arrays import Float32s, Int
from vista.config import RefreshOptions
from vista.config.checks import Codec
from vista.errors import LeakageError
from vista.evaluation.cases import ImpressionCases, NextItemCases, WindowCases, case_requests, request_starts
from vista.examples.item_statistics import NUM_RECENT, HistoryCounters
from vista.log.event_log import EventLog
from vista.log.histories import Histories, RowFeatures, token_groups
from vista.log.splits import Until, last_refresh
from vista.model.baselines.history_model import HistoryModel
from vista.model.features import log_encoder
from vista.model.history_states import GrowingStates
from vista.model.inference import LogUsers, catalog_scores, item_vectors
from vista.progress_bar import progress_bar
from vista.refresh import refresh
from vista.scorer import Scorer
from vista.store import Tail


class ScorerAnswers:
    """A scorer, and the log that its callers would take fresh events from."""

    def __init__(self, scorer: Scorer, log: EventLog, *, requests_per_batch: int) -> None:
        self._scorer, self._log, self._requests_per_batch = scorer, log, requests_per_batch

    def catalog_scores(self, cases: NextItemCases | WindowCases) -> Float32s:
        """Scores float32 [N, V] of all items for the users of some cases, at the times of the questions. Raises
        LeakageError if a record covers an event after the question."""
        # The store holds the events until the refresh; the caller brings newer ones (none with leave-last-out). A next
        # item may have the time of the event before it, so its time does not tell whether a record covers it.
        label_time = cases.now if isinstance(cases, WindowCases) else None
        tail = self._fresh_tail(cases.user, cases.seen, label_time)
        return self._scorer.catalog_scores(self._log.users.ids(cases.user), tail=tail, now=cases.now)

    def probabilities(self, cases: ImpressionCases) -> Float32s:
        """float32 [N, len(cases.tasks)]; the impressions of one user at one time are one request. Raises LeakageError
        if a record covers a label."""
        log, out = self._log, np.zeros(cases.label.shape, np.float32)
        starts = request_starts(cases)
        stops = np.append(starts, len(cases.user))
        batches = range(0, len(starts), self._requests_per_batch)
        for low in progress_bar(batches, desc="impressions", unit="batch", leave=False):
            first = starts[low : low + self._requests_per_batch]
            offsets = stops[low : low + len(first) + 1]
            shown = slice(offsets[0], offsets[-1])
            user, now = cases.user[first], cases.timestamp[first]
            predicted = self._scorer.predict(
                log.users.ids(user),
                (log.items.ids(cases.item[shown]), offsets - offsets[0]),
                tail=self._fresh_tail(user, cases.seen[first], now),
                now=now,
                request=self._request(cases.features.select(shown), offsets - offsets[0]),
            )
            for index, task in enumerate(cases.tasks):
                out[shown, index] = predicted[task]
        return out

    def _request(self, features: RowFeatures, offsets: Int) -> dict[str, Any]:
        """What a caller passes of features of requests: the columns that the model reads.

        A column has one value per request if no request has several, and otherwise one per impression.

        Args:
            features: of the impressions.
            offsets: int64 [n + 1], the impressions of n requests.
        """
        read = {column.name for column in self._scorer.model.schema.request_features}
        first, request = np.repeat(offsets[:-1], np.diff(offsets)), {}
        for name, values in features.named(self._log.request_features).items():
            bits = features.columns[name].view(np.int32)  # missing numbers are equal too
            if name in read:
                is_shared = np.array_equal(bits, bits[first])
                request[name] = values[offsets[:-1]] if is_shared else (values, offsets)
        return request

    def _fresh_tail(self, user: Int, seen: Int, label_time: Int | None) -> Tail | None:
        """The newest events before each label that its record does not cover, with the log's ids; None without any.

        Args:
            user: int64 [n] rows of the log.
            seen: int64 [n] events before the label.
            label_time: int64 [n] of the labels of a split by time, else None.
        """
        log, store = self._log, self._scorer.store
        ids = log.users.ids(user)
        stored = store.get_many(ids)
        late = stored.event_count > seen
        if label_time is not None:
            late |= stored.last_event_ts >= label_time
        late &= stored.found
        if late.any():
            first = int(np.flatnonzero(late)[0])
            raise LeakageError(
                f"user {ids.tolist()[first]!r}: the record in {store.path} covers {stored.event_count[first]} events, "
                f"but only {seen[first]} lie before the label; refresh the store from this log, with the `until` of "
                "this split"
            )
        start = np.maximum(stored.event_count, seen - self._scorer.model.config.tail_len)
        if (start >= seen).all():
            return None
        events = log.gather_ranges(user, np.minimum(start, seen), seen)
        items, times, actions = log.items.ids(events.item), np.asarray(events.timestamp), np.asarray(events.action)
        read = {column.name for column in self._scorer.model.schema.event_features}
        values = events.features.named(log.event_features)
        features = {name: column for name, column in values.items() if name in read}
        return Tail(items, times, actions, events.offsets, features)


class RefreshedAnswers(ScorerAnswers):
    """A store that is refreshed every `data.refresh_days` while the questions of a part of a split by time are asked.

    Next items are asked when the part begins, so the scorer's own store answers them. An impression is answered from
    the last refresh before it.
    """

    def __init__(self, scorer: Scorer, log: EventLog, split: str, folder: Path, *, requests_per_batch: int) -> None:
        """
        Args:
            scorer: of a store that was refreshed just before the labels of `split`.
            folder: an existing one, in which each later refresh makes a store that is removed after its questions.
        """
        super().__init__(scorer, log, requests_per_batch=requests_per_batch)
        self._split, self._folder = split, folder

    def probabilities(self, cases: ImpressionCases) -> Float32s:
        """As `ScorerAnswers.probabilities`."""
        model, out = self._scorer.model, np.zeros(cases.label.shape, np.float32)
        refresh_of, times = last_refresh(model.data, self._split, cases.timestamp)
        options = RefreshOptions(codec=Codec(self._scorer.store.manifest.codec), verify_log=False)
        growing = GrowingStates.of(model, self._log.num_users)
        for index in np.unique(refresh_of).tolist():
            own = np.flatnonzero(refresh_of == index)
            if index == 0:
                out[own] = super().probabilities(cases.part(own))
                continue
            with tempfile.TemporaryDirectory(prefix=".refreshed-", dir=self._folder) as folder:
                store = Path(folder) / "store"
                refresh(
                    model,
                    self._log,
                    store,
                    until=Until(before=int(times[index])),
                    options=options,
                    users=np.unique(cases.user[own]),
                    growing=growing,
                )
                with Scorer.open(model, store) as scorer:
                    later = ScorerAnswers(scorer, self._log, requests_per_batch=self._requests_per_batch)
                    out[own] = later.probabilities(cases.part(own))
        return out


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
        counters, tail, keys = None, None, self._model.item_keys
        if keys is not None:
            histories, requests = case_requests(self._log, self._item_rows, user, seen, now)
            counters, tail = HistoryCounters.of(keys, histories).at(requests), self._newest(user, seen)
        out = catalog_scores(self._model, torch.cat(users), self._items, counters, tail)
        scores: Float32s = out.float().cpu().numpy()
        return scores

    def probabilities(self, cases: ImpressionCases) -> Float32s:
        """float32 [N, len(cases.tasks)]; the impressions of one user at one time share the history."""
        out = np.zeros(cases.label.shape, np.float32)
        # By name: the log may have the model's tasks in another order, and not all of them.
        columns = [self._model.schema.tasks.index(task) for task in cases.tasks]
        starts = request_starts(cases)
        requests = [slice(low, high) for low, high in pairwise([*starts.tolist(), len(cases.user)])]
        num_shown = np.diff(np.append(starts, len(cases.user)))
        groups = list(self._groups(cases.seen[starts], num_shown))
        for group in progress_bar(groups, desc="impressions", unit="batch", leave=False):
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
            self._log, self._item_rows, cases.user[own], cases.seen[own], cases.timestamp[own]
        )
        codes = HistoryCounters.of(keys, histories).of_items(requests, self._item_rows[cases.item[own]])
        return torch.from_numpy(codes.reshape(*index.shape, -1)).to(self._model.device)

    def histories(self, user: Int, seen: Int) -> Histories:
        """What the model reads of the first `seen` events int64 [B] of users int64 [B] (rows of the log)."""
        limit = self._model.config.history_limit
        events = self._log.gather_ranges(user, np.maximum(seen - limit, 0) if limit else seen * 0, seen)
        features = self._recode(events.features, events.num_events)
        return dataclasses.replace(events, item=self._item_rows[events.item].astype(np.int32), features=features)

    def _newest(self, user: Int, seen: Int) -> Int:
        """int64 [N, at most NUM_RECENT] model rows of the newest events before each question, right-aligned; 0 pads."""
        count = min(NUM_RECENT, self._model.config.tail_len)  # as training reads them
        events = self._log.gather_ranges(user, np.maximum(seen - count, 0), seen, features=False)
        index = events.offsets[1:, None] - count + np.arange(count)
        row = np.append(self._item_rows[events.item], 0)
        return row[np.where(index >= events.offsets[:-1, None], index, -1)]

    def _groups(self, seen: Int, num_shown: Int) -> Iterator[slice]:
        """Requests with about `events_per_batch` events and candidates together; num_shown: candidates of each."""
        limit = self._model.config.history_limit
        return token_groups((np.minimum(seen, limit) if limit else seen) + num_shown, self._events_per_batch)
