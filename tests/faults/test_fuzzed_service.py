"""The service answers whatever clients send, in bounded memory, which it returns afterwards."""

from __future__ import annotations

import random
import re
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.faults.conftest import require_linux
from tests.faults.harness import Trial, promise
from tests.serve.running_service import RunningService, peak_bytes, resident_bytes, running, until
from tests.serve.test_fuzzed_requests import (
    AUTHORIZED,
    KNOWN,
    LARGE,
    NAMES,
    SKUS,
    bodies,
    detailed_command,
    encoded,
    filled,
    of_one_model,
)

EACH = 500
NUM_DRAWN = 25
"""Bodies that hypothesis draws per EACH requests; the others are mutations, which take no time."""
NUM_LARGE = 1
"""Connections with bodies of the largest size, of which each is alone, per EACH requests."""
NUM_TOGETHER = 8
"""Connections at the same time, if there are several. Once per EACH requests, all have a body of the largest size."""
SHARE_PIPELINED = 0.03
"""Share of connections with more than one request."""
SHARE_TOGETHER = 0.02
"""Share of groups of connections with more than one."""
MOST_KEPT = 1.3
"""Memory of the service afterwards, as a share of that at its start."""
PATHS = (
    *(b"/v1/users/u1", b"/v1/users/%ff", b"/v1/users/" + b"9" * 999, b"/v1/model", b"/v1/model?model=a", b"/v1/none"),
    *(b"/metrics", b"/docs", b"/openapi.json", b"/readyz", b"http://localhost/healthz"),
)
TOKENS = (
    *(b"null", b"[]", b"{}", b'""', b"-0", b"1e999", b"9" * 40, b'{"a":' * 50),
    *(b"\xff", b"\0", b"\r\n", b"\x91" * 50, b"\xdf\xff\xff\xff\xff"),
)
"""What mutations insert."""


class Fuzzed:
    """A service, its memory when it had answered one request of each kind, and a client that sends anything."""

    def __init__(self, service: RunningService) -> None:
        self.service = service
        good = {"users": NAMES[:2], "user": NAMES[0], "candidates": SKUS, "items": SKUS}
        for name, (needed, _) in KNOWN.items():
            assert service.fetch(f"/v1/{name}", {key: good[key] for key in needed}, headers=AUTHORIZED)[0] == 200
        self.start_bytes = resident_bytes(service)

    def statuses(self, sent: bytes) -> list[int]:
        """Send bytes on one connection, close its sending half, and return the statuses of all answers."""
        held = list[bytes]()
        with self.service.connect() as connection, suppress(ConnectionError):
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 20):
                held.append(part)
        found, rest = list[int](), b"".join(held)
        while rest:
            head, _, rest = rest.partition(b"\r\n\r\n")
            length = re.search(rb"(?i)content-length: *(\d+)", head)
            assert length is not None, head
            found.append(int(head[9:12]))
            rest = rest[int(length[1]) :]
        return found

    def leave(self, sent: bytes) -> None:
        """Send and reset the connection, without reading."""
        with self.service.connect() as connection, suppress(ConnectionError):
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.sendall(sent)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fuzzed]:
    """A service that starts as a user's does."""
    require_linux()
    with running(*detailed_command(tmp_path_factory), fresh=True) as service:
        yield Fuzzed(service)


def post(name: str, body: bytes, *, packed: bool) -> bytes:
    """A request."""
    kind = "msgpack" if packed else "json"
    head = f"POST /v1/{name} HTTP/1.1\r\nHost: localhost\r\nAuthorization: {AUTHORIZED['Authorization']}\r\n"
    return f"{head}Content-Type: application/{kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def drawn(number: int) -> list[tuple[str, bytes, bool]]:
    """Endpoints, bodies, and whether they are MessagePack; those of a number are always the same."""
    found = list[tuple[str, bytes, bool]]()

    def draw(asked: tuple[str, object], packed: bool) -> None:
        found.append((asked[0], encoded(of_one_model(asked[1]), packed=packed), packed))

    every = given(st.sampled_from(sorted(KNOWN)).flatmap(bodies), st.booleans())(draw)
    limits = settings(max_examples=NUM_DRAWN, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    seed(number)(limits(every))()
    return found


@cache
def large(number: int, packed: bool) -> bytes:
    """A body of the largest size."""
    return filled(*LARGE[number], packed=packed)


def mutated(sent: bytes, rng: random.Random) -> bytes:
    """The bytes after one to three changes."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(sent) + 1)
        stop = min(len(sent), place + rng.choice((0, 1, 1, 4, 30)))
        put = rng.choice((b"", rng.randbytes(1), rng.choice(TOKENS), sent[place:stop] * 2))
        sent = sent[:place] + put + sent[stop:]
    return sent


def request(asked: tuple[str, bytes, bool], rng: random.Random, *, is_last: bool) -> bytes:
    """A drawn request: unchanged, with a mutated body, replaced by a GET, or, if it is the last, mutated anywhere."""
    name, body, packed = asked
    dice = rng.randrange(20)
    if dice < 14:
        return post(name, mutated(body, rng), packed=packed)
    sent = post(name, body, packed=packed)
    if dice == 14:
        head = sent.partition(b"\r\n")[2].partition(b"Content-Type")[0]
        sent = b"GET %s HTTP/1.1\r\n%s\r\n" % (rng.choice(PATHS), head)
    return mutated(sent, rng) if is_last and dice < 17 else sent


def requests(rng: random.Random, asked: list[tuple[str, bytes, bool]], most: int) -> list[bytes]:
    """The requests of a connection."""
    times = min(most, rng.choice((5, 17, 40)) if rng.random() < SHARE_PIPELINED else 1)
    return [request(rng.choice(asked), rng, is_last=k == times - 1) for k in range(times)]


def large_requests(rng: random.Random, times: int) -> list[bytes]:
    """The same request of the largest size, several times."""
    number, packed = rng.randrange(len(LARGE)), rng.random() < 0.5
    body = large(number, packed)
    return [post(LARGE[number][0], rng.choice((body, mutated(body, rng))), packed=packed)] * times


def groups(rng: random.Random, asked: list[tuple[str, bytes, bool]]) -> Iterator[list[list[bytes]]]:
    """Groups of connections at the same time, each a list of requests; EACH requests in total."""
    largest = [[large_requests(rng, rng.choice((1, 1, 5)))] for _ in range(NUM_LARGE)]
    largest.append([large_requests(rng, 1) for _ in range(NUM_TOGETHER)])
    yield from largest
    left = EACH - sum(len(sent) for group in largest for sent in group)
    while left:
        group = list[list[bytes]]()
        for _ in range(NUM_TOGETHER if rng.random() < SHARE_TOGETHER else 1):
            if left:
                group.append(requests(rng, asked, left))
                left -= len(group[-1])
        yield group


@promise(
    "Resources are bounded",
    fault="fuzzed requests to the service, including pipelined, abandoned, and 4 MB ones",
    full=100_000,
    each=EACH,
)
def test_fuzzed_requests(trial: Trial, fuzzed: Fuzzed) -> None:
    service, above, most_bytes = fuzzed.service, 0, 0

    def exchange(sent: list[bytes], is_left: bool) -> list[int] | None:
        if not is_left:
            return fuzzed.statuses(b"".join(sent))
        fuzzed.leave(b"".join(sent))
        return None

    with ThreadPoolExecutor(NUM_TOGETHER) as threads:
        for group in groups(trial.random, drawn(trial.number)):
            are_left = [len(sent) > 1 and trial.random.random() < 0.3 for sent in group]
            before = resident_bytes(service)
            for sent, statuses in zip(group, threads.map(exchange, group, are_left), strict=True):
                if statuses is None:
                    trial.count("left before the answers", len(sent))
                    continue
                assert all(status < 500 for status in statuses), (statuses, sent[0][:1000])
                for status in statuses:
                    trial.count(f"status {status}")
            # The requests of a connection are answered one after the other, and reading pauses while one waits.
            at_once = sum(max(map(len, sent)) for sent in group)
            most_bytes = max(most_bytes, at_once)
            peak = peak_bytes(service)
            assert peak - before < 4 * at_once + 100e6, (peak, before, at_once)
            above = max(above, peak - fuzzed.start_bytes)
    assert above < 4 * most_bytes + 100e6, above
    until(lambda: resident_bytes(service) < MOST_KEPT * fuzzed.start_bytes)
    kept = resident_bytes(service) / fuzzed.start_bytes
    trial.count(f"peak at most {20 * int(above / 20e6 + 1)} MB above the start")
    trial.count(f"afterwards at most {0.05 * int(20 * kept + 1):.2f} of the start")
    assert "Traceback" not in service.log
