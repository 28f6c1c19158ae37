"""The protocol's cases, answered by a scorer from its store and the events that came after each record.

Letters: N cases, V items of the model.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from vista.arrays import Float32s, Int
from vista.errors import LeakageError
from vista.evaluation.cases import ImpressionCases, NextItemCases, request_starts
from vista.evaluation.window_cases import WindowCases
from vista.log.event_log import EventLog
from vista.log.row_features import RowFeatures
from vista.progress_bar import progress_bar
from vista.scorer import Scorer
from vista.store import Tail


class ScorerAnswers:
    """A scorer, and the log that its callers would take fresh events from."""

    def __init__(self, scorer: Scorer, log: EventLog, *, requests_per_batch: int) -> None:
        self._scorer, self._log, self._requests_per_batch = scorer, log, requests_per_batch

    def catalog_scores(self, cases: NextItemCases | WindowCases) -> Float32s:
        """Scores float32 [N, V] of all items for the users of some cases, at the times of the questions.

        Raises:
            LeakageError: if a record covers an event after the question.
        """
        # The store holds the events until the refresh; the caller brings newer ones (none with leave-last-out). A next
        # item may have the time of the event before it, so its time does not tell whether a record covers it.
        label_time = cases.now if isinstance(cases, WindowCases) else None
        tail = self._fresh_tail(cases.user, cases.seen, label_time)
        return self._scorer.catalog_scores(self._log.users.ids(cases.user), tail=tail, now=cases.now)

    def probabilities(self, cases: ImpressionCases, *, progress: bool = False) -> Float32s:
        """float32 [N, len(cases.tasks)]; the impressions of one user at one time are one request.

        Raises:
            LeakageError: if a record covers a label.
        """
        log, out = self._log, np.zeros(cases.label.shape, np.float32)
        starts = request_starts(cases)
        stops = np.append(starts, len(cases.user))
        batches = range(0, len(starts), self._requests_per_batch)
        for low in progress_bar(batches, desc="impressions", unit="batch", shown=progress, leave=False):
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

        Raises:
            LeakageError: if a record covers a label, by event_count for leave-last-out (equal times are common), and
                else by time too.
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
