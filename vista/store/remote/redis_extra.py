"""The only module that imports the client for Valkey and Redis."""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError as error:
    raise MissingDependencyError(
        f"stores on a Valkey or Redis server need redis-py ({error}); install it with: "
        "pip install 'vista-recsys[redis]'"
    ) from error

__all__ = ["NoBackoff", "Retry", "redis"]
