"""One process of the service: a scorer, its queue, and uvicorn."""

from __future__ import annotations

import asyncio
import logging
import math
import signal
import socket
from collections.abc import Callable
from contextlib import closing

from vista.config import ServeConfig
from vista.device import cpu_settings
from vista.errors import ConfigError, VistaError
from vista.scorer import Scorer
from vista.serve.application import make_application
from vista.serve.bearer_token import read_token
from vista.serve.http_protocol import BoundedHttpProtocol
from vista.serve.scoring_queue import ScoringQueue
from vista.serve.scoring_service import ScoringService
from vista.serve.serve_extra import uvicorn
from vista.serve.service_metrics import ServiceMetrics
from vista.store.format.authentication import read_key

logger = logging.getLogger(__name__)

UPDATE_S = 1.0
"""Seconds between two updates of the metrics that several workers share."""

KEEP_ALIVE_S = 75
"""An idle connection is closed after this time: later than load balancers do (60 s or less), so that they do not send a
request into a connection that is being closed."""


def run_worker(config: ServeConfig, listening: socket.socket, on_startup: Callable[[], None]) -> None:
    """Answer requests until SIGTERM or SIGINT, then finish those that are running.

    Args:
        listening: bound, but not yet listening, so that no connection waits for a worker that cannot start.
        on_startup: called once the worker listens.

    Raises:
        VistaError: the model, the store, or the token cannot be used.
    """
    token = read_token(config.token_file)
    with (
        cpu_settings(config.num_threads),
        _opened(config) as scorer,
        closing(ScoringQueue(config.scoring_threads, config.max_waiting)) as queue,
    ):
        _warm_up(scorer)
        scorer.follow(config.reload_s)
        metrics = ServiceMetrics(scorer.stats())
        app = make_application(ScoringService(scorer, config), queue, metrics, config, token)
        server = _Server(
            uvicorn.Config(
                app,
                loop="uvloop",
                http=BoundedHttpProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
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
            updates = asyncio.create_task(_update(metrics, scorer, queue))
            await server.serve(sockets=[listening])
            updates.cancel()

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


def _opened(config: ServeConfig) -> Scorer:
    try:
        return Scorer.open(
            config.model,
            config.store,
            on_missing=config.on_missing,
            task=config.task,
            device=config.device,
            key=read_key(config.authentication_key_file),
            max_age_s=config.max_age_s,
            precision=config.precision,
        )
    except ValueError as error:
        if isinstance(error, VistaError):
            raise
        raise ConfigError(str(error)) from error  # The message names the argument, which has the name of the key.


async def _update(metrics: ServiceMetrics, scorer: Scorer, queue: ScoringQueue) -> None:
    while True:
        metrics.update(scorer, queue.depth)
        await asyncio.sleep(UPDATE_S)


def _warm_up(scorer: Scorer) -> None:
    """Pay for page faults and for torch's initialization before the first request: rank all items for any user."""
    user = next(scorer.store.keys(), None)
    if user is not None:
        scorer.rank(user, top_k=1)
