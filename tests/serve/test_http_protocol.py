"""Limits of a connection: how many there are, how long a request may take, and how long an answer may wait."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
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
    """Answers GET /large with many bytes, /slow when `free` is set, and everything else at once; reads only the bodies
    of /read."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self.headers: list[tuple[bytes, bytes]] = []
        """Of the last request, when it is answered."""

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] == "/slow" and not self.free.is_set():
            await asyncio.sleep(0.01)
        while scope["path"] == "/read" and (await receive()).get("more_body"):
            pass
        self.headers = list(scope["headers"])
        body = b"x" * (LARGE if scope["path"] == "/large" else 2)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class Served:
    """A server in a thread."""

    def __init__(self, num_connections: int, body_s: float) -> None:
        self.application = Application()
        self.num_refused = 0
        self.refused: list[int] = []
        """Status of each refused request."""
        self._listening = socket.create_server(("127.0.0.1", 0))
        protocol = partial(
            BoundedHttpProtocol,
            max_connections=num_connections,
            body_s=body_s,
            on_refused_connection=self._count_refused,
            on_refused_request=self.refused.append,
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


@pytest.fixture
def patient() -> Iterator[Served]:
    """A server with long timeouts, for busy machines."""
    served = Served(100, TIMEOUT_S)
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
        assert "max_connections" in json.loads(body)["error"]["message"]
        assert served.num_refused == 1 and not served.refused
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
        b"\r\n",
    ],
)
def test_requests_that_never_end(short: Served, sent: bytes) -> None:
    """The connection is closed, even if the answer did not wait for the body."""
    with short.connect() as connection:
        connection.sendall(sent)
        answer = all_of(connection)
    assert answer.count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n") and short.num_open == 0


@pytest.mark.parametrize(
    ("sent", "late"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", b"\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"\n" * 100),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"xx"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
    ],
    ids=["empty line", "empty lines", "body", "chunk"],
)
def test_bytes_after_an_answer_that_begin_no_request(short: Served, sent: bytes, late: bytes) -> None:
    """They end uvicorn's wait for the next request, but the connection is still closed."""
    with short.connect() as connection:
        connection.settimeout(20 * SHORT_S)
        connection.sendall(sent)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
        connection.sendall(late)
        assert all_of(connection) in (b"", b"xx")  # The answer's body may arrive late.
    until(lambda: short.num_open == 0)


def test_trailers_are_ignored(patient: Served) -> None:
    """They do not replace headers."""
    with patient.connect() as connection:
        head = b"POST /read HTTP/1.1\r\nAuthorization: a\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"Connection: close\r\n\r\n2\r\nxx\r\n")
        connection.sendall(b"0\r\nAuthorization: b\r\nVista-Timeout-Ms: 1\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200")
    assert [value for name, value in patient.application.headers if name == b"authorization"] == [b"a"]
    assert b"vista-timeout-ms" not in dict(patient.application.headers)


@pytest.mark.parametrize("path", [b"/read", b"/"])
@pytest.mark.parametrize("trailers", [b"A: b\r\n" * 1000, b"A: " + b"b" * 8000], ids=["many", "long"])
def test_endless_trailers(path: bytes, trailers: bytes) -> None:
    """Many, or a long one, of a request that waits for the end of its body, or that has its answer."""
    with closing(Served(100, TIMEOUT_S)) as served, served.connect() as connection:
        connection.sendall(b"POST %s HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n0\r\n" % path)
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                connection.sendall(trailers)


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
def test_half_closed_connections_get_their_answers(patient: Served, number: int) -> None:
    with patient.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * number)
        connection.shutdown(socket.SHUT_WR)
        threading.Event().wait(0.1)
        patient.application.free.set()
        assert all_of(connection).count(b"HTTP/1.1 200") == number
    until(lambda: patient.num_open == 0)


def test_what_is_not_http(patient: Served) -> None:
    chunked = b"POST /read HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
    for sent, status in (
        (b"\x16\x03\x01\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nA: " + b"b" * (1 << 17), b"431"),
        (chunked + b"0\r\nA: " + b"b" * (1 << 17), b"431"),
        (chunked + b"2;" + b"b" * (1 << 17), b"431"),
    ):
        with patient.connect() as connection:
            connection.sendall(sent)
            head, _, body = all_of(connection).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 " + status) and json.loads(body)["error"]["message"]
    assert patient.refused == [400, 431, 431, 431]
