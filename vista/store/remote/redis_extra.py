"""The only module that imports the client for Valkey and Redis."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingDependencyError(
        f"stores on a Valkey or Redis server need redis-py ({error}); install it with: " + install_command("redis")
    ) from error

__all__ = ["NoBackoff", "Retry", "redis"]
