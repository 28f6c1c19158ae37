"""What clients do wrong: bad bodies, too much at once, slow and broken connections, endless requests, no token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import partial
from typing import Any

import pytest
import uvicorn

from tests.conftest import ITEMS, Served
from tests.serve.running_service import TIMEOUT_S, RunningService, running, until
from vista.errors import ConfigError, RecordError, StoreError, StoreUnavailableError
from vista.serve import http_protocol
from vista.serve.http_protocol import BoundedHttpProtocol, answer_of
from vista.serve.shared import read_tokens

GOOD = {"users": [103], "candidates": [0, 10]}


HEAVY = {"users": [100 + n % 16 for n in range(600)], "candidates": ITEMS * 8}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("score", b"{", 400, "not valid"),
        ("score", b'{"request": {"a": ' + b"[" * 50_000, 422, "got `array`"),
        ("score", {"users": 103, "candidates": [0]}, 422, "$.users"),
        ("score", {"users": ["bob"], "candidates": [0]}, 422, "bob"),
        ("score", {"users": [103], "candidates": ["a"]}, 422, "integer"),
        ("score", {"users": [103], "candidates": [[0], [10]]}, 422, "has 2 lists, but there are 1 users"),
        ("score", {"users": [2**70], "candidates": [0]}, 422, ""),
        ("score", {**GOOD, "userz": 1}, 422, "userz"),
        ("score", {**GOOD, "now": 1_700_000_000}, 422, "looks like seconds"),
        ("score", {**GOOD, "tail": [[{"item": 0, "time": 1, "action": "buy"}]]}, 422, "click"),
        ("score", {**GOOD, "request": {"device": "phone"}}, 422, "request"),
        ("rank", {"user": 103, "top_k": 0}, 422, "top_k"),
        ("explain", {"user": 103, "items": [0] * 101}, 413, "at most 100"),
        ("score", {"users": [103] * 257, "candidates": [0]}, 413, "max_users"),
        ("score", {"users": [103] * 10, "candidates": [0] * 1001}, 413, "max_candidates"),
        ("score", {"users": [103], "candidates": [0] * 10_001}, 413, "max_candidates"),
    ],
)  # fmt: skip
def test_bad_bodies(service: RunningService, path: str, body: Any, status: int, words: str) -> None:
    code, answer = service.fetch(f"/v1/{path}", body)
    assert code == status, answer
    assert words in answer["error"]["message"] and answer["error"]["type"], answer


def test_ten_million_candidates(service: RunningService) -> None:
    """They are refused as soon as the size is known: when it is announced, or when it is reached."""
    body = b'{"users": [103], "candidates": [' + b"1234567, " * 10_000_000 + b"0]}"
    status, answer = service.fetch("/v1/score", body)
    assert status == 413 and "max_body_bytes" in answer["error"]["message"]
    with service.connect() as connection:
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + body[: 1 << 20] + b"\r\n"
        for _ in range(6):
            connection.sendall(chunk)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


def test_a_catalog_of_any_size_is_ranked(served: Served) -> None:
    """The model has 40 items, but a request may name 39."""
    with running(f"model={served.model_dir}", f"store={served.store}", "max_candidates=39") as service:
        status, answer = service.fetch("/v1/rank", {"user": 103, "top_k": 39})
        assert status == 200 and len(answer["items"]) == 39
        status, answer = service.fetch("/v1/rank", {"user": 103, "top_k": 40})
        assert status == 413 and "max_candidates" in answer["error"]["message"]
        assert service.fetch("/v1/rank", {"user": 103, "candidates": ITEMS})[0] == 200


def test_bodies_of_many_clients_take_bounded_memory(strict: RunningService) -> None:
    """Each is within its limit of 100,000 bytes; a worker holds sixteen times that."""
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n\r\n"
    with ExitStack() as stack:
        connections = [stack.enter_context(strict.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(head + b" " * 99_999)
        refused, _, _ = select.select(connections, [], [], TIMEOUT_S)
        answer = b""
        while not answer.endswith(b"}}"):
            answer += refused[0].recv(1 << 16)
        assert answer.startswith(b"HTTP/1.1 429") and b"Retry-After: 1" in answer.title()
        assert b"the bodies of waiting requests take 1,600,000 bytes already" in answer
        assert len(refused) < 10
    until(lambda: strict.fetch("/v1/score", GOOD)[0] == 200)


def test_overload_and_deadline(strict: RunningService) -> None:
    """Of many clients at once, one waits and the others get 429; a request that takes too long gets 504."""
    statuses: set[int] = set()
    retry: set[str | None] = set()
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            status, headers, _ = strict.send("/v1/score", HEAVY)
            statuses.add(status)
            if status == 429:
                retry.add(headers["Retry-After"])

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        until(lambda: statuses >= {200, 429})
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert statuses <= {200, 429, 504} and retry == {"1"}
    until(lambda: strict.fetch("/v1/score", GOOD)[0] == 200)  # What got 504 keeps its place until it is computed.

    def is_late() -> bool:
        """Not if a suspended client exceeds the limit while it sends, or a suspended service only looks afterwards."""
        status, answer = strict.fetch("/v1/score", HEAVY, headers={"Vista-Timeout-Ms": "1"})
        assert status in (200, 408, 504)
        return status == 504 and bool(answer["error"]["message"].startswith("there was no result after 1 ms;"))

    until(is_late)
    until(lambda: strict.fetch("/v1/score", GOOD)[0] == 200)
    assert strict.number('vista_requests_total{endpoint="score",model="",status="429"}') > 0


def test_slow_clients_do_not_block_others(service: RunningService) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
    slow = [service.connect() for _ in range(60)]
    try:
        for place, connection in enumerate(slow):
            connection.sendall([b"", b"POST /v1", head, head + b'\r\n{"users"'][place % 4])
        for _ in range(10):
            assert service.fetch("/v1/score", GOOD)[0] == 200
        with service.connect() as connection:
            connection.sendall(head + b"Vista-Timeout-Ms: 50\r\n\r\n{")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408")
    finally:
        for connection in slow:
            connection.close()


def test_a_full_queue_refuses_before_the_body(strict: RunningService) -> None:
    """A body that never arrives gets 429 while another request is computed, and 408 otherwise."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            strict.send("/v1/score", HEAVY)

    def status() -> bytes:
        with strict.connect() as connection:
            head = b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nVista-Timeout-Ms: 100\r\nContent-Length: 100\r\n"
            connection.sendall(head + b"\r\n{")
            return connection.recv(1 << 16)[9:12]

    thread = threading.Thread(target=work)
    thread.start()
    try:
        until(lambda: status() == b"429")
    finally:
        stop.set()
        thread.join()
    assert status() == b"408"


def test_what_is_no_endpoint(service: RunningService) -> None:
    for path, method, status in (("/v1/nothing", "GET", 404), ("/v1/score", "GET", 405), ("/healthz", "POST", 405)):
        code, answer = service.fetch(path, method=method)
        assert code == status and "see /docs for the endpoints" in answer["error"]["message"]


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:80", "127.0.0.1", "127.0.0.1:1", "[::1]:8000"])
def test_names_of_this_machine(service: RunningService, host: str) -> None:
    assert service.fetch("/v1/users/103", headers={"Host": host})[0] == 200


@pytest.mark.parametrize("host", ["example.com", "localhost.example.com", "localhost@example.com", "", "[::1", "\xff"])
def test_names_of_other_machines(service: RunningService, host: str) -> None:
    """Such as that of a web page whose name resolves to 127.0.0.1."""
    for path in ("/v1/users/103", "/docs", "/healthz"):
        status, answer = service.fetch(path, headers={"Host": host})
        assert status == 421 and "localhost, 127.0.0.1, [::1]; set token_file" in answer["error"]["message"]
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: example.com\r\n\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 421")


def test_refusals_are_counted(service: RunningService) -> None:
    """Those that reach no endpoint. They are not logged, because clients could fill the disk."""
    num_lines = len(service.lines)
    service.send("/v1/nothing")
    service.send("/v1/score", method="GET")
    service.send("/healthz", headers={"Host": "example.com"})
    for sent in (b"not HTTP\r\n\r\n", b"GET / HTTP/1.1\r\nA: " + b"b" * (1 << 17)):
        with service.connect() as connection:
            connection.sendall(sent)
            assert connection.recv(1 << 16)
    for status in (404, 405, 421, 400, 431):
        assert service.number(f'vista_requests_total{{endpoint="",model="",status="{status}"}}') >= 1
    assert service.send("/healthz", headers={"Connection": "Upgrade", "Upgrade": "websocket"})[0] == 200
    assert service.lines[num_lines:] == []


@pytest.mark.parametrize(
    ("text", "line"),
    [("", 1), ("\n\n", 1), ("secret", 1), ("a-token-of-some-length\n\nsecret", 3), ("a token-of-some-length", 1)],
)
def test_tokens_that_cannot_be_used(tmp_path: Any, text: str, line: int) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(ConfigError, match=rf"token, line {line}: must hold a token of at least 16 ") as raised:
        read_tokens(str(tmp_path / "token"))
    assert "secret" not in str(raised.value)


def test_tokens(served: Served, tmp_path: Any) -> None:
    """Each line of the file is one."""
    token, other = "a-token-of-some-length", "another-token-of-some-length"
    (tmp_path / "token").write_text(f"{token}\n\n {other} \n")
    words = (f"model={served.model_dir}", f"store={served.store}", f"token_file={tmp_path / 'token'}")
    with running(*words) as service:
        for given in (
            None,
            "",
            "Bearer",
            "Bearer ",
            f"Bearer {token}x",
            f"Bearer {token} {other}",
            f"Basic {token}",
            token,
            "Bearer \xff",
        ):
            headers = {} if given is None else {"Authorization": given}
            for path, body in (("/v1/score", GOOD), ("/metrics", None), ("/docs", None), ("/v1/users/103", None)):
                status, answer, _ = service.send(path, body, headers=headers)
                assert status == 401 and answer["WWW-Authenticate"] == "Bearer"
        for valid in (token, other):
            assert service.fetch("/v1/score", GOOD, headers={"Authorization": f"Bearer {valid}"})[0] == 200
        twice = {"Authorization": f"Bearer {token}", "authorization": f"Bearer {token}x"}
        for headers in (twice, dict(reversed(twice.items()))):
            assert service.fetch("/v1/score", GOOD, headers=headers)[0] == 401
        refused = b'vista_requests_total{endpoint="",model="",status="401"}'
        assert refused in service.send("/metrics", headers={"Authorization": f"Bearer {token}"})[2]
        assert service.send("/healthz", headers={"Host": "example.com"})[0] == 200
        assert service.send("/healthz")[0] == service.send("/readyz")[0] == 200
        assert token not in service.log and other not in service.log


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
        self.num_calls = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.num_calls += 1
        while scope["path"] == "/slow" and not self.free.is_set():
            await asyncio.sleep(0.01)
        while scope["path"] == "/read" and (await receive()).get("more_body"):
            pass
        self.headers = list(scope["headers"])
        body = b"x" * (LARGE if scope["path"] == "/large" else 2)
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})


class BoundedServer:
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
def short(monkeypatch: pytest.MonkeyPatch) -> Iterator[BoundedServer]:
    """A server with little patience."""
    monkeypatch.setattr(http_protocol, "HEAD_S", SHORT_S)
    monkeypatch.setattr(http_protocol, "WRITE_S", SHORT_S)
    served = BoundedServer(100, SHORT_S)
    yield served
    served.close()


@pytest.fixture
def patient() -> Iterator[BoundedServer]:
    """A server with long timeouts, for busy machines."""
    served = BoundedServer(100, TIMEOUT_S)
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
    served = BoundedServer(3, TIMEOUT_S)
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


def test_requests_that_never_end(short: BoundedServer) -> None:
    """The connection is closed, even if the answer did not wait for the body."""
    unfinished = (
        b"",
        b"POST / HT",
        b"POST / HTTP/1.1\r\nA: b\r\n",
        b"POST / HTTP/1.1\r\nContent-Length: 1000\r\n\r\n",
        b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nabc",
        b"GET / HTTP/1.1\r\n\r\nGET",
        b"\r\n",
    )
    with ExitStack() as stack:
        connections = [stack.enter_context(short.connect()) for _ in unfinished]
        for connection, sent in zip(connections, unfinished, strict=True):
            connection.sendall(sent)
        for connection, sent in zip(connections, unfinished, strict=True):
            assert all_of(connection).count(b"HTTP/1.1 200") == sent.count(b"\r\n\r\n"), sent
    until(lambda: short.num_open == 0)


def test_bytes_after_an_answer_that_begin_no_request(short: BoundedServer) -> None:
    """They end uvicorn's wait for the next request, but the connection is still closed."""
    exchanges = (
        (b"GET / HTTP/1.1\r\n\r\n", b"\r\n"),
        (b"GET / HTTP/1.1\r\n\r\n", b"\n" * 100),
        (b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n", b"xx"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"0\r\n\r\n"),
    )
    with ExitStack() as stack:
        connections = [stack.enter_context(short.connect()) for _ in exchanges]
        for connection, (sent, late) in zip(connections, exchanges, strict=True):
            connection.settimeout(20 * SHORT_S)
            connection.sendall(sent)
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200")
            connection.sendall(late)
        for connection in connections:
            assert all_of(connection) in (b"", b"xx")  # The answer's body may arrive late.
    until(lambda: short.num_open == 0)


def test_trailers_are_ignored(patient: BoundedServer) -> None:
    """They do not replace headers."""
    with patient.connect() as connection:
        head = b"POST /read HTTP/1.1\r\nAuthorization: a\r\nTransfer-Encoding: chunked\r\n"
        connection.sendall(head + b"Connection: close\r\n\r\n2\r\nxx\r\n")
        connection.sendall(b"0\r\nAuthorization: b\r\nVista-Timeout-Ms: 1\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200")
    assert [value for name, value in patient.application.headers if name == b"authorization"] == [b"a"]
    assert b"vista-timeout-ms" not in dict(patient.application.headers)


@pytest.mark.parametrize("trailers", [b"A: b\r\n" * 1000, b"A: " + b"b" * 8000], ids=["many", "long"])
def test_endless_trailers(trailers: bytes) -> None:
    """Many, or a long one, of a request that waits for the end of its body, or that has its answer."""
    with closing(BoundedServer(100, TIMEOUT_S)) as served, served.connect() as connection:
        connection.sendall(b"POST /read HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n0\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(2000):
                connection.sendall(trailers)


def test_a_body_that_drips(short: BoundedServer) -> None:
    with short.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(b"POST / HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n")
        for _ in range(1_000_000):
            connection.sendall(b"x")
            threading.Event().wait(0.01)


def test_answers_that_are_not_taken(short: BoundedServer) -> None:
    with short.connect() as kept, short.connect() as closing_one:
        kept.sendall(b"GET /large HTTP/1.1\r\n\r\n")
        closing_one.sendall(b"GET /large HTTP/1.1\r\nConnection: close\r\n\r\n")
        until(lambda: short.num_open == 2)
        until(lambda: short.num_open == 0)
        assert len(all_of(kept)) < LARGE and len(all_of(closing_one)) < LARGE


def test_requests_wait_while_the_service_computes(short: BoundedServer) -> None:
    """The clock does not run while it is the service that does not read."""
    with short.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" + b"POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n")
        threading.Event().wait(2 * SHORT_S)
        assert short.num_open == 1
        short.application.free.set()
        connection.sendall(b"xx" + b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n")
        assert all_of(connection).count(b"HTTP/1.1 200") == 3


def test_half_closed_connections_get_their_answers(patient: BoundedServer) -> None:
    with patient.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * 3)
        connection.shutdown(socket.SHUT_WR)
        threading.Event().wait(0.1)
        patient.application.free.set()
        assert all_of(connection).count(b"HTTP/1.1 200") == 3
    until(lambda: patient.num_open == 0)


def test_pipelined_requests_of_a_connection(patient: BoundedServer) -> None:
    """Those beyond the limit get no answer; the client has to send them again."""
    with patient.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" + b"POST /read HTTP/1.1\r\nContent-Length: 2\r\n\r\nxx" * 99)
        until(lambda: patient.num_open == 1 and patient.application.num_calls == 1)
        patient.application.free.set()
        answers = all_of(connection)
    assert answers.count(b"HTTP/1.1 200") == 1 + http_protocol.MAX_PIPELINED
    assert answers.count(b"connection: close") == 1 and answers.endswith(b"connection: close\r\n\r\nxx")
    until(lambda: patient.num_open == 0)


def test_pipelined_requests_of_all_connections(patient: BoundedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "MAX_WAITING_BYTES", 5000)
    sent = b"GET /slow HTTP/1.1\r\n\r\n" + b"POST / HTTP/1.1\r\nContent-Length: 3000\r\n\r\n" + b"x" * 3000
    with patient.connect() as kept:
        kept.sendall(sent)
        until(lambda: patient.application.num_calls == 1)
        with patient.connect() as refused:
            refused.sendall(sent)
            assert not all_of(refused) and patient.refused == [429]
        patient.application.free.set()
        assert _num_answers(kept, 2) == 2
        kept.sendall(sent)
        assert _num_answers(kept, 2) == 2


def _num_answers(connection: socket.socket, expected: int) -> int:
    held = b""
    while held.count(b"\r\n\r\nxx") < expected:
        held += connection.recv(1 << 16)
    return held.count(b"HTTP/1.1 200")


def test_a_client_that_leaves_its_requests(patient: BoundedServer, caplog: pytest.LogCaptureFixture) -> None:
    """Those that wait are forgotten, and the answer to the first one goes nowhere."""
    with patient.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n" * 10)
        until(lambda: patient.application.num_calls == 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # sends a reset
    patient.server.server_state.total_requests = 0
    patient.application.free.set()
    until(lambda: patient.num_open == 0 and not patient.server.server_state.tasks)
    # Records of INFO depend on the tests before this one, some of which set the level of the process.
    assert patient.application.num_calls == 1
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("sent", "status"), [(b"GET / HTTP/1.1\r\n" + b"a:\r\n" * 130, 431), (b"\x16\x03\x01\r\n\r\n", 400)]
)
def test_no_refusal_overtakes_an_answer(patient: BoundedServer, sent: bytes, status: int) -> None:
    """The client would take it for the answer to the request that is still computed."""
    with patient.connect() as connection:
        connection.sendall(b"GET /slow HTTP/1.1\r\n\r\n")
        until(lambda: patient.application.num_calls == 1)
        connection.sendall(b"GET / HTTP/1.1\r\n\r\n" + sent)
        answer = all_of(connection)
    patient.application.free.set()
    assert not answer
    assert patient.refused == [status]


def test_a_body_is_not_taken_for_a_request(patient: BoundedServer) -> None:
    """The client asks for HTTP/2, as Java's does by default. Its body arrives after its head."""
    with patient.connect() as connection:
        connection.sendall(
            b"POST /read HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        head, _, body = all_of(connection).partition(b"\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET / HTTP/1.1\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and "Upgrade" in json.loads(body)["error"]["message"]
    with patient.connect() as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nConnection: Upgrade, close\r\nUpgrade: h2c\r\n\r\n")
        assert all_of(connection).startswith(b"HTTP/1.1 200")
    assert patient.refused == [400] and patient.application.num_calls == 1


def test_what_is_not_http(patient: BoundedServer) -> None:
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


def test_errors_that_repeat_are_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "REPEAT_S", 1000)
    monkeypatch.setattr(http_protocol.logger, "filters", [http_protocol.Unrepeated()])
    for user in range(100):
        for error in (
            RecordError(f"of user {user}"),
            StoreUnavailableError(f"no answer {user}"),
            StoreError(str(user)),
        ):
            answer_of(error, [])
    assert len(caplog.records) == 3
    monkeypatch.setattr(http_protocol, "REPEAT_S", 0)
    answer_of(RecordError("of user 2"), [])
    assert len(caplog.records) == 4
