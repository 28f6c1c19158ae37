"""Checks of the headers of requests, which refuse a request before its body is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from vista.serve.bearer_token import is_authorized
from vista.serve.error_answer import ErrorAnswer

OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no token, for the probes of load balancers."""
NO_TOKEN = ErrorAnswer(401, "Unauthorized", "send the token as one header, `Authorization: Bearer TOKEN`")
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Scope]]
Send = Callable[[Scope], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]


class TokenCheck:
    """Refuses requests without a token.

    Args:
        app: gets the other requests.
        tokens: one of them must be sent.
        on_refused: called with the status of each refusal.
    """

    def __init__(self, app: Application, tokens: Sequence[bytes], on_refused: Callable[[int], None]) -> None:
        self._app = app
        self._tokens = tokens
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 401."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            given = _values(scope, b"authorization")
            if len(given) != 1 or not is_authorized(given[0], self._tokens):
                self._on_refused(NO_TOKEN.status)
                refusal = NO_TOKEN.as_response()
                refusal.headers["WWW-Authenticate"] = "Bearer"
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _values(scope: Scope, header: bytes) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == header]
