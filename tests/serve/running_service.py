"""A `vista serve` in a process of its own, and a client."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import vista
from scripts.benchmarks.serve_load import workers_of

TIMEOUT_S = 120
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")


class RunningService:
    """The process, its port, and what it has logged."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
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
        return workers_of(self.process.pid)

    def stop(self) -> int:
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


@contextmanager
def running(*words: str, **variables: str) -> Iterator[RunningService]:
    """A service on a free port, which is killed in the end if it still runs. Its deadline suits a busy machine."""
    with subprocess.Popen(
        command("port=0", *words, "deadline_s=100"), env=environment(**variables), stderr=subprocess.PIPE, text=True
    ) as process:
        service = RunningService(process)
        try:
            service.wait()
            yield service
        finally:
            process.terminate()
            try:
                process.wait(TIMEOUT_S)
            finally:
                process.kill()


def until(condition: Any) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
