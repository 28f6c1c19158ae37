"""A `vista serve` in a process of its own, and a client.

Most services are forked from a process that has imported vista, because an interpreter with torch takes seconds to
start. `running(fresh=True)` starts one as a user does.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TextIO

import vista
from tests.faults.nursery import Child, Nursery, shared_nursery
from vista.cli.main import main

TIMEOUT_S = 120
PRELOADED = ("vista.cli.serving_commands", "vista.config.composition", "vista.serve.worker_pool", "vista.serve.worker")
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


@cache
def nursery() -> Nursery:
    """Forks the services."""
    opened = shared_nursery()
    for module in PRELOADED:
        opened.imports(module)
    return opened


def serve_in_child(say: Callable[[Any], None], words: list[str], log: str, folder: str) -> int:
    """`vista serve` in a child of the nursery. Its workers are forked too, and begin without its signal handlers."""
    os.dup2(os.open(log, os.O_WRONLY), 2)
    os.chdir(folder)
    from prometheus_client import values

    from vista.serve import worker_pool

    work = worker_pool._work

    def forked_work(*arguments: Any, **options: Any) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        values.ValueClass = values.get_value_class()  # reads the variable of several workers, as an import would
        work(*arguments, **options)

    worker_pool._work = forked_work
    worker_pool.get_context = lambda _: multiprocessing.get_context("fork")  # type: ignore[assignment,misc]
    return main(["serve", *words])


class ForkedProcess:
    """A service in a child of the nursery, with the interface of Popen."""

    def __init__(self, words: tuple[str, ...], log: str | None = None) -> None:
        """Start it; `log` is a file for its messages instead of a pipe."""
        with tempfile.TemporaryDirectory() as folder:
            pipe = Path(folder) / "log"
            os.mkfifo(pipe)
            self._child: Child = nursery().start(serve_in_child, list(words), log or pipe, Path.cwd())
            self.stderr: TextIO = Path(os.devnull if log else pipe).open()  # noqa: SIM115, read until the process ends
        self.pid = self._child.pid

    def poll(self) -> int | None:
        """The exit status, or None while it runs."""
        while nursery().listen():
            pass
        return self._child.returned if self._child.exit_code == 0 else self._child.exit_code

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        self._child.kill(number)

    def wait(self, timeout_s: float) -> int | None:
        """Wait for the end, and return the exit status."""
        self._child.end(timeout_s)
        return self.poll()

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._child.kill(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._child.kill()


class RunningService:
    """The process, its port, and what it has logged."""

    def __init__(self, process: subprocess.Popen[str] | ForkedProcess) -> None:
        self.process = process
        self.lines: list[str] = []
        self.port = 0
        self._listening = threading.Event()
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def log(self) -> str:
        """What the service has logged."""
        return "".join(self.lines)

    def wait(self) -> None:
        """Wait until the service listens or has ended."""
        assert self._listening.wait(TIMEOUT_S), self.log
        assert self.port, self.log

    def send(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """Status, headers and body of the answer; a body that is not bytes is sent as JSON."""
        sent = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT_S)) as connection:
            connection.request(method or ("GET" if body is None else "POST"), path, sent, headers or {})
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()

    def fetch(self, path: str, body: Any = None, **options: Any) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        status, _, answer = self.send(path, body, **options)
        return status, json.loads(answer)

    def number(self, line: str) -> float:
        """A number of the metrics, by name and labels."""
        found = re.search(rf"^{re.escape(line)} (\S+)$", self.send("/metrics")[2].decode(), re.MULTILINE)
        assert found, line
        return float(found[1])

    def connect(self) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), TIMEOUT_S)

    def workers(self) -> list[int]:
        """Process ids of the workers, if there are several."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(child) for child in children if b"resource_tracker" not in _command_line(child) != b""]

    def num_listening(self) -> int:
        """How many workers listen on the port; the metrics count a worker before that."""
        sockets = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(own == f"0100007F:{self.port:04X}" and state == "0A" for _, own, _, state, *_ in sockets)

    def stop(self) -> int | None:
        """Send SIGTERM, and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT_S)

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if found := _LISTENING.search(line):
                self.port = int(found[1])
                self._listening.set()
        self._listening.set()


def command(*words: str) -> list[str]:
    """The command line of a service."""
    return [sys.executable, "-m", "vista.cli", "serve", *words]


def environment(**more: str) -> dict[str, str]:
    """The environment of a service: this checkout, one thread."""
    root = Path(vista.__file__).parents[1]
    path = os.pathsep.join([str(root), str(root / "kernels")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def _command_line(pid: str) -> bytes:
    """The command line of a process; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@contextmanager
def running(*words: str, fresh: bool = False) -> Iterator[RunningService]:
    """A service on a free port, which is killed in the end if it still runs. Its deadline suits a busy machine.

    Args:
        words: of the command `vista serve`.
        fresh: start an interpreter, as a user does, instead of forking one that has imported vista.
    """
    words = ("port=0", *words, "deadline_s=100")
    process: subprocess.Popen[str] | ForkedProcess
    if fresh:
        process = subprocess.Popen(command(*words), env=environment(), stderr=subprocess.PIPE, text=True)
    else:
        process = ForkedProcess(words)
    try:
        service = RunningService(process)
        service.wait()
        yield service
    finally:
        process.terminate()
        try:
            process.wait(TIMEOUT_S)
        finally:
            process.kill()


def resident_bytes(service: RunningService) -> int:
    """Memory that the service takes now, from which `peak_bytes` starts."""
    Path(f"/proc/{service.process.pid}/clear_refs").write_text("5")
    return _status_bytes(service, "VmRSS")


def peak_bytes(service: RunningService) -> int:
    """Most memory that the service has taken since the last call of `resident_bytes`."""
    return _status_bytes(service, "VmHWM")


def _status_bytes(service: RunningService, name: str) -> int:
    status = Path(f"/proc/{service.process.pid}/status").read_text()
    return 1024 * int(status.partition(f"{name}:")[2].split()[0])


def until(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
