"""What each endpoint computes: from the bytes of a request to the bytes of its answer.

B users, C candidates. All methods run in threads of the queue.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.config import ServeConfig
from vista.errors import BodyTooLargeError, ConfigError, RecordError, StoreUnavailableError, UnknownUserError
from vista.log.vocabulary import ids_of_words
from vista.model.model_description import CONFIG_FILE
from vista.scorer import Scorer
from vista.serve.request_bodies import (
    JSON,
    MSGPACK,
    ExplainBody,
    RankBody,
    ScoreBody,
    candidate_ids,
    decoded,
    request_features,
    tail_of,
)
from vista.serve.serve_extra import msgspec
from vista.serve.user_record import user_record
from vista.version import __version__

logger = logging.getLogger(__name__)

MAX_EXPLAINED = 100
"""Most candidates of an explanation, which takes several times as long as their scores."""


@dataclass(frozen=True, slots=True)
class Answer:
    """The body of an answer."""

    body: bytes
    media_type: str = JSON
    num_candidates: int = 0
    """Pairs of a user and a candidate that were scored."""


@dataclass(frozen=True, slots=True)
class ScoringService:
    """Answers requests with a scorer."""

    scorer: Scorer
    config: ServeConfig

    def checked(self, body: bytes, media_type: str) -> ScoreBody:
        """The body of a request for scores, within the limits.

        Raises:
            BodyTooLargeError: it has too many users or candidates. Others as of `decoded` and `candidate_ids`.
        """
        asked = decoded(body, ScoreBody, media_type)
        most, candidates = self.config.max_users, candidate_ids(asked.candidates)
        if len(asked.users) > most:
            raise BodyTooLargeError(f"users: {len(asked.users):,} ids, but at most {most:,} (max_users); send several")
        ragged = isinstance(candidates, tuple)
        self._require_most(len(candidates[0] if ragged else candidates), 1 if ragged else len(asked.users))
        return asked

    def scores(self, asked: ScoreBody, candidates: Any) -> NDArray[np.float32]:
        """Scores of one task; `candidates` are those of the body, or others in their place."""
        scores: NDArray[np.float32] = self.scorer.score(asked.users, candidates, **self._arguments(asked, candidates))
        return scores

    def scored(self, asked: ScoreBody, media_type: str) -> Answer:
        """Scores of one task; errors of this and all other methods are those of the scorer and of `decoded`."""
        candidates = candidate_ids(asked.candidates)
        return self.answer(self.scores(asked, candidates), candidates, media_type)

    def answer(self, scores: NDArray[np.float32], candidates: Any, media_type: str) -> Answer:
        """An answer with scores in the shape of the candidates."""
        return _answer({"task": self.scorer.task, "scores": scores}, media_type, candidates, scores.size)

    def predict(self, body: bytes, media_type: str) -> Answer:
        """Scores of all tasks."""
        asked = self.checked(body, media_type)
        candidates = candidate_ids(asked.candidates)
        scores = self.scorer.predict(asked.users, candidates, **self._arguments(asked, candidates))
        return _answer({"scores": scores}, media_type, candidates, next(iter(scores.values())).size)

    def rank(self, body: bytes, media_type: str) -> Answer:
        """The best items for a user."""
        asked = decoded(body, RankBody, media_type)
        candidates = None if asked.candidates is None else candidate_ids(asked.candidates)
        num_candidates = len(self.scorer.model.items) if candidates is None else len(candidates)
        if candidates is not None:
            self._require_most(num_candidates, 1)
        ranking = self.scorer.rank(
            asked.user,
            top_k=asked.top_k,
            candidates=candidates,
            exclude=asked.exclude,
            exclude_tail=asked.exclude_tail,
            **self._of_one(asked),
        )
        held = {"items": ranking.items.tolist(), "scores": ranking.scores, "num_dropped": ranking.num_dropped}
        return _answer({"task": self.scorer.task, **held}, media_type, None, num_candidates)

    def explain(self, body: bytes, media_type: str) -> Answer:
        """Shares of scores, per part of the model's input."""
        asked = decoded(body, ExplainBody, media_type)
        if len(asked.candidates) > MAX_EXPLAINED:
            raise BodyTooLargeError(
                f"candidates: {len(asked.candidates):,} ids, but an explanation takes at most {MAX_EXPLAINED}; send "
                "several requests"
            )
        told = self.scorer.explain(asked.user, asked.candidates, task=asked.task, **self._of_one(asked))
        shares = {name: getattr(told, name) for name in type(told).__dataclass_fields__}
        held = {"task": asked.task or self.scorer.task, **shares}
        return _answer(held, media_type, None, len(asked.candidates))

    def user(self, word: str) -> Answer:
        """The record of a user in readable form.

        Args:
            word: the id, as it is written in the path.
        """
        store = self.scorer.store
        try:
            users = ids_of_words([word], "user", store.manifest.user_kind)
        except ConfigError as error:  # which would be the operator's fault
            raise ValueError(str(error)) from None
        record = user_record(store, self.scorer.model, users[0])
        if record is None:
            raise UnknownUserError(f"user {users[0]!r} has no record in {store.path}")
        return Answer(msgspec.json.encode(record))

    def model(self) -> Answer:
        """What is in service."""
        scorer = self.scorer
        model, manifest = scorer.model, scorer.manifest
        schema, config = model.schema, model.config
        names = {
            key: [column.name for column in getattr(schema, key)]
            for key in ("item_features", "event_features", "request_features", "user_features")
        }
        return Answer(
            msgspec.json.encode(
                {
                    "version": __version__,
                    "task": scorer.task,
                    "tasks": scorer.tasks,
                    "on_missing": scorer.on_missing.value,
                    "num_items": len(model.items),
                    "item_ids": model.items.kind,
                    "user_ids": manifest.user_kind,
                    "actions": schema.actions,
                    "has_time": schema.has_time,
                    **names,
                    "dim": config.dim,
                    "num_seeds": config.num_seeds,
                    "tail_len": config.tail_len,
                    "summarizer_id": model.summarizer_id().hex(),
                    "generation": manifest.generation,
                    "refreshed_at": manifest.refreshed_at,
                    "num_users": manifest.count,
                    "max_candidates": self.config.max_candidates,
                    "max_users": self.config.max_users,
                }
            )
        )

    def reads_store(self) -> bool:
        """Whether the store answers now. A folder always does; a server may not."""
        store = self.scorer.store
        try:
            store.get_many(ids_of_words(["0"], "user", store.manifest.user_kind))
        except StoreUnavailableError as error:
            logger.error("%s", error)
            return False
        except RecordError:  # of this user alone
            return True
        return True

    def problems(self) -> list[str]:
        """What keeps the service from moving to a newer model or generation; empty if nothing does."""
        found = []
        if not os.path.isfile(os.path.join(self.config.model, CONFIG_FILE)):  # also False without permissions
            found.append("the folder of the model cannot be read; the loaded model stays in service")
        if self.scorer.stats().last_reload_error is not None:
            found.append("the last reload failed; the loaded model and generation stay in service (see the log)")
        return found

    def _arguments(self, asked: ScoreBody, candidates: Any) -> dict[str, Any]:
        """The other arguments of a call."""
        return {
            "tail": tail_of(asked.tail, self.scorer.model.schema),
            "now": self._time(asked.now),
            "request": request_features(asked.request, candidates),
        }

    def _of_one(self, asked: RankBody | ExplainBody) -> dict[str, Any]:
        """The other arguments of a call for one user."""
        features = {name: [value] if isinstance(value, list) else value for name, value in asked.request.items()}
        tail = None if asked.tail is None else [asked.tail]
        return {
            "tail": tail_of(tail, self.scorer.model.schema),
            "now": self._time(asked.now),
            "request": features,
        }

    def _time(self, now: Any) -> Any:
        """The time of a request in ms; None for a model without times."""
        if now is None and self.scorer.model.schema.has_time:
            return time.time_ns() // 1_000_000
        return now

    def _require_most(self, num_candidates: int, num_users: int) -> None:
        most = self.config.max_candidates
        if num_candidates * num_users > most:
            raise BodyTooLargeError(
                f"candidates: {num_candidates:,} ids for {num_users} users, but at most {most:,} pairs per request "
                "(max_candidates); send several requests"
            )


def _answer(held: dict[str, Any], media_type: str, candidates: Any, num_candidates: int) -> Answer:
    """An answer with arrays: as lists in JSON, and in MessagePack as the bytes of float32 numbers, row by row."""
    if media_type == MSGPACK:
        body = msgspec.msgpack.encode(held, enc_hook=_as_bytes)
    else:
        offsets = candidates[1] if isinstance(candidates, tuple) else None
        body = msgspec.json.encode(_as_lists(held, offsets))
    return Answer(body, media_type, num_candidates)


def _as_bytes(array: NDArray[Any]) -> bytes:
    return array.astype("<f4", copy=False).tobytes()


def _as_lists(value: Any, offsets: NDArray[np.int64] | None) -> Any:
    """The same with lists instead of arrays; an array of ragged scores becomes one list per user."""
    if isinstance(value, dict):
        return {name: _as_lists(one, offsets) for name, one in value.items()}
    if not isinstance(value, np.ndarray):
        return value
    if offsets is None:
        return value.tolist()
    return [value[start:stop].tolist() for start, stop in _spans(offsets)]


def _spans(offsets: NDArray[np.int64]) -> Sequence[tuple[int, int]]:
    bounds = offsets.tolist()
    return list(pairwise(bounds))
