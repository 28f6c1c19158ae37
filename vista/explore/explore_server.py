"""Runs Streamlit in this process, on this machine's own address, and opens a browser if there is one."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import threading
import time
import urllib.error
import urllib.request
import webbrowser
from importlib import import_module
from pathlib import Path

from vista.config import ExploreConfig
from vista.installation import require_module
from vista.machine import bound_socket
from vista.store.record_encoding import read_key

logger = logging.getLogger(__name__)
HOST = "127.0.0.1"
THEME = {
    "base": "light",
    "primaryColor": "#2f6fb0",
    "backgroundColor": "#ffffff",
    "secondaryBackgroundColor": "#f6f8fa",
    "textColor": "#26303d",
}
SCRIPT = Path(__file__).with_name("page.py")
SLOW_IMPORTS = ("vista.explore.workspace", "vista.explore.results", "vista.explore.charts")
"""Modules whose imports take seconds, which the first visitor would wait for."""
START_S = 60.0
"""How long the browser waits for the server."""


def run_page(config: ExploreConfig) -> None:
    """Serve the page until Ctrl-C. It opens in a browser if this is a terminal of a machine with one and a display.

    Raises:
        ConfigError: the port cannot be used, or the authentication key cannot be read.
    """
    for package in ("altair", "pandas", "streamlit"):
        require_module(package, "explore")
    import streamlit
    from streamlit.web import cli

    read_key(config.authentication_key_file)  # a wrong key is an error before the page opens
    with bound_socket(HOST, config.port) as probe:
        port = probe.getsockname()[1]
    url = f"http://{HOST}:{port}"
    logger.info("vista explore (Streamlit %s) on %s; stop it with Ctrl-C", streamlit.__version__, url)
    if (problem := browser_problem()) is not None:
        remedy = f"`ssh -L {port}:{HOST}:{port} ...`"
        logger.info("%s; open %s in a browser, on another machine after %s", problem, url, remedy)
    elif sys.stdout.isatty():
        threading.Thread(target=open_when_ready, args=(url,), daemon=True).start()
    for module in SLOW_IMPORTS:
        import_module(module)
    cli.main(["run", *streamlit_options(port), str(SCRIPT), "--", as_argument(config)], standalone_mode=False)


def as_argument(config: ExploreConfig) -> str:
    """The configuration as the page's script reads it."""
    return json.dumps(dataclasses.asdict(config))


def streamlit_options(port: int) -> list[str]:
    """Options of `streamlit run`. They take precedence over the user's own configuration of Streamlit."""
    options = {
        "server.address": HOST,
        "server.port": str(port),
        "server.headless": "true",  # otherwise Streamlit asks for an email address, and opens a browser by itself
        "server.fileWatcherType": "none",
        "server.runOnSave": "false",
        "browser.gatherUsageStats": "false",
        "browser.serverAddress": HOST,
        "client.toolbarMode": "minimal",
        "logger.level": "warning",
        "logger.hideWelcomeMessage": "true",  # This command prints the address itself.
        **{f"theme.{name}": value for name, value in THEME.items()},
    }
    return [f"--{name}={value}" for name, value in options.items()]


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
            with urllib.request.urlopen(f"{url}/_stcore/health", timeout=5):
                pass
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
            continue
        webbrowser.open(url)
        return True
    logger.warning("the page did not start within %.0f s; open %s yourself", within_s, url)
    return False
