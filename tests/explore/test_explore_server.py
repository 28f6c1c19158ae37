"""How the page is started: on this machine only, without statistics, with or without a browser."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.serve.running_service import environment
from vista.cli.main import main
from vista.explore.explore_server import streamlit_options
from vista.installation import install_command

if find_spec("streamlit") is None:
    pytest.skip("the extra `explore` is not installed", allow_module_level=True)

START_S, STOP_S = 100.0, 60.0
"""Most seconds until the page answers, and until the command has ended; a shared machine can be slow."""
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="other systems have a display and a browser")


@dataclass(frozen=True)
class Running:
    """A `vista explore` that answers."""

    url: str
    said: list[str]
    """Lines on its terminal so far, and those that follow."""


@contextmanager
def running(folder: Path, **variables: str | None) -> Iterator[Running]:
    """`vista explore` in a process of its own, in a folder, with changes to its environment (None unsets a variable).
    The block begins once its page answers over HTTP; at its end, the command is stopped as by Ctrl-C."""
    changed = {**environment(), **variables}
    command = [sys.executable, "-m", "vista.cli", "explore", "port=0"]
    controller, terminal = os.openpty()  # A browser opens only if the output is a terminal.
    process = subprocess.Popen(
        command,
        cwd=folder,
        env={name: value for name, value in changed.items() if value is not None},
        stdout=terminal,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[str] = []
    with process:
        assert process.stderr is not None
        reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
        reader.start()
        try:
            wait_for(lambda: bool(said) or not reader.is_alive())
            found = re.search(r"on (http://127\.0\.0\.1:\d+/\?access=\S+);", "".join(said))
            assert found, f"it said: {''.join(said)}"
            wait_until_it_answers(found[1])
            yield Running(found[1], said)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(STOP_S)
            os.close(controller)
            os.close(terminal)


def wait_until_it_answers(url: str) -> None:
    deadline = time.monotonic() + START_S
    while True:
        try:
            opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
            with opener.open(url, timeout=START_S) as answer:
                assert answer.url == url.partition("?")[0]
                assert answer.status == 200 and "<title>Streamlit</title>" in answer.read().decode()
            return
        except urllib.error.HTTPError:
            raise  # It refuses the address that it has shown.
        except OSError:
            assert time.monotonic() < deadline, f"{url} does not answer"
            time.sleep(0.1)


@needs_linux
def test_a_browser_opens_the_page_and_only_this_machine_can_connect(tmp_path: Path) -> None:
    opened, browser = browser_program(tmp_path)
    with running(tmp_path, DISPLAY=":0", BROWSER=str(browser)) as page:
        wait_for(lambda: opened.exists() and opened.read_text().endswith("\n"))
        assert opened.read_text() == f"{page.url}\n"
        with socket.socket() as other, pytest.raises(ConnectionRefusedError):
            other.connect(("127.0.0.2", urlsplit(page.url).port))
        refuses_other_hosts_and_origins(page)
        refuses_endless_heads(page)
    assert len(page.said) == 1
    assert streamlit_options(1)["browser.gatherUsageStats"] is False, "nothing is reported"


def refuses_other_hosts_and_origins(page: Running) -> None:
    """Another site that resolves to this machine, or that opens a WebSocket, gets nothing: not even with the token."""
    address = urlsplit(page.url)
    port, token = address.port, address.query.partition("=")[2]
    host, cookie = f"127.0.0.1:{port}", f"vista_explore_{port}={token}"
    upgrade = ("Connection: Upgrade", "Upgrade: websocket", "Sec-WebSocket-Version: 13")
    key = "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="

    def first_line(target: str, host: str, origin: str | None, cookie: str, more: tuple[str, ...] = ()) -> str:
        lines = [f"GET {target} HTTP/1.1", f"Host: {host}", f"Cookie: {cookie}", key, *more]
        lines += [] if origin is None else [f"Origin: {origin}"]
        with socket.create_connection(("127.0.0.1", port), START_S) as connection:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            received = connection.recv(1 << 16).decode("latin-1")
        if " 403 " in received.partition("\r\n")[0]:
            assert "Streamlit" not in received
        return received.split()[1]

    stream = "/_stcore/stream"
    own = f"http://{host}"
    assert first_line(stream, host, own, cookie, upgrade) == "101"
    assert first_line(stream, f"localhost:{port}", f"http://localhost:{port}", cookie, upgrade) == "101"
    assert first_line("/", host, None, cookie) == "200" and first_line("/_stcore/health", host, None, "") == "200"
    for foreign, origin, sent in (
        ("evil.example", "http://evil.example", cookie),
        (f"evil.example:{port}", f"http://evil.example:{port}", cookie),
        (host, "http://evil.example", cookie),
        (host, "http://127.0.0.1:1", cookie),
        (host, "null", cookie),
        (host, own, ""),
        (host, own, f"vista_explore_{port}=wrong"),
    ):
        assert first_line(stream, foreign, origin, sent, upgrade) == "403", (foreign, origin, sent)
        for target in ("/", "/_stcore/host-config", f"/?access={'' if 'evil' not in foreign else token}"):
            assert first_line(target, foreign, origin, sent) == "403", (target, foreign, origin, sent)


def refuses_endless_heads(page: Running) -> None:
    """Before there is a token: heads are not kept, and what is not HTTP is not logged."""
    for sent in (b"X: " + b"a" * (1 << 18), b"a: b\r\n" * (1 << 16), b"garbage\r\n\r\n"):
        with socket.create_connection(("127.0.0.1", urlsplit(page.url).port), START_S) as connection:
            with suppress(ConnectionError):
                connection.sendall(b"GET / HTTP/1.1\r\n" + sent)
            with suppress(ConnectionError):
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400")


@pytest.mark.nightly
@needs_linux
def test_no_display(tmp_path: Path) -> None:
    opened, browser = browser_program(tmp_path)
    with running(tmp_path, DISPLAY=None, WAYLAND_DISPLAY=None, BROWSER=str(browser)) as page:
        wait_for(lambda: len(page.said) > 1)
        assert page.said[1].startswith(f"this machine has no display; open {page.url} in a browser, on another machine")
    assert len(page.said) == 2 and not opened.exists()


def browser_program(folder: Path) -> tuple[Path, Path]:
    """A program that writes its argument to a file; returns the file and the program."""
    opened, program = folder / "opened", folder / "browser"
    program.write_text(f'#!/bin/sh\necho "$1" >> {opened}\n')
    program.chmod(0o755)
    return opened, program


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert main(["explore", f"port={other.getsockname()[1]}"]) == 2
    assert "port: cannot listen on" in capsys.readouterr().err


def test_the_extra_is_named_if_it_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "streamlit", None)
    assert main(["explore"]) == 1
    said = capsys.readouterr().err
    assert install_command("explore") in said and said.count("\n") == 1, said
