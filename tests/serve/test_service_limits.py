"""What clients do wrong: bad bodies, too much at once, slow and broken connections, no token."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.conftest import ITEMS, Served
from tests.serve.running_service import RunningService, running, until

GOOD = {"users": [103], "candidates": [0, 10]}
HEAVY = {"users": [100 + n % 16 for n in range(600)], "candidates": ITEMS * 8}


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("score", b"{", 400, "not valid"),
        ("score", b"", 400, "not valid"),
        ("score", b'{"users": [103], "candidates": [0]}x', 400, "not valid"),
        ("score", b"\xff\xfe", 400, "not valid"),
        ("score", b'{"request": {"a": ' + b"[" * 50_000, 400, "not valid"),
        ("score", {}, 422, "users"),
        ("score", [], 422, "object"),
        ("score", {"users": 103, "candidates": [0]}, 422, "$.users"),
        ("score", {"users": [103.5], "candidates": [0]}, 422, "$.users"),
        ("score", {"users": [None], "candidates": [0]}, 422, "$.users"),
        ("score", {"users": ["bob"], "candidates": [0]}, 422, "bob"),
        ("score", {"users": [103], "candidates": ["a"]}, 422, "integer"),
        ("score", {"users": [103], "candidates": "AAAA"}, 422, "$.candidates"),
        ("score", {"users": [103], "candidates": [0, [10]]}, 422, "not both"),
        ("score", {"users": [103], "candidates": [[0], [10]]}, 422, "offsets"),
        ("score", {"users": [2**70], "candidates": [0]}, 422, ""),
        ("score", {"users": [103], "candidates": [2**70]}, 422, ""),
        ("score", {**GOOD, "userz": 1}, 422, "userz"),
        ("score", {**GOOD, "now": "today"}, 422, "$.now"),
        ("score", {**GOOD, "now": 10**30}, 422, "now"),
        ("score", {**GOOD, "now": 1_700_000_000}, 422, "looks like seconds"),
        ("score", {**GOOD, "tail": [[{"item": 0, "time": 1, "action": "buy"}]]}, 422, "click"),
        ("score", {**GOOD, "tail": [[{"item": 0, "time": 2**70, "action": "click"}]]}, 422, ""),
        ("score", {**GOOD, "tail": []}, 422, "tail"),
        ("score", {**GOOD, "request": {"device": "phone"}}, 422, "request"),
        ("rank", {"user": 103, "top_k": 0}, 422, "top_k"),
        ("rank", {"user": [103]}, 422, "$.user"),
        ("explain", {"user": 103, "candidates": [0], "task": "buy"}, 422, "task"),
        ("explain", {"user": 103, "candidates": [0] * 101}, 413, "at most 100"),
        ("score", {"users": [103] * 257, "candidates": [0]}, 413, "max_users"),
        ("score", {"users": [103] * 10, "candidates": [0] * 1001}, 413, "max_candidates"),
        ("score", {"users": [103], "candidates": [0] * 10_001}, 413, "max_candidates"),
        ("rank", {"user": 103, "candidates": [0] * 10_001}, 413, "max_candidates"),
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
        connection.sendall(b"POST /v1/score HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        chunk = b"100000\r\n" + body[: 1 << 20] + b"\r\n"
        for _ in range(6):
            connection.sendall(chunk)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 413")


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
    status, answer = strict.fetch("/v1/score", HEAVY, headers={"Vista-Timeout-Ms": "1"})
    # A client that is suspended between head and body exceeds the limit while it sends.
    assert (status == 504 and answer["error"]["type"] == "DeadlineError") or status == 408
    until(lambda: strict.fetch("/v1/score", GOOD)[0] == 200)
    assert strict.number('vista_requests_total{endpoint="score",status="429"}') > 0


def test_slow_clients_do_not_block_others(service: RunningService) -> None:
    head = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n"
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


def test_broken_connections(service: RunningService) -> None:
    """Half-closed, closed before the answer, closed in the middle of the body, and not HTTP at all."""
    body = json.dumps(GOOD).encode()
    complete = b"POST /v1/score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    for sent in (complete, complete[:-5], complete * 3, b"\x16\x03\x01 not HTTP\r\n\r\n", b"\0" * 1000):
        with service.connect() as connection:
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        with service.connect() as connection:
            connection.sendall(sent)
    assert service.fetch("/v1/score", GOOD)[0] == 200
    until(lambda: service.number("vista_queue_depth") == 0)
    assert "a request failed" not in service.log


def test_endless_headers_are_refused(service: RunningService) -> None:
    with service.connect() as connection:
        connection.sendall(b"GET /healthz HTTP/1.1\r\n")
        sent = 0
        try:
            while sent < 1 << 24:
                connection.sendall(b"X-Filler: " + b"a" * 4000 + b"\r\n")
                sent += 4000
        except ConnectionError:
            pass
        assert sent < 1 << 24


def test_token(served: Served, tmp_path: Any) -> None:
    token = "a-token-of-some-length"
    (tmp_path / "token").write_text(f"{token}\n")
    words = (f"model={served.model_dir}", f"store={served.store}", f"token_file={tmp_path / 'token'}")
    with running(*words) as service:
        for given in (None, "", "Bearer", "Bearer ", f"Bearer {token}x", f"Basic {token}", token, "Bearer \xff"):
            headers = {} if given is None else {"Authorization": given}
            for path, body in (("/v1/score", GOOD), ("/metrics", None), ("/docs", None), ("/v1/users/103", None)):
                status, answer, _ = service.send(path, body, headers=headers)
                assert status == 401 and answer["WWW-Authenticate"] == "Bearer"
        assert service.fetch("/v1/score", GOOD, headers={"Authorization": f"Bearer {token}"})[0] == 200
        assert service.send("/healthz")[0] == service.send("/readyz")[0] == 200
        assert token not in service.log


IDS = st.integers() | st.text(max_size=4) | st.sampled_from([100, 103, 0, 10, 390])
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.floats() | IDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
EVENTS = st.lists(
    st.fixed_dictionaries(
        {"item": IDS, "time": st.integers() | VALUES, "action": st.sampled_from(["click", "like", "", None]) | VALUES},
        optional={"features": VALUES},
    ),
    max_size=3,
)
FIELDS = {
    "users": st.lists(IDS, max_size=4) | VALUES,
    "user": IDS | VALUES,
    "candidates": st.lists(IDS, max_size=4) | st.lists(st.lists(IDS, max_size=3), max_size=3) | VALUES,
    "now": st.integers() | VALUES,
    "tail": EVENTS | st.lists(EVENTS, max_size=2) | VALUES,
    "request": VALUES,
    "top_k": st.integers() | VALUES,
    "exclude": st.lists(IDS, max_size=3) | VALUES,
    "exclude_tail": st.booleans() | VALUES,
    "task": st.sampled_from(["next", "click"]) | VALUES,
}
BODIES = st.one_of(
    *(
        st.fixed_dictionaries(
            {name: FIELDS[name] for name in names},
            optional={name: values for name, values in FIELDS.items() if name not in names},
        )
        for names in (("users", "candidates"), ("user", "candidates"))
    ),
    st.dictionaries(st.sampled_from(sorted(FIELDS)) | st.text(max_size=4), VALUES, max_size=5),
    VALUES,
)


@settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    path=st.sampled_from(["score", "rank", "predict", "explain"]),
    body=BODIES,
    packed=st.booleans(),
    cut=st.none() | st.integers(0, 40),
)
@example(path="score", body={"users": ["\ud800"], "candidates": [0]}, packed=False, cut=None)
@example(path="rank", body={"user": "", "candidates": []}, packed=False, cut=None)
def test_no_body_gets_status_500(service: RunningService, path: str, body: Any, packed: bool, cut: int | None) -> None:
    try:
        sent = msgspec.msgpack.encode(body) if packed else json.dumps(body).encode()
    except (OverflowError, UnicodeEncodeError):  # MessagePack has no such number or text
        sent = json.dumps(body).encode()
    headers = {"Content-Type": "application/msgpack"} if packed else {}
    status, _, answer = service.send(f"/v1/{path}", sent[:cut], headers=headers)
    assert status in (200, 400, 413, 422), (status, answer)
    if status != 200:
        assert json.loads(answer)["error"]["message"]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=20))
@example(path="../../etc/passwd")
@example(path="%2e%2e%2f%00")
@example(path="%ff%fe")
@example(path="9" * 600)
def test_no_path_gets_status_500(service: RunningService, path: str) -> None:
    for prefix in ("/v1/users/", "/v1/", "/"):
        assert service.send(prefix + path)[0] < 500
