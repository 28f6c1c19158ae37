"""Checks of the headers of requests, which refuse a request before its body is read."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

from vista.serve.bearer_token import is_authorized
from vista.serve.error_answer import ErrorAnswer

OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that need no token, for the probes of load balancers."""
NO_TOKEN = ErrorAnswer(401, "Unauthorized", "send the token as one header, `Authorization: Bearer TOKEN`")
LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]")
_HOST = re.compile(r"(\[[^\]]*\]|[^:]*)(:[0-9]*)?")
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


class HostCheck:
    """Refuses requests that name another host.

    A service without a token relies on its address: only this machine can reach it. But a browser of this machine also
    shows web pages of others. If the name of such a page resolves to this machine (DNS rebinding), the page may read
    the answers, and only the header Host, which every browser sends, tells its requests from others.

    Args:
        app: gets the other requests.
        hosts: names that are accepted, with any port. IPv6 addresses are in brackets.
        on_refused: called with the status of each refusal.
    """

    def __init__(self, app: Application, hosts: Sequence[str], on_refused: Callable[[int], None]) -> None:
        self._app = app
        self._hosts = hosts
        self._on_refused = on_refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with 421."""
        if scope["type"] == "http" and not all(map(self._is_accepted, _values(scope, b"host"))):
            text = f"without a token, the service only answers requests to {', '.join(self._hosts)}; set token_file"
            refusal = ErrorAnswer(421, "WrongHostError", text)
            self._on_refused(refusal.status)
            await refusal.as_response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_accepted(self, value: bytes) -> bool:
        found = _HOST.fullmatch(value.decode("latin-1").lower())
        return found is not None and found[1] in self._hosts


def accepted_hosts(host: str) -> list[str]:
    """Names of this machine that clients may send, if the service listens on `host`."""
    own = f"[{host}]" if ":" in host else host.lower()
    return list(dict.fromkeys([*LOCAL_HOSTS, own]))


def _values(scope: Scope, header: bytes) -> list[bytes]:
    return [value for name, value in scope["headers"] if name == header]
