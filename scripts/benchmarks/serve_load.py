"""A service in a process of its own, and clients that cost little: requests are encoded beforehand."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parents[2]
_LISTENING = re.compile(r"listening on http://127\.0\.0\.1:(\d+)")
_LISTEN = "0A"
"""The state of a listening socket in /proc/net/tcp."""


@dataclass(frozen=True, slots=True)
class ServiceProcess:
    """A running `vista serve`."""

    process: subprocess.Popen[str]
    port: int
    lines: list[str] = field(default_factory=list)
    """What it has logged."""

    @property
    def pid(self) -> int:
        """Id of the process."""
        return self.process.pid

    def workers(self) -> list[int]:
        """Ids of the worker processes, if there are several."""
        return workers_of(self.pid)

    def num_listening(self) -> int:
        """Number of workers that listen on the port."""
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        return sum(row[1].endswith(f":{self.port:04X}") and row[3] == _LISTEN for row in rows)

    def cpu_s(self) -> float:
        """Seconds of CPU time that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextmanager
def vista_process(
    words: Sequence[str], ready: re.Pattern[str], *, folder: Path = REPOSITORY, cores: set[int] | None = None
) -> Iterator[tuple[subprocess.Popen[str], str, list[str]]]:
    """A command of `vista` that runs until the context ends.

    Args:
        words: the command and its arguments.
        ready: of the line of its log that tells that it is ready.
        cores: where it runs.

    Yields:
        The process, the group of `ready`, and the lines of its log, also later ones.

    Raises:
        SystemExit: it could not start.
    """
    path = os.pathsep.join(str(REPOSITORY / name) for name in (".", "kernels"))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "vista.cli", *words]
    with subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        if cores is not None:
            os.sched_setaffinity(process.pid, cores)
        try:
            said: list[str] = []
            for line in process.stderr:
                said.append(line)
                if found := ready.search(line):
                    break
            else:
                raise SystemExit(f"error: vista {words[0]} could not start: " + "".join(said))
            # Read its log, so that it never blocks.
            threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
            yield process, found[1], said
        finally:
            process.terminate()
            process.wait(120)


@contextmanager
def serving(model: Path, store: Path, *words: str, cores: set[int] | None = None) -> Iterator[ServiceProcess]:
    """`vista serve` on a free port, until the context ends; errors as of `vista_process`."""
    command = ["serve", f"model={model}", f"store={store}", "port=0", *words]
    with vista_process(command, _LISTENING, cores=cores) as (process, port, lines):
        yield ServiceProcess(process, int(port), lines)


def encoded(path: str, body: bytes, media_type: str = "application/json") -> bytes:
    """A POST request."""
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: {media_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def get(path: str) -> bytes:
    """A GET request."""
    return f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()


class Connection:
    """A connection that stays open."""

    def __init__(self, port: int, timeout_s: float | None = None) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, request: bytes) -> tuple[int, bytes]:
        """Status and body of the answer."""
        self._socket.sendall(request)
        held = b""
        while (end := held.find(b"\r\n\r\n")) < 0:
            held += self._received()
        head = held[:end].lower()
        size = int(head.partition(b"content-length:")[2].partition(b"\r\n")[0])
        body = held[end + 4 :]
        while len(body) < size:
            body += self._received()
        return int(head[9:12]), body

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()

    def _received(self) -> bytes:
        received = self._socket.recv(1 << 18)
        if not received:
            raise ConnectionError("the service has closed the connection")
        return received


def closed_loop(port: int, requests: Sequence[bytes], num_clients: int, seconds: float) -> tuple[int, float]:
    """Send requests from clients that each wait for an answer before the next one.

    Returns:
        The number of answers with status 200, and the seconds they took. SystemExit if there is another status.
    """
    counts, stop = [0] * num_clients, time.perf_counter() + seconds
    refused: list[int] = []

    def work(client: int) -> None:
        connection, place = Connection(port), client
        while time.perf_counter() < stop:
            status, _ = connection.send(requests[place % len(requests)])
            if status != 200:
                refused.append(status)
                return
            counts[client] += 1
            place += num_clients
        connection.close()

    began = time.perf_counter()
    threads = [threading.Thread(target=work, args=(client,)) for client in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if refused:
        raise SystemExit(f"error: the service answered with status {refused[0]}")
    return sum(counts), time.perf_counter() - began


def paced(port: int, requests: Sequence[bytes], gaps_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """Latencies in s of requests that are sent after these gaps, whether or not earlier ones were answered.

    A latency counts from the time at which the request was due.
    """
    due = time.perf_counter() + 0.1 + np.cumsum(gaps_s)
    latencies, places = np.zeros(len(due)), iter(range(len(due)))
    lock = threading.Lock()

    def work() -> None:
        connection = Connection(port)
        while True:
            with lock:
                place = next(places, None)
            if place is None:
                return connection.close()
            wait = due[place] - time.perf_counter()
            if wait > 0:
                time.sleep(wait)
            status, _ = connection.send(requests[place % len(requests)])
            latencies[place] = time.perf_counter() - due[place]
            assert status == 200, status

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return latencies


def workers_of(service: int) -> list[int]:
    """Ids of the worker processes of a service, if there are several; not those that have ended."""
    children = Path(f"/proc/{service}/task/{service}/children").read_text().split()
    return [int(child) for child in children if b"spawn_main" in _command_line(child)]


def _command_line(pid: str) -> bytes:
    """Command line of a process, empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
