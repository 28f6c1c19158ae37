"""Imports the packages of the extra `serve`, or says which one is missing."""

from __future__ import annotations

from vista.errors import MissingDependencyError

try:
    import fastapi
    import httptools  # noqa: F401  uvicorn's HTTP parser, many times faster than its default
    import msgspec
    import prometheus_client
    import prometheus_client.multiprocess
    import uvicorn
    import uvloop  # noqa: F401  uvicorn's event loop
    from starlette.requests import ClientDisconnect
except ImportError as error:
    raise MissingDependencyError(
        f"vista serve needs FastAPI, uvicorn, and other packages ({error}); install them with: "
        "pip install 'vista-recsys[serve]'"
    ) from error

__all__ = ["ClientDisconnect", "fastapi", "msgspec", "prometheus_client", "uvicorn"]
