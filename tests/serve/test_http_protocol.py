"""Limits of a connection: how many there are, how long a request may take, and how long an answer may wait."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest

from tests.serve.running_service import TIMEOUT_S, until
from vista.serve import http_protocol
from vista.serve.http_protocol import BoundedHttpProtocol
from vista.serve.serve_extra import uvicorn

SHORT_S = 1.0
LARGE = 64 << 20
Opened = Callable[[], socket.socket]


class Application:
    """Answers GET /large with many bytes, /slow when `free` is set, and everything else at once; reads no bodies."""

    def __init__(self) -> None:
        self.free = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] == "/slow" and not self.free.is_set():
            await asyncio.sleep(0.01)
        body = b"x" * (LARGE if scope["path"] == "/large" else 2)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Served:
    """A server in a thread."""

    def __init__(self, num_connections: int, body_s: float) -> None:
        self.application = Application()
        self.num_refused = 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        protocol = partial(
            BoundedHttpProtocol, max_connections=num_connections, body_s=body_s, on_refused=self._count_refused
        )
        config = uvicorn.Config(
            self.application,
            http=protocol,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            log_config=None,
            timeout_keep_alive=TIMEOUT_S,
        )
        self.server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listening]})
        self._thread.start()
        until(lambda: self.server.started)

    @property
    def num_open(self) -> int:
        return len(self.server.server_state.connections)

    def connect(self) -> socket.socket:
        return socket.create_connection(self._listening.getsockname(), TIMEOUT_S)

    def close(self) -> None:
        self.application.free.set()
        self.server.force_exit = self.server.should_exit = True
        self._thread.join()
        self._listening.close()

    def _count_refused(self) -> None:
        self.num_refused += 1


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server with little patience."""
    monkeypatch.setattr(http_protocol, "HEAD_S", SHORT_S)
    monkeypatch.setattr(http_protocol, "WRITE_S", SHORT_S)
    served = Served(100, SHORT_S)
    yield served
    served.close()


def all_of(connection: socket.socket) -> bytes:
    """What a connection gives until it ends."""
    held = b""
    try:
        while part := connection.recv(1 << 20):
            held += part
    except ConnectionError:
        pass
    return held


def test_connections_beyond_the_limit() -> None:
    served = Served(3, TIMEOUT_S)
    with ExitStack() as stack:
        stack.callback(served.close)
        opened = [stack.enter_context(served.connect()) for _ in range(3)]
        until(lambda: served.num_open == 3)
        with served.connect() as late:
            head, _, body = all_of(late).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and b"Retry-After: 1" in head
        assert "max_connections" in json.loads(body)["error"]["message"] and served.num_refused == 1
        opened[0].close()
        until(lambda: served.num_open == 2)
        with served.connect() as late:
            late.sendall(b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
            assert all_of(late).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"POST / HT",
        b"POST / HTTP/1.1\r\nA: b\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"GET / HTTP/1.1\r\n\r\nGET",
    ],
)
def test_requests_that_never_end(short: Served, sent: bytes) -> None:
    """The connection is closed, even if the answer did not wait for the body."""
    with short.connect() as connection:
        connection.sendall(sent)
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n") and short.num_open == 0


def test_a_body_that_drips(short: Served) -> None:
    with short.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(1_000_000):
            connection.sendall(b"x")
            threading.Event().wait(0.01)


@pytest.mark.parametrize("head", [b"GET /large HTTP/1.1\r\n", b"GET /large HTTP/1.1\r\nConnection: close\r\n"])
def test_answers_that_are_not_taken(short: Served, head: bytes) -> None:
    with short.connect() as connection:
        connection.sendall(head + b"\r\n")
        until(lambda: short.num_open == 1)
        until(lambda: short.num_open == 0)
        assert len(all_of(connection)) < LARGE


def test_requests_wait_while_the_service_computes(short: Served) -> None:
    """The clock does not run while it is the service that does not read."""
    with short.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" + b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        threading.Event().wait(4 * SHORT_S)
        assert short.num_open == 1
        short.application.free.set()
        connection.sendall(b"xx" + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert all_of(connection).count(b"HTTP/1.1 200") == 3


@pytest.mark.parametrize("number", [1, 3])
def test_half_closed_connections_get_their_answers(short: Served, number: int) -> None:
    with short.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * number)
        connection.shutdown(socket.SHUT_WR)
        threading.Event().wait(0.1)
        short.application.free.set()
        assert all_of(connection).count(b"HTTP/1.1 200") == number
    until(lambda: short.num_open == 0)


def test_what_is_not_http(short: Served) -> None:
    for sent, status in ((b"\x16\x03\x01\r\n\r\n", b"400"), (b"GET / HTTP/1.1\r\nA: " + b"b" * (1 << 17), b"431")):
        with short.connect() as connection:
            connection.sendall(sent)
            head, _, body = all_of(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status) and json.loads(body)["error"]["message"]
