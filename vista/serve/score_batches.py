"""Scores small requests that wait at the same time in one call.

There is no pause for others to arrive: a request that finds a free thread is scored alone. If requests wait, those that
are next in line join the first one, because one call for several users costs much less than a call for each
(docs/research-log.md has the figures). Scores do not depend on the other users of a call, beyond rounding.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vista.arrays import offsets_of
from vista.config.choices import OnMissing
from vista.errors import VistaError
from vista.serve.request_bodies import ScoreBody, TailEvent, candidate_ids
from vista.serve.scoring_service import Answer, ScoringService, server_time

logger = logging.getLogger(__name__)

OF_REQUESTS = (ValueError, TypeError, OverflowError, VistaError)
"""Errors that an invalid request causes."""
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
    """The waiting score requests of one model.

    Each request still has a place of its own in the queue. When its turn comes, it computes itself and some that come
    later; when their turn comes, their answers are there already.
    """

    def __init__(self) -> None:
        self._waiting: dict[Entry, None] = {}
        self._lock = threading.Lock()

    def enter(self, body: bytes, media_type: str) -> Entry:
        """Add a request to those that wait."""
        entry = Entry(body, media_type)
        with self._lock:
            self._waiting[entry] = None
        return entry

    def leave(self, entry: Entry) -> None:
        """Remove a request whose client no longer waits. Its result is cancelled, because nobody will compute it."""
        with self._lock:
            if entry in self._waiting:
                del self._waiting[entry]
                entry.result.cancel()

    def answer(self, entry: Entry, service: ScoringService) -> Answer:
        """The answer to a request; errors are those of `ScoringService.scored`, or CancelledError after `leave`."""
        if batch := self._take(entry, service.scorer.on_missing):
            _compute(batch, service)
        return entry.result.result()

    def _take(self, first: Entry, on_missing: OnMissing) -> list[Entry]:
        """Remove the request and some that wait behind it from the queue; empty if another thread has taken it."""
        with self._lock:
            if first not in self._waiting:
                return []
            del self._waiting[first]
            batch, size = [first], len(first.body)
            if on_missing is not OnMissing.error:  # One unknown id would fail the whole call.
                for entry in self._waiting:
                    size += len(entry.body)
                    if size > MAX_BYTES or len(batch) == MAX_REQUESTS:
                        break
                    batch.append(entry)
                for entry in batch[1:]:
                    del self._waiting[entry]
            return batch


def _compute(batch: list[Entry], service: ScoringService) -> None:
    """Set the results of all requests of a batch."""
    asked: dict[Entry, ScoreBody] = {}
    for entry in batch:
        try:
            asked[entry] = service.checked(entry.body, entry.media_type)
        except BaseException as error:
            entry.result.set_exception(error)
    together = [entry for entry, body in asked.items() if _can_join(body)]
    if len(together) > 1:
        try:
            answers = _together([asked[entry] for entry in together], [entry.media_type for entry in together], service)
        except BaseException as error:  # Panics of Rust too. Computed alone, each gets its own error or answer.
            if not isinstance(error, OF_REQUESTS):
                logger.exception("%d requests could not be scored together, and are scored alone", len(together))
        else:
            for entry, answer in zip(together, answers, strict=True):
                entry.result.set_result(answer)
                del asked[entry]
    for entry, body in asked.items():
        try:
            entry.result.set_result(service.scored(body, entry.media_type))
        except BaseException as error:
            entry.result.set_exception(error)


def _together(bodies: list[ScoreBody], media_types: list[str], service: ScoringService) -> list[Answer]:
    """Answers to several requests, from one call."""
    clock = server_time()
    given = [candidate_ids(body.candidates) for body in bodies]
    users = [user for body in bodies for user in body.users]
    values: list[Any] = []
    lengths, tails = [], list[list[TailEvent]]()
    times: list[int] = []
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
    merged = ScoreBody(users, [], tails if any(tails) else None, times)
    ids = [item for some in values for item in (some if isinstance(some, list) else some.tolist())]
    scores = service.scores(merged, (ids, offsets_of(np.concatenate(lengths))))
    bounds = np.cumsum([own.sum() for own in lengths])[:-1]
    return [
        service.answer(part if isinstance(own, tuple) else part.reshape(len(body.users), -1), own, kind)
        for part, own, body, kind in zip(np.split(scores, bounds), given, bodies, media_types, strict=True)
    ]


def _can_join(body: ScoreBody) -> bool:
    """Whether a request can be part of a call: it has no features, and one entry per user wherever it has a list."""
    count = len(body.users)
    of_users = [body.tail, body.now, body.candidates if any(isinstance(one, list) for one in body.candidates) else None]
    return not body.request and count > 0 and all(len(one) == count for one in of_users if isinstance(one, list))
