"""The FastAPI application: routes, limits, and deadlines, the queue in front of the threads, and checks of headers."""

from __future__ import annotations

import asyncio
import hmac
import os
import threading
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

import fastapi
import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from vista.config import ServeConfig
from vista.errors import BodyTooLargeError, DeadlineError, ModelUnavailableError, OverloadedError, SlowBodyError
from vista.installation import __version__
from vista.machine import LOCAL_HOSTS, names_host
from vista.model.saved_model import CONFIG_FILE
from vista.serve.http_protocol import ErrorAnswer, answer_of
from vista.serve.scoring_service import (
    JSON,
    MAX_VALUES,
    MSGPACK,
    Addressee,
    Answer,
    ExplainBody,
    Id,
    RankBody,
    RetrieveBody,
    ScoreBatches,
    ScoreBody,
    ScoringService,
    decoded,
    parsed,
)
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics
from vista.serve.shadow import ENDPOINTS, ShadowProcess
from vista.store.layout import store_address

NUM_LARGE = 16
"""Bodies of the largest size that a worker holds at the same time; smaller ones are more."""
OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no token, for the probes of load balancers."""
NO_TOKEN = ErrorAnswer(401, "Unauthorized", "send the token as one header, `Authorization: Bearer TOKEN`")
TIMEOUT_HEADER = "vista-timeout-ms"
Endpoint = Callable[[fastapi.Request], Awaitable[fastapi.Response]]
Computation = Callable[[str, bytes, str, float], Awaitable[Answer]]
"""Maps the name of a model, a body, its media type, and the deadline, s of `perf_counter`, to an answer."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Result = TypeVar("Result")


def make_application(
    models: ServedModels,
    queue: ScoringQueue,
    openings: ScoringQueue,
    metrics: ServiceMetrics,
    config: ServeConfig,
    tokens: Sequence[bytes],
    hosts: Sequence[str] | None = None,
    shadow: ShadowProcess | None = None,
) -> fastapi.FastAPI:
    """The application of one worker.

    Args:
        models: what it serves.
        queue: computes answers of open models.
        openings: opens models and computes the answers to the requests that wait for them. Other requests do not wait.
        metrics: count requests.
        config: of the service.
        tokens: clients must send one of them; empty if no token is needed.
        hosts: names that clients may send in the header Host; None accepts all.
        shadow: gets copies of requests and answers; None without a challenger.
    """
    app = fastapi.FastAPI(title="vista", version=__version__, description=DESCRIPTION)
    app.add_middleware(AccessCheck, tokens=tokens, hosts=hosts, on_refused=metrics.refused)
    stores = [str(store_address(one.store)) for one in models.configs.values()]
    batches = {name: ScoreBatches() for name in models.configs}
    bodies = BodyReader(config.max_body_bytes)

    async def run(name: str, compute: Callable[[ScoringService], Answer], deadline: float) -> Answer:
        """The answer of a model. If the model is not open, the thread that opens it also computes the answer."""
        service = models.opened(name)
        if service is not None:
            return await queue.run(partial(compute, service), deadline - time.perf_counter())
        try:
            return await openings.run(lambda: compute(models.open(name)), deadline - time.perf_counter())
        except DeadlineError:
            if models.is_open(name):
                raise
            raise ModelUnavailableError(f"model {name} is still being opened; send the request again later") from None

    async def score(name: str, body: bytes, media_type: str, deadline: float) -> Answer:
        entry = batches[name].enter(body, media_type)
        try:
            return await run(name, partial(batches[name].answer, entry), deadline)
        finally:
            batches[name].leave(entry)

    async def rank(name: str, body: bytes, media_type: str, deadline: float) -> Answer:
        return await run(name, lambda one: one.rank(body, media_type, deadline - time.perf_counter()), deadline)

    def queued(compute: Callable[[ScoringService, bytes, str], Answer]) -> Computation:
        return lambda name, body, media_type, deadline: run(
            name, lambda service: compute(service, body, media_type), deadline
        )

    def named(body: bytes, media_type: str) -> str:
        """The model that answers a body."""
        if not models.are_several and b"model" not in body and b"\\" not in body:  # which JSON may spell with escapes
            return models.first
        asked = parsed(body, Addressee, media_type)
        if asked.user is not None or asked.model is not None or models.split is None or not bytes(asked.users):
            return models.chosen(asked.model, [] if asked.user is None else [asked.user])
        try:
            return models.chosen(None, decoded(bytes(asked.users), list[Id], media_type))
        except msgspec.ValidationError:
            return models.first  # which refuses the body, and names the field

    def endpoint(name: str, compute: Computation, choose: Callable[[bytes, str], str] = named) -> Endpoint:
        """The endpoint of a computation; `choose` gives the model for a body and its media type."""

        async def answer(request: fastapi.Request) -> fastapi.Response:
            began, model, num_candidates = time.perf_counter(), "", 0
            timeout_s = _timeout_s(request, config.deadline_s)
            deadline = began + timeout_s
            try:
                queue.require_room()
                async with bodies.body(request, deadline) as body:
                    media_type = _media_type(request)
                    if len(body) <= MAX_VALUES:
                        model = choose(body, media_type)
                    else:  # Parsing it can take long.
                        model = await asyncio.to_thread(choose, body, media_type)
                    held = await compute(model, body, media_type, deadline)
                    if shadow is not None and name in ENDPOINTS:  # once the answer is sent
                        asyncio.get_running_loop().call_soon(shadow.offer, name, body, media_type, held.body)
                num_candidates = held.num_candidates
                response = fastapi.Response(held.body, media_type=held.media_type)
            except DeadlineError:
                told = f"there was no result after {1000 * timeout_s:g} ms; send fewer candidates, or allow more time"
                response = answer_of(DeadlineError(told), stores).as_response()
            except Exception as error:
                response = answer_of(error, stores).as_response()
                # These refer to the error again. Such cycles would keep bodies and their values for a long time.
                traceback.clear_frames(error.__traceback__)
            metrics.answered(name, model, response.status_code, time.perf_counter() - began, num_candidates)
            return response

        return answer

    for name, compute, kind, summary in (
        ("score", score, ScoreBody, "Scores of one task."),
        ("predict", queued(ScoringService.predict), ScoreBody, "Scores of all tasks."),
        ("rank", rank, RankBody, "The best items for a user."),
        (
            "retrieve",
            queued(ScoringService.retrieve),
            RetrieveBody,
            "The best items of a large catalog, from the item index.",
        ),
        (
            "explain",
            queued(ScoringService.explain),
            ExplainBody,
            "Why items have their scores, in shares and in words.",
        ),
    ):
        app.post(f"/v1/{name}", summary=summary, openapi_extra=operation(name, kind))(endpoint(name, compute))

    @app.exception_handler(HTTPException)
    async def refuse(_: fastapi.Request, error: HTTPException) -> fastapi.Response:
        """What the framework refuses: paths and methods that do not exist."""
        told = f"{error.detail}; see /docs for the endpoints"
        refusal = ErrorAnswer(error.status_code, type(error).__name__, told).as_response()
        refusal.headers.update(error.headers or {})
        metrics.refused(error.status_code)
        return refusal

    @app.get("/v1/users/{user:path}")
    async def user(request: fastapi.Request, user: str, model: str | None = None) -> fastapi.Response:
        """What the record of a user holds: the events it covers, the tail, and the norms of the summary. With several
        models, it is the record that a request for this user would read."""
        compute = queued(lambda service, *_: service.user(user))
        return await endpoint("users", compute, lambda *_: models.chosen(model, [user]))(request)

    @app.get("/v1/model")
    async def describe(request: fastapi.Request, model: str | None = None) -> fastapi.Response:
        """What is in service: tasks, actions, features, sizes, and the generation of the store. With several models, it
        describes the first one, unless `model` names another, and lists all."""
        compute = queued(lambda service, *_: service.model(models.overview()))
        return await endpoint("model", compute, lambda *_: models.chosen(model, []))(request)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    probe: asyncio.Task[dict[str, Any]] | None = None

    @app.get("/readyz")
    async def ready(response: fastapi.Response) -> dict[str, Any]:
        """Whether the service can score (503 if the store of an open model does not answer), and what keeps it from
        following the models or the stores."""
        nonlocal probe
        if probe is None or probe.done():  # Else a store that hangs would hold a thread for each request.
            probe = asyncio.create_task(asyncio.to_thread(readiness, models))
        state = await asyncio.shield(probe)
        response.status_code = 200 if state["ready"] else 503
        return state

    @app.get("/metrics", response_class=PlainTextResponse)
    async def numbers() -> fastapi.Response:
        """What the service counts, in Prometheus' format."""
        models.update_metrics(queue.depth + openings.depth)
        return fastapi.Response(await asyncio.to_thread(metrics.page), media_type="text/plain; version=0.0.4")

    bare = app.openapi

    def with_schemas() -> dict[str, Any]:
        page = bare()
        page.setdefault("components", {}).setdefault("schemas", {}).update(schemas())
        return page

    app.openapi = with_schemas  # type: ignore[method-assign]
    return app


def _media_type(request: fastapi.Request) -> str:
    """JSON unless the client sends MessagePack; curl's default, a form, counts as JSON too."""
    given = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    return MSGPACK if given in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack") else JSON


def _timeout_s(request: fastapi.Request, most: float) -> float:
    """Seconds that a request may take; a header that is not a positive number of milliseconds does not count."""
    given = number_of(request.headers.get(TIMEOUT_HEADER, ""))
    return min(most, given / 1000) if given else most


class ScoringQueue:
    """A queue of limited length in front of a few threads.

    Args:
        num_threads: requests that are computed at the same time.
        limit: most requests that wait or are computed.
    """

    def __init__(self, num_threads: int, limit: int) -> None:
        self._pool = ThreadPoolExecutor(num_threads, "vista-serve")
        self._limit = limit
        self._depth = 0
        self._lock = threading.Lock()

    @property
    def depth(self) -> int:
        """Requests that wait or are computed."""
        return self._depth

    def require_room(self) -> None:
        """Raise OverloadedError if the queue is full."""
        if self._depth >= self._limit:
            raise OverloadedError(f"{self._depth} requests are already waiting; send this one again later")

    async def run(self, call: Callable[[], Result], timeout_s: float) -> Result:
        """The result of a call, which runs in a thread.

        A call that has not started by its deadline never starts. One that has started keeps its place until it ends.

        Raises:
            OverloadedError: the queue is full.
            DeadlineError: there is no result after `timeout_s` seconds.
        """
        with self._lock:
            self.require_room()
            self._depth += 1
        held = [call]  # The pool keeps a call that never starts until a thread is free. It must not keep its body.
        future: Future[Result] = self._pool.submit(lambda: held.pop()())
        future.add_done_callback(self._finished)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout_s)
        except TimeoutError:
            raise DeadlineError("there was no result in time; send fewer candidates, or allow more time") from None
        finally:
            held.clear()

    def close(self) -> None:
        """Wait for running calls, and end the threads."""
        self._pool.shutdown()

    def _finished(self, future: Future[Any]) -> None:
        with self._lock:
            self._depth -= 1
        # If nobody waits for the error, cycles through its frames would keep the body and its values for a long time.
        if not future.cancelled() and (error := future.exception()) is not None:
            traceback.clear_frames(error.__traceback__)


class BodyReader:
    """Reads bodies, and counts the bytes of those that are not answered yet. For one event loop.

    Args:
        most_bytes: of a body.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._most_held = NUM_LARGE * most_bytes
        self._held = 0

    @asynccontextmanager
    async def body(self, request: fastapi.Request, deadline: float) -> AsyncIterator[bytes]:
        """The body of a request, which counts until the context ends.

        Args:
            request: of which nothing has been read.
            deadline: s of `time.perf_counter`.

        Raises:
            BodyTooLargeError: it is longer than the limit; the rest is not kept.
            OverloadedError: with it, bodies would take more memory than all may take together.
            SlowBodyError: it is not complete at the deadline, or the client has closed the connection.
        """
        most = self._most_bytes
        too_large = BodyTooLargeError(f"the body has more than {most:,} bytes (max_body_bytes); send several requests")
        if (number_of(request.headers.get("content-length", "")) or 0) > most:
            raise too_large
        parts: list[bytes] = []
        size = 0
        try:
            try:
                async with asyncio.timeout(deadline - time.perf_counter()):
                    async for part in request.stream():
                        size += len(part)
                        self._held += len(part)
                        if size > most:
                            raise too_large
                        if self._held > self._most_held:
                            raise OverloadedError(
                                f"the bodies of waiting requests take {self._most_held:,} bytes already; send this one "
                                "again later"
                            )
                        parts.append(part)
            except TimeoutError:
                raise SlowBodyError("the body did not arrive within the deadline of the request") from None
            except ClientDisconnect:
                raise SlowBodyError("the connection was closed before the end of the body") from None
            yield b"".join(parts)
        finally:
            self._held -= size


def number_of(text: str) -> int | None:
    """The number that a header holds; None if it is not a natural number of at most 18 digits."""
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 18 else None


def readiness(models: ServedModels) -> dict[str, Any]:
    """The state of a worker.

    Returns:
        ready: whether the store of at least one open model answers. If those of some models do not, load balancers must
            not take all machines out of service.
        generation: that of the store; with several models, those of the open ones by name.
        problems: texts; with several models, they begin with the name of one.
    """
    problems: dict[str, list[str]] = {name: [] for name in models.configs}
    generations, answers = {}, []
    for name, service in models.open_services().items():
        answers.append(service.reads_store())
        if not answers[-1]:
            problems[name].append("the store does not answer (see the log)")
        problems[name] += service.problems()
        generations[name] = service.scorer.manifest.generation
    for name, config in models.configs.items():
        if name in generations:
            continue
        problem = models.problem(name)
        if problem is not None:
            problems[name].append(problem)
        elif not os.path.isfile(os.path.join(config.model, CONFIG_FILE)):
            problems[name].append("the folder of the model cannot be read, so it cannot be opened")
    several = models.are_several
    return {
        "ready": any(answers),
        "generation": generations if several else next(iter(generations.values()), None),
        "problems": [f"{name}: {text}" if several else text for name, own in problems.items() for text in own],
    }


class AccessCheck:
    """Refuses requests without a token; for a service that needs none, those that name another host (`names_host`).

    Args:
        app: gets the other requests.
        tokens: one of them must be sent; empty if none is needed.
        hosts: names that are accepted; None accepts all.
        on_refused: called with the status of each refusal.
    """

    def __init__(
        self, app: Application, tokens: Sequence[bytes], hosts: Sequence[str] | None, on_refused: Callable[[int], None]
    ) -> None:
        self._app, self._tokens, self._hosts, self._on_refused = app, tokens, hosts, on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401 or 421."""
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        if refusal is not None:
            self._on_refused(refusal.status_code)
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> fastapi.Response | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        if self._tokens and scope["path"] not in OPEN_PATHS:
            given = [value for name, value in headers if name == b"authorization"]
            if len(given) != 1 or not is_authorized(given[0], self._tokens):
                refusal = NO_TOKEN.as_response()
                refusal.headers["WWW-Authenticate"] = "Bearer"
                return refusal
        hosts = self._hosts
        if hosts is not None and not all(names_host(value, hosts) for name, value in headers if name == b"host"):
            text = f"without a token, the service only answers requests to {', '.join(hosts)}; set token_file"
            return ErrorAnswer(421, "WrongHostError", text).as_response()
        return None


def is_authorized(header: bytes, tokens: Sequence[bytes]) -> bool:
    """Whether the value of the header Authorization holds a token; takes the same time for any wrong token."""
    scheme, _, given = header.partition(b" ")
    same = [hmac.compare_digest(given.strip(), token) for token in tokens]
    return any(same) and scheme.lower() == b"bearer"


def accepted_hosts(host: str) -> list[str]:
    """Names of this machine that clients may send, if the service listens on `host`."""
    own = f"[{host}]" if ":" in host else host.lower()
    return list(dict.fromkeys([*LOCAL_HOSTS, own]))


# What the OpenAPI page says about the bodies of requests. A test sends every example.

DESCRIPTION = """
Scores candidates for users from their cached summaries. Users and items have the ids of your log: integers or strings.

Bodies are JSON. With `Content-Type: application/msgpack`, they are MessagePack, and scores come back as the bytes of
float32 numbers in little-endian order, row by row.

The examples have integer ids and an action named `click`. `/v1/model` says what the ids of your log are, and how its
actions are named.

Each answer says what it was computed from: the generation of the store (`generation`), the model (`model_checksum`, as
in `/v1/model`), the time of the request (`now`, in ms), and whether the store has a record of the user (`known_user`).
Unless the service runs with `on_missing=raise`, a user without a record gets the answer of a user without history.
Answers for several users have lists, in `now` and `known_users`.

An error is `{"error": {"type": ..., "message": ...}}`. Send a request again after a connection error, and after 429 and
503 when the time in `Retry-After` has passed: no request changes anything.
"""
STATUSES = {
    "400": "The body is not valid JSON or MessagePack, or the service has no index of items (`/v1/retrieve`).",
    "401": "The token is missing or wrong.",
    "404": "A user or item is unknown, and the service runs with `on_missing=raise`; or the `model` does not exist.",
    "408": "The body did not arrive in time.",
    "413": "The body is too large, or has too many values, users, or candidates.",
    "421": "The service needs no token, and the request names another host.",
    "422": "A field is missing, unknown, or has a wrong type or value.",
    "429": "Too many requests are waiting. Try again after `Retry-After` seconds.",
    "431": "The headers are too long or too many.",
    "503": "The server of the store does not answer, or the model is not open yet. Try again after `Retry-After` s.",
    "504": "There was no result within the deadline.",
}
REFERENCE = "#/components/schemas/{name}"


def schemas() -> dict[str, Any]:
    """JSON schemas of the bodies by name."""
    return dict(
        msgspec.json.schema_components([ScoreBody, RankBody, RetrieveBody, ExplainBody], ref_template=REFERENCE)[1]
    )


def operation(name: str, kind: type[msgspec.Struct]) -> dict[str, Any]:
    """The part of an operation that FastAPI cannot know: its body, and the statuses of errors."""
    schema = {"$ref": REFERENCE.format(name=kind.__name__)}
    return {
        "requestBody": {
            "required": True,
            "content": {JSON: {"schema": schema, "examples": _EXAMPLES[name]}, MSGPACK: {"schema": schema}},
        },
        "responses": {
            "200": {
                "description": "Computed from this generation of the store and this model.",
                "content": {JSON: {"example": {**_SOURCE, **ANSWERS[name]}}},
            },
            **{status: {"description": text} for status, text in STATUSES.items()},
        },
    }


_NOW = 1_767_400_000_000
_SCORE = {
    "one user": {"value": {"users": [101], "candidates": [10, 20, 30]}},
    "two users with a list each": {"value": {"users": [101, 102], "candidates": [[10, 20], [30]], "now": _NOW}},
    "events since the refresh": {
        "value": {
            "users": [101],
            "candidates": [10, 20],
            "tail": [[{"item": 30, "time": _NOW - 60_000, "action": "click"}]],
            "now": _NOW,
        }
    },
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "score": _SCORE,
    "predict": _SCORE,
    "rank": {
        "the whole catalog": {"value": {"user": 101, "top_k": 5, "exclude_tail": True}},
        "some candidates": {"value": {"user": 101, "candidates": [10, 20, 30], "exclude": [20]}},
    },
    "retrieve": {
        "two users": {"value": {"users": [101, 102], "top_k": 5, "num_candidates": 100, "exclude_tail": True}},
        "items in stock": {"value": {"users": [101], "within": [10, 20, 30], "exclude": [20], "now": _NOW}},
    },
    "explain": {
        "among the catalog": {"value": {"user": 101, "items": [10, 20]}},
        "among some items": {"value": {"user": 101, "items": [10], "candidates": [10, 20, 30]}},
    },
}
_SOURCE = {"generation": 7, "model_checksum": "93a1c04be1f2d687"}
_OF_USERS, _OF_USER = {"now": [_NOW], "known_users": [True]}, {"now": _NOW, "known_user": True}
_RANKING = {"items": [20, 10], "scores": [0.75, 0.5], "num_dropped": 0}
ANSWERS: dict[str, dict[str, Any]] = {
    "score": {**_OF_USERS, "task": "click", "scores": [[0.5, 0.75, 0.25]]},
    "predict": {**_OF_USERS, "scores": {"click": [[0.5, 0.75, 0.25]], "next": [[2.5, 3.0, -1.5]]}},
    "rank": {**_OF_USER, "task": "click", **_RANKING},
    "retrieve": {**_OF_USERS, "task": "click", "rankings": [_RANKING]},
    "explain": {
        **_OF_USER,
        "task": "click",
        "items": [10],
        "value": [1.0],
        "mean": 0.25,
        "shares": {"tail": [0.5], "summary": [0.5], "own": [-0.25]},
        "tail": [[0.5]],
        "tail_items": [30],
        "counts": [[]],
        "reasons": [[{"part": "tail", "share": 0.5, "text": "attention to the newest events, most of all to 30"}]],
    },
}
"""Example answers by endpoint, without `_SOURCE` and `variant`, which services with several models add."""
