"""The FastAPI application: routes, limits, deadlines, and the token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, MutableMapping
from functools import partial
from typing import Any

from vista.config import ServeConfig
from vista.errors import BodyTooLargeError, SlowBodyError
from vista.serve.bearer_token import is_authorized
from vista.serve.error_answer import ErrorAnswer, answer_of
from vista.serve.openapi import DESCRIPTION, operation, schemas
from vista.serve.request_bodies import JSON, MSGPACK, ExplainBody, RankBody, ScoreBody
from vista.serve.score_batches import ScoreBatches
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.scoring_service import Answer, ScoringService
from vista.serve.serve_extra import ClientDisconnect, fastapi
from vista.serve.service_metrics import ServiceMetrics
from vista.version import __version__

TIMEOUT_HEADER = "vista-timeout-ms"
OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no token, for the probes of load balancers."""
NO_TOKEN = ErrorAnswer(401, "Unauthorized", "send the token as the header `Authorization: Bearer TOKEN`")
Endpoint = Callable[[fastapi.Request], Awaitable[fastapi.Response]]
Computation = Callable[[bytes, str, float], Awaitable[Answer]]
"""Maps a body, its media type, and the remaining seconds to an answer."""
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]


class TokenCheck:
    """Refuses requests without the token, before their bodies are read."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], token: bytes) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            header = dict(scope["headers"]).get(b"authorization")
            if not is_authorized(header, self._token):
                refusal = _refusal(NO_TOKEN)
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def make_application(
    service: ScoringService, queue: ScoringQueue, metrics: ServiceMetrics, config: ServeConfig, token: bytes | None
) -> fastapi.FastAPI:
    """The application of one worker."""
    app = fastapi.FastAPI(title="vista", version=__version__, description=DESCRIPTION)
    if token is not None:
        app.add_middleware(TokenCheck, token=token)
    store = str(service.scorer.store.path)

    batches = ScoreBatches(service)

    async def score(body: bytes, media_type: str, timeout_s: float) -> Answer:
        entry = batches.enter(body, media_type)
        try:
            return await queue.run(partial(batches.answer, entry), timeout_s)
        finally:
            batches.leave(entry)

    def queued(compute: Callable[[bytes, str], Answer]) -> Computation:
        return lambda body, media_type, timeout_s: queue.run(partial(compute, body, media_type), timeout_s)

    def endpoint(name: str, compute: Computation) -> Endpoint:
        """The endpoint of a computation."""

        async def answer(request: fastapi.Request) -> fastapi.Response:
            began, num_candidates = time.perf_counter(), 0
            deadline = began + _timeout_s(request, config.deadline_s)
            try:
                media_type = _media_type(request)
                body = await _body(request, config.max_body_bytes, deadline)
                held = await compute(body, media_type, deadline - time.perf_counter())
                num_candidates = held.num_candidates
                response = fastapi.Response(held.body, media_type=held.media_type)
            except Exception as error:
                response = _refusal(answer_of(error, store))
            metrics.answered(name, response.status_code, time.perf_counter() - began, num_candidates)
            return response

        return answer

    for name, compute, kind, summary in (
        ("score", score, ScoreBody, "Scores of one task."),
        ("predict", queued(service.predict), ScoreBody, "Scores of all tasks."),
        ("rank", queued(service.rank), RankBody, "The best items for a user."),
        ("explain", queued(service.explain), ExplainBody, "Shares of scores, per part of the model's input."),
    ):
        app.post(f"/v1/{name}", summary=summary, openapi_extra=operation(name, kind))(endpoint(name, compute))

    @app.get("/v1/users/{user:path}")
    async def user(request: fastapi.Request, user: str) -> fastapi.Response:
        """What the record of a user holds: the events it covers, the tail, and the norms of the summary."""
        return await endpoint("users", queued(lambda *_: service.user(user)))(request)

    @app.get("/v1/model")
    async def model(request: fastapi.Request) -> fastapi.Response:
        """What is in service: tasks, actions, features, sizes, and the generation of the store."""
        return await endpoint("model", queued(lambda *_: service.model()))(request)

    @app.get("/healthz")
    async def health() -> dict[str, str]:
        """Whether the process answers."""
        return {"status": "ok"}

    @app.get("/readyz")
    async def ready(response: fastapi.Response) -> dict[str, Any]:
        """Whether the service can score (503 if the store does not answer), and what keeps it from following the model
        or the store."""
        reads, problems = await asyncio.to_thread(lambda: (service.reads_store(), service.problems()))
        if not reads:
            response.status_code = 503
            problems = ["the store does not answer (see the log)", *problems]
        return {"ready": reads, "generation": service.scorer.manifest.generation, "problems": problems}

    @app.get("/metrics")
    async def numbers() -> fastapi.Response:
        """What the service counts, in Prometheus' format."""
        metrics.update(service.scorer, queue.depth)
        return fastapi.Response(await asyncio.to_thread(metrics.page), media_type="text/plain; version=0.0.4")

    bare = app.openapi

    def with_schemas() -> dict[str, Any]:
        page = bare()
        page.setdefault("components", {}).setdefault("schemas", {}).update(schemas())
        return page

    app.openapi = with_schemas  # type: ignore[method-assign]
    return app


def _refusal(answer: ErrorAnswer) -> fastapi.Response:
    headers = {} if answer.retry_after_s is None else {"Retry-After": str(answer.retry_after_s)}
    return fastapi.Response(answer.as_json(), answer.status, headers, JSON)


def _media_type(request: fastapi.Request) -> str:
    """JSON unless the client sends MessagePack; curl's default, a form, counts as JSON too."""
    given = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
    return MSGPACK if given in (MSGPACK, "application/x-msgpack", "application/vnd.msgpack") else JSON


def _timeout_s(request: fastapi.Request, most: float) -> float:
    """Seconds that a request may take; a header that is not a positive number of milliseconds does not count."""
    given = request.headers.get(TIMEOUT_HEADER, "")
    return min(most, int(given) / 1000) if given.isascii() and given.isdigit() and int(given) else most


async def _body(request: fastapi.Request, limit: int, deadline: float) -> bytes:
    """The body of a request.

    Raises:
        BodyTooLargeError: it is longer than the limit; the rest is not kept.
        SlowBodyError: it is not complete at the deadline, or the client has closed the connection.
    """
    said = request.headers.get("content-length", "0")
    too_large = BodyTooLargeError(f"the body has more than {limit:,} bytes (max_body_bytes); send several requests")
    if said.isdigit() and int(said) > limit:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(deadline - time.perf_counter()):
            async for part in request.stream():
                size += len(part)
                if size > limit:
                    raise too_large
                parts.append(part)
    except TimeoutError:
        raise SlowBodyError("the body did not arrive within the deadline of the request") from None
    except ClientDisconnect:
        raise SlowBodyError("the connection was closed before the end of the body") from None
    return b"".join(parts)
