"""Scores small requests that wait at the same time in one call.

There is no pause for others to arrive: a request that finds a free thread is scored alone. If requests wait, those that
are next in line join the first one, because one call for several users costs much less than a call for each
(docs/research-log.md has the figures). Scores do not depend on the other users of a call, beyond rounding.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vista.arrays import offsets_of
from vista.config.choices import OnMissing
from vista.serve.request_bodies import ScoreBody, TailEvent, candidate_ids
from vista.serve.scoring_service import Answer, ScoringService

MAX_REQUESTS = 16
MAX_BYTES = 4096
"""Most bytes of the bodies of a batch, about 600 ids: longer lists keep a core busy alone, and would delay others."""


@dataclass(slots=True, eq=False)
class Entry:
    """A request for scores."""

    body: bytes
    media_type: str
    result: Future[Answer] = field(default_factory=Future)


class ScoreBatches:
    """The requests for scores that wait.

    Each request still has a place of its own in the queue. When its turn comes, it computes itself and some that come
    later; when their turn comes, their answers are there already.
    """

    def __init__(self, service: ScoringService) -> None:
        self._service = service
        self._waiting: dict[Entry, None] = {}
        self._lock = threading.Lock()

    def enter(self, body: bytes, media_type: str) -> Entry:
        """Add a request to those that wait."""
        entry = Entry(body, media_type)
        with self._lock:
            self._waiting[entry] = None
        return entry

    def leave(self, entry: Entry) -> None:
        """Remove a request whose client no longer waits."""
        with self._lock:
            self._waiting.pop(entry, None)

    def answer(self, entry: Entry) -> Answer:
        """The answer to a request; errors are those of `ScoringService.score`."""
        if batch := self._take(entry):
            self._compute(batch)
        return entry.result.result()

    def _take(self, first: Entry) -> list[Entry]:
        """Remove the request and some that wait behind it from the queue; empty if another thread has taken it."""
        with self._lock:
            if first not in self._waiting:
                return []
            del self._waiting[first]
            batch, size = [first], len(first.body)
            if self._service.scorer.on_missing is not OnMissing.error:  # One unknown id would fail the whole call.
                for entry in self._waiting:
                    size += len(entry.body)
                    if size > MAX_BYTES or len(batch) == MAX_REQUESTS:
                        break
                    batch.append(entry)
                for entry in batch[1:]:
                    del self._waiting[entry]
            return batch

    def _compute(self, batch: list[Entry]) -> None:
        """Set the results of all requests of a batch."""
        asked: dict[Entry, ScoreBody] = {}
        for entry in batch:
            try:
                asked[entry] = self._service.checked(entry.body, entry.media_type)
            except BaseException as error:
                entry.result.set_exception(error)
        together = [entry for entry, body in asked.items() if _can_join(body)]
        if len(together) > 1:
            try:
                answers = self._together([asked[entry] for entry in together], [entry.media_type for entry in together])
            except Exception:
                pass  # One of the requests is invalid. Computed alone, each gets its own error or answer.
            else:
                for entry, answer in zip(together, answers, strict=True):
                    entry.result.set_result(answer)
                    del asked[entry]
        for entry, body in asked.items():
            try:
                entry.result.set_result(self._service.scored(body, entry.media_type))
            except BaseException as error:
                entry.result.set_exception(error)

    def _together(self, bodies: list[ScoreBody], media_types: list[str]) -> list[Answer]:
        """Answers to several requests, from one call."""
        has_time = self._service.scorer.model.schema.has_time
        clock = time.time_ns() // 1_000_000 if has_time else None
        given = [candidate_ids(body.candidates) for body in bodies]
        users = [user for body in bodies for user in body.users]
        values: list[Any] = []
        lengths, tails = [], list[list[TailEvent]]()
        times: list[int | None] = []
        for body, candidates in zip(bodies, given, strict=True):
            count = len(body.users)
            if isinstance(candidates, tuple):
                values.append(candidates[0])
                lengths.append(np.diff(candidates[1]))
            else:
                values += [candidates] * count
                lengths.append(np.full(count, len(candidates)))
            tails += body.tail if body.tail is not None else [[]] * count
            now = body.now if body.now is not None else clock
            times += now if isinstance(now, list) else [now] * count
        merged = ScoreBody(users, [], tails if any(tails) else None, times if has_time else None)  # type: ignore[arg-type]
        ids = [item for some in values for item in (some if isinstance(some, list) else some.tolist())]
        scores = self._service.scores(merged, (ids, offsets_of(np.concatenate(lengths))))
        bounds = np.cumsum([own.sum() for own in lengths])[:-1]
        return [
            self._service.answer(part if isinstance(own, tuple) else part.reshape(len(body.users), -1), own, kind)
            for part, own, body, kind in zip(np.split(scores, bounds), given, bodies, media_types, strict=True)
        ]


def _can_join(body: ScoreBody) -> bool:
    """Whether a request can be part of a call: it has no features, and one entry per user wherever it has a list."""
    count = len(body.users)
    of_users = [body.tail, body.now, body.candidates if any(isinstance(one, list) for one in body.candidates) else None]
    return not body.request and count > 0 and all(len(one) == count for one in of_users if isinstance(one, list))
