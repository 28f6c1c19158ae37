"""The service: its address, and its workers."""

from __future__ import annotations

import ipaddress
import logging
import os

from vista.config import ServeConfig
from vista.serve.bearer_token import read_token
from vista.serve.listening_socket import bound_socket
from vista.serve.shared_numbers import FOLDER_VARIABLE, shared_numbers
from vista.serve.worker_pool import WorkerPool

logger = logging.getLogger(__name__)


def run_server(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or SIGINT; errors as of `run_worker`.

    Raises:
        ConfigError: the address cannot be used.
        WorkerDiedError: with several workers, the first one could not start; its own message is in the log.
    """
    bound_socket(config.host, config.port).close()  # Another service on a shared port would not be noticed.
    with bound_socket(config.host, config.port, shared=config.workers > 1) as listening:
        host, port = listening.getsockname()[:2]
        if read_token(config.token_file) is None and not ipaddress.ip_address(host).is_loopback:
            logger.warning("anyone who can reach %s may send requests; set token_file to require a token", host)

        def say() -> None:
            address = f"[{host}]" if ":" in host else host
            logger.info("listening on http://%s:%d", address, port)

        os.environ.pop(FOLDER_VARIABLE, None)
        if config.workers == 1:
            from vista.serve.worker import run_worker  # imports torch, which the parent of several workers does without

            run_worker(config, listening, say)
        else:
            with shared_numbers():
                WorkerPool(config, host, port).run(say)
    logger.info("stopped")
