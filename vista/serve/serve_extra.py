"""Imports the packages of the extra `serve`, or says which one is missing."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    import fastapi
    import httptools  # noqa: F401  uvicorn's HTTP parser, many times faster than its default
    import msgspec
    import prometheus_client
    import prometheus_client.multiprocess
    import uvicorn
    import uvloop  # noqa: F401  uvicorn's event loop
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect
    from starlette.responses import PlainTextResponse
except ImportError as error:
    raise MissingDependencyError(
        f"vista serve needs FastAPI, uvicorn, and other packages ({error}); install them with: "
        + install_command("serve")
    ) from error

__all__ = [
    "ClientDisconnect",
    "HTTPException",
    "PlainTextResponse",
    "fastapi",
    "msgspec",
    "prometheus_client",
    "uvicorn",
]
