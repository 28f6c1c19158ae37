"""One process of the service: its models, its queues, and uvicorn."""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import math
import signal
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from functools import partial

import uvicorn

from vista.config import ServeConfig
from vista.config.serve_config import ModelsFile
from vista.device import cpu_settings, return_freed_memory
from vista.machine import is_loopback, private_bytes
from vista.serve.application import ScoringQueue, accepted_hosts, make_application
from vista.serve.http_protocol import HEAD_S, BoundedHttpProtocol
from vista.serve.served_models import ServedModels
from vista.serve.service_metrics import ServiceMetrics
from vista.serve.shadow import ShadowProcess
from vista.serve.shared import read_tokens

logger = logging.getLogger(__name__)

UPDATE_S = 1.0
"""Seconds between two updates of the metrics that several workers share."""

UNUSED_S = 10.0
"""Seconds between checks of the memory that this process keeps after large requests."""
MAX_UNUSED_BYTES = 8 << 20
"""Memory that it may keep. If it keeps more, freed memory is returned to the system."""
BUSY_S = 0.01
"""Seconds between looks for a moment without requests, once there is memory to return."""

KEEP_ALIVE_S = 75
"""An idle connection is closed after this time: later than load balancers do (60 s or less), so that they do not send a
request into a connection that is being closed."""


def run_worker(
    config: ServeConfig,
    file: ModelsFile | None,
    listening: socket.socket,
    on_startup: Callable[[], None],
    *,
    others_serve: bool = False,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that are running.

    If the store or index still belongs to another model, opening is tried again every `reload_s`, because the rest of
    an upgrade may be published soon.

    Args:
        config: of the service.
        file: what `config.models` names.
        listening: bound, but not yet listening, so that no connection waits for a worker that cannot start.
        on_startup: called once the worker listens.
        others_serve: whether other workers answer requests. If so, this one does not listen before it can answer
            them for at least one model. Otherwise, it listens at once. Requests for models that wait get status 503.

    Raises:
        VistaError: a model, its store, or a token cannot be used.
    """
    # Else a process that reads a mapped file which was truncated ends without a message. 2 is the standard error.
    faulthandler.enable(2)
    tokens, metrics = read_tokens(config.token_file), ServiceMetrics()
    with (
        ExitStack() as stack,
        cpu_settings(config.num_threads),
        closing(ServedModels.of(config, file, metrics)) as models,
        closing(ScoringQueue(config.scoring_threads, config.max_waiting)) as queue,
        closing(ScoringQueue(1, config.max_waiting)) as openings,
    ):
        models.open_first()
        while models.all_wait and others_serve:
            time.sleep(config.reload_s)
            models.open_waiting()
        hosts = None if tokens or not is_loopback(listening) else accepted_hosts(config.host)
        shadow = None
        if config.shadow_model is not None:
            shadow = ShadowProcess(config, lambda outcome: metrics.shadowed.labels(outcome).inc())
            stack.callback(shadow.close)
        app = make_application(models, queue, openings, metrics, config, tokens, hosts, shadow)
        server = _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=partial(  # type: ignore[arg-type]  # It is only called.
                    BoundedHttpProtocol,
                    max_connections=config.max_connections,
                    body_s=config.deadline_s + HEAD_S,
                    on_refused_connection=metrics.refused_connections.inc,
                    on_refused_request=metrics.refused,
                ),
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",  # A warning per request that is not HTTP would let clients fill the disk.
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=math.ceil(config.stop_s),
            ),
            on_startup,
        )
        # uvicorn raises a signal again once it has stopped, which would end the process before it has cleaned up.
        for one in (signal.SIGTERM, signal.SIGINT):
            signal.signal(one, server.handle_exit)

        async def serve() -> None:
            tasks = [
                asyncio.create_task(_update(models, queue, openings)),
                asyncio.create_task(_return_memory(queue, openings)),
                asyncio.create_task(_open_waiting(models, config.reload_s)),
            ]
            await server.serve(sockets=[listening])
            for task in tasks:
                task.cancel()

        with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
            runner.run(serve())


class _Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, on_startup: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_startup = on_startup

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._on_startup()


async def _open_waiting(models: ServedModels, reload_s: float) -> None:
    while models.waiting:
        await asyncio.sleep(reload_s)
        await asyncio.to_thread(models.open_waiting)


async def _update(models: ServedModels, *queues: ScoringQueue) -> None:
    last = ""
    while True:
        try:
            models.update_metrics(sum(queue.depth for queue in queues))
        except Exception as error:  # Without this, the task would end silently.
            if (text := repr(error)) != last:
                last = text
                logger.exception("the metrics could not be updated; this is tried again every %g s", UPDATE_S)
        await asyncio.sleep(UPDATE_S)


async def _return_memory(*queues: ScoringQueue) -> None:
    """Return memory that large requests freed, while no request is queued or running.

    Requests reuse memory that earlier ones freed, so returns are seconds apart, and small amounts are kept. Each
    return is repeated once, because bodies that were being received would count as memory that is needed.
    """
    least, was_due = private_bytes(), False
    while True:
        await asyncio.sleep(UNUSED_S)
        is_due = private_bytes() > least + MAX_UNUSED_BYTES
        if is_due or was_due:
            while any(queue.depth for queue in queues):
                await asyncio.sleep(BUSY_S)
            await asyncio.to_thread(return_freed_memory)  # 20 ms per 100 MB
            least = private_bytes()
        was_due = is_due
