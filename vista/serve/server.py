"""The service: its address, and its workers."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from vista.config import ServeConfig
from vista.config.serve_config import ModelsFile
from vista.errors import CheckpointError, ConfigError
from vista.machine import bound_socket, is_loopback
from vista.model.saved_model import ModelDescription
from vista.serve.bearer_token import read_tokens
from vista.serve.shared_numbers import FOLDER_VARIABLE, shared_numbers
from vista.serve.worker_pool import WorkerPool

logger = logging.getLogger(__name__)


def run_server(config: ServeConfig) -> None:
    """Answer requests until SIGTERM or SIGINT; errors as of `run_worker`.

    Raises:
        ConfigError: the address cannot be used, or the file of models is wrong or names a model that is missing.
        WorkerDiedError: with several workers, the first one could not start; its own message is in the log.
    """
    file = None if config.models is None else read_models(config.models)
    bound_socket(config.host, config.port).close()  # Another service on a shared port would not be noticed.
    with bound_socket(config.host, config.port, shared=config.workers > 1) as listening:
        host, port = listening.getsockname()[:2]
        if not read_tokens(config.token_file) and not is_loopback(listening):
            logger.warning("anyone who can reach %s may send requests; set token_file to require a token", host)

        def say() -> None:
            address = f"[{host}]" if ":" in host else host
            logger.info("listening on http://%s:%d", address, port)

        os.environ.pop(FOLDER_VARIABLE, None)
        if config.workers == 1:
            from vista.serve.worker import run_worker  # imports torch, which the parent of several workers does without

            run_worker(config, file, listening, say)
        else:
            with shared_numbers():
                WorkerPool(config, file, host, port).run(say)
    logger.info("stopped")


def read_models(path: str) -> ModelsFile:
    """The file of `models=`, whose models exist. All workers serve what it says now.

    Raises:
        ConfigError: it is wrong, or names a folder without a model.
    """
    file = ModelsFile.read(path)
    for name, served in file.models.items():
        try:
            ModelDescription.read(Path(served.model))
        except CheckpointError as error:
            raise ConfigError(f"{path}: models.{name}.model: {error}") from error
    return file
