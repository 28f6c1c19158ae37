"""Runs Streamlit in this process, for this machine and whoever knows the token, and opens a browser if there is one."""

from __future__ import annotations

import dataclasses
import hmac
import json
import logging
import os
import secrets
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from vista.config import ExploreConfig
from vista.errors import LogFormatter
from vista.installation import require_module
from vista.machine import bound_socket, names_host
from vista.store.record_encoding import read_key

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
HEALTH = "/_stcore/health"
"""Path that needs no token, and says only whether the server has started."""
TOKEN = "access"
"""Name of the token in the query of the page's URL; logs would leave out the value of one called `token`."""
THEME = {
    "base": "light",
    "primaryColor": "#2f6fb0",
    "backgroundColor": "#ffffff",
    "secondaryBackgroundColor": "#f6f8fa",
    "textColor": "#26303d",
}
SCRIPT = Path(__file__).with_name("page.py")
SLOW_IMPORTS = ("vista.explore.workspace", "vista.explore.benefit", "vista.explore.charts")
"""Modules whose imports take seconds, which the first visitor would wait for."""
START_S = 60.0
"""How long the browser waits for the server."""


def run_page(config: ExploreConfig) -> None:
    """Serve the page until Ctrl-C. It opens in a browser if this is a terminal of a machine with one and a display.
    Raises ConfigError if the port cannot be used, or the authentication key cannot be read."""
    for package in ("altair", "pandas", "streamlit"):
        require_module(package, "explore")
    import streamlit
    import uvicorn.config
    from starlette.middleware import Middleware

    read_key(config.authentication_key_file)  # a wrong key is an error before the page opens
    with bound_socket(HOST, config.port) as probe:
        port = probe.getsockname()[1]
    token = secrets.token_urlsafe(32)
    url = f"http://{HOST}:{port}/?{TOKEN}={token}"
    logger.info("vista explore (Streamlit %s) on %s; stop it with Ctrl-C", streamlit.__version__, url)
    if (problem := browser_problem()) is not None:
        remedy = f"`ssh -L {port}:{HOST}:{port} ...`"
        logger.info("%s; open %s in a browser, on another machine after %s", problem, url, remedy)
    elif sys.stdout.isatty():
        threading.Thread(target=open_when_ready, args=(url,), daemon=True).start()
    for module in SLOW_IMPORTS:
        import_module(module)
    sys.argv = [str(SCRIPT), as_argument(config)]
    logging.getLogger("streamlit.error_util").addFilter(_without_passwords)
    # Streamlit leaves both to uvicorn: httptools keeps heads of any size in memory, before there is a token, and each
    # request that is not HTTP would be a line of the log.
    uvicorn.config.HTTP_PROTOCOLS["auto"] = uvicorn.config.HTTP_PROTOCOLS["h11"]
    uvicorn.config.LOGGING_CONFIG["loggers"]["uvicorn.error"]["level"] = "ERROR"
    app = streamlit.App(SCRIPT, middleware=[Middleware(PageGuard, token=token, port=port)])
    with suppress(KeyboardInterrupt):
        app.run(config=streamlit_options(port))


class PageGuard:
    """Refuses requests and WebSockets that name another host, that come from a page of another origin, or that lack the
    token. The URL that the command shows has it, and the answer to that makes it a cookie.

    Args:
        app: gets the other requests.
        token: which browsers must send.
        port: of the page; cookies of two pages on one machine must not have the same name.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self._app, self._token, self._cookie = app, token, f"vista_explore_{port}"

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Pass a request on, or answer it with 403, or with a redirection that sets the cookie."""
        from starlette.requests import HTTPConnection
        from starlette.responses import PlainTextResponse, RedirectResponse

        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        request = HTTPConnection(scope)
        hosts, origins = request.headers.getlist("host"), request.headers.getlist("origin")
        is_own = len(hosts) == 1 and names_host(hosts[0].encode("latin-1"))
        is_own = is_own and all(origin == f"http://{hosts[0]}" for origin in origins)
        if is_own and (scope["path"] == HEALTH or self._is_token(request.cookies.get(self._cookie, ""))):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # before it is accepted: status 403
        elif is_own and self._is_token(request.query_params.get(TOKEN, "")):
            answer = RedirectResponse(f"/?{request.url.remove_query_params(TOKEN).query}", 303)
            answer.set_cookie(self._cookie, self._token, httponly=True, samesite="lax")
            await answer(scope, receive, send)
        else:
            await PlainTextResponse("Open the address that `vista explore` shows.", 403)(scope, receive, send)

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self._token.encode())


def as_argument(config: ExploreConfig) -> str:
    """The configuration as the page's script reads it."""
    return json.dumps(dataclasses.asdict(config))


def streamlit_options(port: int) -> dict[str, Any]:
    """Options of Streamlit. They take precedence over the user's own configuration."""
    return {
        "server.address": HOST,
        "server.port": port,
        "server.headless": True,  # otherwise Streamlit asks for an email address, and opens a browser by itself
        "server.fileWatcherType": "none",
        "server.runOnSave": False,
        "browser.gatherUsageStats": False,
        "browser.serverAddress": HOST,
        "client.toolbarMode": "minimal",
        "client.showErrorDetails": "none",  # They can contain passwords; the log has them without.
        "logger.enableRich": False,  # It would print tracebacks instead of logging them.
        "logger.level": "warning",
        "logger.hideWelcomeMessage": True,  # This command prints the address itself.
        **{f"theme.{name}": value for name, value in THEME.items()},
    }


def _without_passwords(record: logging.LogRecord) -> bool:
    """A filter that writes the traceback of an error in the page's script, which Streamlit logs, as vista does."""
    if record.exc_info:
        record.exc_text = LogFormatter().formatException(record.exc_info)
    return True


def browser_problem() -> str | None:
    """Why no browser can be opened here; None if one can."""
    if sys.platform == "linux" and not any(os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY")):
        return "this machine has no display"
    try:
        webbrowser.get()
    except webbrowser.Error:
        return "no browser is installed here"
    return None


def open_when_ready(url: str, within_s: float = START_S) -> bool:
    """Open the page once the server answers; returns whether it did within the time."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(urljoin(url, HEALTH), timeout=5):
                pass
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
            continue
        webbrowser.open(url)
        return True
    logger.warning("the page did not start within %.0f s; open %s yourself", within_s, url)
    return False
