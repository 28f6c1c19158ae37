"""The command `vista serve`."""

from __future__ import annotations

from vista.config import ServeConfig


def run_serve(config: ServeConfig) -> None:
    """`vista serve`: answer requests until SIGTERM or Ctrl-C.

    Raises:
        MissingDependencyError: the extra `serve` is not installed.
        ConfigError: the address cannot be used, or the token cannot be read.
        StoreError, CheckpointError: the model or the store cannot be served.
    """
    from vista.serve.server import run_server  # needs the extra `serve`

    run_server(config)
