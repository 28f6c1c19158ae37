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
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import run_python
from tests.serve.running_service import environment
from vista.cli.main import main
from vista.explore.explore_server import streamlit_options
from vista.installation import install_command

if find_spec("streamlit") is None:
    pytest.skip("the extra `explore` is not installed", allow_module_level=True)

START_S, STOP_S = 200.0, 60.0
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

    The block begins once its page answers over HTTP; at its end, the command is stopped as by Ctrl-C.
    """
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
        try:
            for line in process.stderr:
                said.append(line)
                if found := re.search(r"on (http://127\.0\.0\.1:\d+);", line):
                    break
            else:
                raise AssertionError("".join(said))
            reader = threading.Thread(target=said.extend, args=(process.stderr,), daemon=True)
            reader.start()
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
            with urllib.request.urlopen(url, timeout=START_S) as answer:
                assert answer.status == 200 and "<title>Streamlit</title>" in answer.read().decode()
            return
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
            other.connect(("127.0.0.2", int(page.url.rpartition(":")[2])))
    assert len(page.said) == 1
    assert "--browser.gatherUsageStats=false" in streamlit_options(1), "nothing is reported"


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


def test_the_extra_is_named_if_it_is_missing() -> None:
    code = "import sys; sys.modules['streamlit'] = None; from vista.cli.main import main; sys.exit(main(['explore']))"
    done = run_python(code)
    assert done.returncode == 1 and install_command("explore") in done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
