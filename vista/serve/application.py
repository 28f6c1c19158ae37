"""The FastAPI application: routes, limits, and deadlines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import fastapi
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

from vista.config import ServeConfig
from vista.errors import DeadlineError, ModelUnavailableError
from vista.installation import __version__
from vista.serve.body_reader import BodyReader, number_of
from vista.serve.error_answer import ErrorAnswer, answer_of
from vista.serve.openapi import DESCRIPTION, operation, schemas
from vista.serve.readiness import readiness
from vista.serve.request_bodies import (
    JSON,
    MSGPACK,
    Addressee,
    ExplainBody,
    RankBody,
    RetrieveBody,
    ScoreBody,
    decoded,
)
from vista.serve.request_checks import HostCheck, TokenCheck
from vista.serve.score_batches import ScoreBatches
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.scoring_service import Answer, ScoringService
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics
from vista.store.layout import store_address

TIMEOUT_HEADER = "vista-timeout-ms"
Endpoint = Callable[[fastapi.Request], Awaitable[fastapi.Response]]
Computation = Callable[[str, bytes, str, float], Awaitable[Answer]]
"""Maps the name of a model, a body, its media type, and the deadline, s of `perf_counter`, to an answer."""


def make_application(
    models: ServedModels,
    queue: ScoringQueue,
    openings: ScoringQueue,
    metrics: ServiceMetrics,
    config: ServeConfig,
    tokens: Sequence[bytes],
    hosts: Sequence[str] | None = None,
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
    """
    app = fastapi.FastAPI(title="vista", version=__version__, description=DESCRIPTION)
    if tokens:
        app.add_middleware(TokenCheck, tokens=tokens, on_refused=metrics.refused)
    if hosts is not None:
        app.add_middleware(HostCheck, hosts=hosts, on_refused=metrics.refused)
    stores = [str(store_address(one.store)) for one in models.configs.values()]
    batches = {name: ScoreBatches() for name in models.configs}

    bodies = BodyReader(config.max_body_bytes)

    async def run(name: str, compute: Callable[[ScoringService], Answer], deadline: float) -> Answer:
        """The answer of a model. If the model is not open, the thread that opens it also computes the answer, so that
        the model cannot be closed in between."""

        def answer_if_open() -> Answer | None:
            with models.use_if_open(name) as service:
                return None if service is None else compute(service)

        def open_and_answer() -> Answer:
            with models.use(name) as service:
                return compute(service)

        if models.is_open(name):
            held = await queue.run(answer_if_open, deadline - time.perf_counter())
            if held is not None:
                return held
            # The model was closed while the request waited. Opening it in this queue would delay other requests.
        try:
            return await openings.run(open_and_answer, deadline - time.perf_counter())
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

    def queued(compute: Callable[[ScoringService, bytes, str], Answer]) -> Computation:
        return lambda name, body, media_type, deadline: run(
            name, lambda service: compute(service, body, media_type), deadline
        )

    def named(body: bytes, media_type: str) -> str:
        """The model that answers a body."""
        if not models.are_several and b"model" not in body:
            return models.first
        asked = decoded(body, Addressee, media_type)
        return models.chosen(asked.model, asked.users if asked.user is None else [asked.user])

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
                    model = choose(body, media_type)
                    held = await compute(model, body, media_type, deadline)
                num_candidates = held.num_candidates
                response = fastapi.Response(held.body, media_type=held.media_type)
            except DeadlineError:
                told = f"there was no result after {1000 * timeout_s:g} ms; send fewer candidates, or allow more time"
                response = answer_of(DeadlineError(told), stores).as_response()
            except Exception as error:
                response = answer_of(error, stores).as_response()
            metrics.answered(name, model, response.status_code, time.perf_counter() - began, num_candidates)
            return response

        return answer

    for name, compute, kind, summary in (
        ("score", score, ScoreBody, "Scores of one task."),
        ("predict", queued(ScoringService.predict), ScoreBody, "Scores of all tasks."),
        ("rank", queued(ScoringService.rank), RankBody, "The best items for a user."),
        (
            "retrieve",
            queued(ScoringService.retrieve),
            RetrieveBody,
            "The best items of a large catalog, from the item index.",
        ),
        ("explain", queued(ScoringService.explain), ExplainBody, "Shares of scores, per part of the model's input."),
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
