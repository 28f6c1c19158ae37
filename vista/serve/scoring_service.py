"""What each endpoint computes: from the bytes of a request, as JSON or MessagePack, to the bytes of its answer.

B users, C candidates. All methods run in threads of the queue.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, TypeVar, cast

import msgspec
import numpy as np
from numpy.typing import NDArray

from vista.arrays import offsets_of
from vista.config import ServeConfig
from vista.config.checks import OnMissing
from vista.errors import (
    BodyTooLargeError,
    ConfigError,
    RecordError,
    StoreUnavailableError,
    UnknownUserError,
    VistaError,
)
from vista.installation import __version__
from vista.log.histories import NO_TIMESTAMP, RowFeatures
from vista.log.vocabulary import ids_of_words
from vista.model.features import require_known
from vista.model.saved_model import CONFIG_FILE, INDEX_MANIFEST
from vista.model.serving_model import ServingModel
from vista.scorer import Ranking, Scorer, Tail
from vista.scorer.request import NOW
from vista.serve.http_protocol import Unrepeated, has_few_values
from vista.store.reader import ShardedReader, StoreReader

logger = logging.getLogger(__name__)
logger.addFilter(Unrepeated())

JSON, MSGPACK = "application/json", "application/msgpack"
Id = int | str
Body = TypeVar("Body")
MAX_EXPLAINED = 100
"""Most items of an explanation, which takes several times as long as their scores."""
OF_REQUESTS = (ValueError, TypeError, OverflowError, VistaError)
"""Errors that an invalid request causes."""
MAX_REQUESTS = 16
MAX_VALUES = 3 << 18
"""Most values of a body. Each takes up to 90 bytes of memory: an empty list does, which is one byte of MessagePack."""
MAX_BYTES = 4096
"""Most bytes of the bodies of a batch, about 600 ids: longer lists keep a core busy alone, and would delay others."""


Value = str | float | int | None
Values = dict[str, Value | list[Value | list[Value]]]


class TailEvent(msgspec.Struct, forbid_unknown_fields=True):
    """An event since the refresh."""

    item: Id
    time: int
    """ms since 1970."""
    action: str | None = None
    """Type of the action, such as "view"; may be left out if the model has only one."""
    features: dict[str, Value] = msgspec.field(default_factory=dict)
    """Features of the event by name."""


class BodyOfUsers(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of all bodies for several users."""

    users: list[Id]
    """B ids as in the log."""
    tail: list[list[TailEvent]] | None = None
    """Per user, the events since the refresh."""
    now: int | list[int] | None = None
    """Time of the request in ms, one or one per user; by default now, but at most 30 days after the newest event."""
    request: Values = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, one per user, or per user one list with one value per candidate."""
    adapter: str | None = None
    """Name of one of the service's adapters; by default, none."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class ScoreBody(BodyOfUsers, kw_only=True):
    """Users, and the candidates to score for them."""

    candidates: list[Id | list[Id]] | bytes
    """Item ids: one list for all users, or one list per user. In MessagePack also the bytes of int64 ids in
    little-endian order, for all users."""


class RetrieveBody(BodyOfUsers, kw_only=True):
    """Users for whom to retrieve the best items of a large catalog."""

    top_k: int = 10
    """Maximum number of items to return per user."""
    num_candidates: int = 500
    """Number of items that the index returns per user, in addition to the items of the user's counters and tail."""
    within: list[Id] | bytes | None = None
    """Ids of the items that may be returned, or null for all. In MessagePack also the bytes of int64 ids in
    little-endian order."""
    where: dict[str, list[Id]] = msgspec.field(default_factory=dict)
    """By name of an item category: the values of items that may be returned."""
    exclude: list[Id] = msgspec.field(default_factory=list)
    """Item ids to leave out."""
    exclude_tail: bool = False
    """Leave out the items of the users' newest events."""


class BodyOfOne(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """The fields of all bodies for one user."""

    user: Id
    tail: list[TailEvent] | None = None
    """The user's events since the refresh."""
    now: int | None = None
    """Time of the request in ms; by default now, but at most 30 days after the user's newest event."""
    request: Values = msgspec.field(default_factory=dict)
    """Features of the request by name: one value, or one list with one value per candidate."""
    adapter: str | None = None
    """Name of one of the service's adapters; by default, none."""
    model: str | None = None
    """Name of the model, if the service has several; by default, the model that the split assigns."""


class RankBody(BodyOfOne, kw_only=True):
    """A user, for whom the best items are wanted."""

    top_k: int = 10
    """Most items to return."""
    diversity: float = 0.0
    """0 orders by score. A value up to 1 also avoids items that resemble those above them."""
    candidates: list[Id] | bytes | None = None
    """Item ids, or null for the whole catalog. In MessagePack also the bytes of int64 ids in little-endian order."""
    exclude: list[Id] = msgspec.field(default_factory=list)
    """Item ids to leave out."""
    exclude_tail: bool = False
    """Leave out the items of the user's newest events."""


class ExplainBody(BodyOfOne, kw_only=True):
    """A user, and the items whose scores are to be explained."""

    items: list[Id]
    """Item ids, at most 100."""
    candidates: list[Id] | bytes | None = None
    """Item ids with which the items are compared, or null for the whole catalog, as in rank. They include the items."""
    task: str | None = None
    """By default the task of score and rank."""


class Addressee(msgspec.Struct):
    """The fields of any body that determine which model answers."""

    user: Id | None = None
    users: msgspec.Raw = msgspec.Raw()
    """Not decoded, because a body can hold millions."""
    model: str | None = None


def decoded(body: bytes, kind: type[Body], media_type: str) -> Body:
    """A body as its type.

    Raises:
        msgspec.DecodeError: the bytes are not valid JSON or MessagePack.
        msgspec.ValidationError: a field is missing, unknown, or has another type.
        BodyTooLargeError: it has more than MAX_VALUES values.
    """
    if len(body) > MAX_VALUES and not has_few_values(body, MAX_VALUES, packed=media_type == MSGPACK):
        raise BodyTooLargeError(f"the body has more than {MAX_VALUES:,} values; send several requests")
    return parsed(body, kind, media_type)


def parsed(body: bytes, kind: type[Body], media_type: str) -> Body:
    """Like `decoded`, without a limit on values, for types of bounded size, such as those without lists."""
    try:
        if media_type == MSGPACK:
            return msgspec.msgpack.decode(body, type=kind)
        held = msgspec.json.decode(body, type=kind)
    except RecursionError:
        raise msgspec.DecodeError("its values are nested too deeply") from None
    for name in ("candidates", "within"):
        if isinstance(getattr(held, name, None), bytes):  # msgspec reads a text as base64 here
            raise msgspec.ValidationError(f"Expected `array`, got `str` - at `$.{name}`")
    return held


def item_ids(given: Sequence[Id] | bytes, name: str) -> Any:
    """Ids [C] as a scorer takes them. Raises ValueError if the bytes are not int64."""
    if not isinstance(given, bytes):
        return given
    if len(given) % 8:
        raise ValueError(f"{name}: {len(given)} bytes are not a whole number of int64 ids")
    return np.frombuffer(given, "<i8")


def candidate_ids(given: Sequence[Any] | bytes) -> Any:
    """Candidates as a scorer takes them: ids [C], or (values [N], offsets [B + 1]) of one list per user. Raises
    ValueError if the list mixes ids and lists, or its bytes are not int64."""
    if isinstance(given, bytes):
        return item_ids(given, "candidates")
    rows = [one for one in given if isinstance(one, list)]
    if not rows:
        return given
    if len(rows) < len(given):
        raise ValueError("candidates: must be ids, or one list of ids per user, not both")
    return [item for row in rows for item in row], offsets_of(np.array([len(row) for row in rows], np.int64))


def tail_of(given: Sequence[Sequence[TailEvent]] | None, model: ServingModel) -> Tail | None:
    """Events since the refresh, per user, as a scorer takes them.

    Actions stay names, because a reload can put another model into service before the call.

    Raises:
        ValueError: the model does not know a feature.
        BodyTooLargeError: the columns of features, which have a cell for each event, have more than MAX_VALUES cells.
    """
    if given is None:
        return None
    events = [event for own in given for event in own]
    names = dict.fromkeys(name for event in events for name in event.features)
    known = {} if model.event_features is None else model.event_features.values
    require_known(names, known, "tail.features: ")  # before there is a column for each
    if len(names) * len(events) > MAX_VALUES:
        raise BodyTooLargeError(
            f"tail: {len(events):,} events with {len(names)} features are more than {MAX_VALUES:,} values; send "
            "several requests"
        )
    has_large = any(not -(2**63) <= event.time < 2**63 for event in events)
    return Tail(
        [event.item for event in events],  # type: ignore[arg-type]
        np.array([event.time for event in events], object if has_large else np.int64),
        np.array([event.action for event in events], object),
        offsets_of(np.array([len(own) for own in given], np.int64)),
        {name: [event.features.get(name) for event in events] for name in names},
    )


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
    variant: str | None = None
    """Name of the model in answers; None if the service has only one."""

    def checked(self, body: bytes, media_type: str) -> ScoreBody:
        """The body of a request for scores, within the limits.

        Raises:
            BodyTooLargeError: it has too many users or candidates. Others as of `decoded` and `candidate_ids`.
        """
        asked = decoded(body, ScoreBody, media_type)
        candidates = candidate_ids(asked.candidates)
        self._require_most_users(len(asked.users))
        ragged = isinstance(candidates, tuple)
        if ragged:
            _require_one_per_user(len(candidates[1]) - 1, asked, "candidates")
        self._require_most(len(candidates[0] if ragged else candidates), 1 if ragged else len(asked.users))
        return asked

    def scores(self, asked: ScoreBody, candidates: Any) -> NDArray[np.float32]:
        """Scores of one task; `candidates` are those of the body, or others in their place."""
        scores: NDArray[np.float32] = self.scorer.score(asked.users, candidates, **self._arguments(asked))
        return scores

    def scored(self, asked: ScoreBody, media_type: str) -> Answer:
        """Scores of one task; errors of this and all other methods are those of the scorer and of `decoded`."""
        candidates = candidate_ids(asked.candidates)
        return self.answer(self.scores(asked, candidates), candidates, media_type)

    def answer(self, scores: Any, candidates: Any, media_type: str, users: slice = slice(None)) -> Answer:
        """An answer with float32 scores in the shape of the candidates, for some users of this thread's last call."""
        held = self._sourced({"task": self.scorer.task, "scores": scores}, users)
        return _answer(held, media_type, candidates, scores.size)

    def predict(self, body: bytes, media_type: str) -> Answer:
        """Scores of all tasks."""
        asked = self.checked(body, media_type)
        candidates = candidate_ids(asked.candidates)
        scores = self.scorer.predict(asked.users, candidates, **self._arguments(asked))
        return _answer(self._sourced({"scores": scores}), media_type, candidates, next(iter(scores.values())).size)

    def rank(self, body: bytes, media_type: str, timeout_s: float) -> Answer:
        """The best items for a user, found within `timeout_s` seconds."""
        asked = decoded(body, RankBody, media_type)
        candidates = None if asked.candidates is None else item_ids(asked.candidates, "candidates")
        num_candidates = len(self.scorer.served.items) if candidates is None else len(candidates)
        self._require_most(min(asked.top_k, num_candidates) if candidates is None else num_candidates, 1)
        ranking = self.scorer.rank(
            asked.user,
            top_k=asked.top_k,
            candidates=candidates,
            exclude=asked.exclude,
            exclude_tail=asked.exclude_tail,
            diversity=asked.diversity,
            timeout_s=timeout_s,
            **self._of_one(asked),
        )
        held = self._sourced({"task": self.scorer.task, **_ranking(ranking)}, 0)
        return _answer(held, media_type, None, num_candidates)

    def retrieve(self, body: bytes, media_type: str) -> Answer:
        """The best items of a large catalog for each user, from candidates that the index finds."""
        asked = decoded(body, RetrieveBody, media_type)
        self._require_most_users(len(asked.users))
        self._require_most(max(asked.top_k, asked.num_candidates), len(asked.users))
        rankings = self.scorer.retrieve(
            asked.users,
            top_k=asked.top_k,
            num_candidates=asked.num_candidates,
            within=None if asked.within is None else item_ids(asked.within, "within"),
            where=asked.where or None,
            exclude=asked.exclude,
            exclude_tail=asked.exclude_tail,
            **self._arguments(asked),
        )
        held = self._sourced({"task": self.scorer.task, "rankings": [_ranking(ranking) for ranking in rankings]})
        return _answer(held, media_type, None, sum(ranking.num_scored for ranking in rankings))

    def explain(self, body: bytes, media_type: str) -> Answer:
        """What raises items above the average candidate: shares of their scores, and words."""
        asked = decoded(body, ExplainBody, media_type)
        if len(asked.items) > MAX_EXPLAINED:
            raise BodyTooLargeError(
                f"items: {len(asked.items):,} ids, but an explanation takes at most {MAX_EXPLAINED}; send several "
                "requests"
            )
        candidates = None if asked.candidates is None else item_ids(asked.candidates, "candidates")
        self._require_most(0 if candidates is None else len(candidates), 1)
        told = self.scorer.explain(
            asked.user, asked.items, candidates=candidates, task=asked.task, **self._of_one(asked)
        )
        shares = {name: getattr(told, name) for name in type(told).__dataclass_fields__}
        shares["reasons"] = [
            [{"part": each.part, "share": each.share, "text": each.words()} for each in reasons]
            for reasons in told.reasons
        ]
        held = self._sourced({"task": self.scorer.task if asked.task is None else asked.task, **shares}, 0)
        return _answer(held, media_type, None, len(asked.items))

    def user(self, word: str) -> Answer:
        """The record of a user in readable form. `word`: the id, as it is written in the path."""
        with self.scorer.in_service() as snapshot:
            store = snapshot.store
            try:
                users = ids_of_words([word], "user", store.manifest.user_kind)
            except ConfigError as error:  # which would be the operator's fault
                raise ValueError(str(error)) from None
            record = user_record(store, snapshot.served, users[0])
            if record is None:
                raise UnknownUserError(f"user {users[0]!r} has no record in {store.path}")
            return Answer(msgspec.json.encode(self._named(record)))

    def model(self, more: Mapping[str, Any] | None = None) -> Answer:
        """What is in service. `more`: fields that are added."""
        scorer = self.scorer
        with scorer.in_service() as snapshot:
            model, manifest = snapshot.served, snapshot.store.manifest
        schema, config = model.schema, model.config
        names = {
            key: [column.name for column in getattr(schema, key)]
            for key in ("item_features", "event_features", "request_features", "user_features")
        }
        return Answer(
            msgspec.json.encode(
                self._named(
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
                        "summarizer_id": model.summarizer_id.hex(),
                        "model_checksum": snapshot.checksum,
                        "generation": manifest.generation,
                        "refreshed_at": manifest.refreshed_at,
                        "num_users": manifest.count,
                        "max_candidates": self.config.max_candidates,
                        "max_users": self.config.max_users,
                        **(more or {}),
                    }
                )
            )
        )

    def reads_store(self) -> bool:
        """Whether the store answers now. A folder always does; a server may not."""
        try:
            with self.scorer.in_service() as served:
                served.store.get_many(ids_of_words(["0"], "user", served.store.manifest.user_kind))
        except StoreUnavailableError as error:
            logger.error("%s", error)
            return False
        except RecordError:  # of this user alone
            return True
        return True

    def problems(self) -> list[str]:
        """What keeps the service from moving to a newer model or generation; empty if nothing does."""
        found, of_model, of_index = [], (self.config.model, CONFIG_FILE), (self.config.index, INDEX_MANIFEST)
        for name, (folder, file) in (("model", of_model), ("index", of_index)):
            if folder is not None and not os.path.isfile(os.path.join(folder, file)):  # also False without permissions
                found.append(f"the folder of the {name} cannot be read; the loaded {name} stays in service")
        if self.scorer.stats().last_reload_error is not None:
            found.append("the last reload failed; the loaded model and generation stay in service (see the log)")
        return found

    def _named(self, held: dict[str, Any]) -> dict[str, Any]:
        """The fields of an answer, and the variant if the service has several models."""
        return held if self.variant is None else {"variant": self.variant, **held}

    def _sourced(self, held: dict[str, Any], users: slice | int = slice(None)) -> dict[str, Any]:
        """An answer that starts with what it was computed from: what this thread's last call read of some users, or of
        one, whose place is given."""
        source = self.scorer.answered_from
        assert source is not None
        first = {
            "generation": source.generation,
            "model_checksum": source.model_checksum,
            "now": None if source.now is None else source.now[users].tolist(),
            "known_user" if isinstance(users, int) else "known_users": source.known[users].tolist(),
        }
        return self._named(first | held)

    def _arguments(self, asked: BodyOfUsers) -> dict[str, Any]:
        """The other arguments of a call."""
        if asked.tail is not None:
            _require_one_per_user(len(asked.tail), asked, "tail")
        return {
            "tail": tail_of(asked.tail, self.scorer.served),
            "now": NOW if asked.now is None else asked.now,
            "request": asked.request or None,
            "adapter": asked.adapter,
        }

    def _of_one(self, asked: BodyOfOne) -> dict[str, Any]:
        """The other arguments of a call for one user."""
        features = {name: [value] if isinstance(value, list) else value for name, value in asked.request.items()}
        return {
            "tail": tail_of(None if asked.tail is None else [asked.tail], self.scorer.served),
            "now": NOW if asked.now is None else asked.now,
            "request": features or None,
            "adapter": asked.adapter,
        }

    def _require_most_users(self, num_users: int) -> None:
        most = self.config.max_users
        if num_users > most:
            raise BodyTooLargeError(f"{num_users:,} users, but at most {most:,} (max_users); send several requests")

    def _require_most(self, num_candidates: int, num_users: int) -> None:
        most = self.config.max_candidates
        if num_candidates * num_users > most:
            raise BodyTooLargeError(
                f"{num_candidates:,} candidates for {num_users} users, but at most {most:,} pairs per request "
                "(max_candidates); send several requests"
            )


def _require_one_per_user(num_lists: int, asked: BodyOfUsers, name: str) -> None:
    if num_lists != len(asked.users):
        raise ValueError(f"{name}: has {num_lists} lists, but there are {len(asked.users)} users; send one per user")


def _ranking(ranking: Ranking) -> dict[str, Any]:
    return {"items": ranking.items.tolist(), "scores": ranking.scores, "num_dropped": ranking.num_dropped}


def _answer(held: dict[str, Any], media_type: str, candidates: Any, num_candidates: int) -> Answer:
    """An answer with arrays: as lists in JSON, and in MessagePack as the bytes of float32 numbers, row by row. With
    candidates (values, offsets), an array of scores becomes one list per user."""
    if media_type == MSGPACK:
        body = msgspec.msgpack.encode(held, enc_hook=lambda array: array.astype("<f4", copy=False).tobytes())
    elif isinstance(candidates, tuple):
        spans = list(pairwise(candidates[1].tolist()))
        body = msgspec.json.encode(held, enc_hook=lambda array: [array[first:stop].tolist() for first, stop in spans])
    else:
        body = msgspec.json.encode(held, enc_hook=np.ndarray.tolist)
    return Answer(body, media_type, num_candidates)


@dataclass(slots=True, eq=False)
class Entry:
    """A request for scores."""

    body: bytes
    media_type: str
    result: Future[Answer] = field(default_factory=Future)


class ScoreBatches:
    """The waiting score requests of one model, of which small ones are scored in one call.

    Each request still has a place of its own in the queue. When its turn comes, it computes itself and some that come
    later, because one call for several users costs much less than a call for each; when their turn comes, their answers
    are there already. There is no pause for others to arrive: a request that finds a free thread is scored alone. Other
    users of a call change scores by rounding at most.
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
    groups: dict[str | None, list[Entry]] = {}
    for entry in filter(lambda entry: _can_join(asked[entry]), asked):
        groups.setdefault(asked[entry].adapter, []).append(entry)
    for together in filter(lambda group: len(group) > 1, groups.values()):
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
    """Answers to several requests with the same adapter, from one call."""
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
        now = body.now if body.now is not None else NOW
        times += now if isinstance(now, list) else [now] * count
    tail, adapter = tails if any(tails) else None, bodies[0].adapter
    merged = ScoreBody(users=users, candidates=[], tail=tail, now=times, adapter=adapter)
    ids = [item for some in values for item in (some if isinstance(some, list) else some.tolist())]
    scores = service.scores(merged, (ids, offsets_of(np.concatenate(lengths))))
    bounds = np.cumsum([own.sum() for own in lengths])[:-1]
    parts, answers, first = np.split(scores, bounds), list[Answer](), 0
    for part, own, body, kind in zip(parts, given, bodies, media_types, strict=True):
        num_users = len(body.users)
        shaped = part if isinstance(own, tuple) else part.reshape(num_users, -1)
        answers.append(service.answer(shaped, own, kind, slice(first, first + num_users)))
        first += num_users
    return answers


def _can_join(body: ScoreBody) -> bool:
    """Whether a request can be part of a call: it has no features, and one entry per user wherever it has a list."""
    count = len(body.users)
    of_users = [body.tail, body.now, body.candidates if any(isinstance(one, list) for one in body.candidates) else None]
    return not body.request and count > 0 and all(len(one) == count for one in of_users if isinstance(one, list))


def user_record(store: StoreReader | ShardedReader, model: ServingModel, user: int | str) -> dict[str, Any] | None:
    """The record of a user as JSON values; None without a record.

    Args:
        store: of the model's summaries.
        model: names the items, actions and features.
        user: an id as in the log.

    Raises:
        StoreError: the record is damaged, or the store is closed.
    """
    stored = store.get_many(cast(list[str], [user]))
    if not stored.found[0]:
        return None
    tail, rows = stored.tail, stored.tail.items
    ids = model.items.ids(np.maximum(rows, 1) - 1).tolist() if len(rows) else []
    events = model.event_features
    of_events = {} if events is None else RowFeatures(tail.features).named(events.values)
    users = model.user_features
    of_user = {} if users is None else RowFeatures(stored.features).named(users.values)
    summary = stored.summary[0].astype(np.float64)
    at = [None if time == NO_TIMESTAMP else int(time) for time in (stored.created_at[0], stored.last_event_ts[0])]
    return {
        "user": user,
        "generation": stored.generation,
        "created_at": at[0],
        "num_events": int(stored.event_count[0]),
        "newest_event_at": at[1],
        "summary_shape": list(summary.shape),
        "summary_norms": np.linalg.norm(summary, axis=1).tolist(),
        "features": {name: column.tolist()[0] for name, column in of_user.items()},
        "counted_keys": {
            field: len(one.key)
            for one in stored.counters[:1]
            for field, one in zip(one.spec.fields, stored.counters, strict=True)
        },
        "tail": [
            {
                "item": ids[place] if rows[place] else None,
                "time": int(tail.times[place]),
                "action": model.schema.actions[tail.actions[place]] if model.schema.actions else None,
                "features": {name: column.tolist()[place] for name, column in of_events.items()},
            }
            for place in range(len(rows))
        ],
    }
