"""Servers that fail or refuse: typed errors within a bounded time, no wrong byte, the old generation in service."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import pytest

from tests.store.remote.valkey_server import free_port
from vista.errors import ConfigError, StoreError, StoreLockedError, StoreUnavailableError, StoreWriteError
from vista.store import StoreReader, server_generation, user_keys
from vista.store.layout import StoreUrl, pointer_to
from vista.store.server_connection import ServerConnection, ServerLock

TOTAL = 40


@contextmanager
def within(seconds: float) -> Iterator[None]:
    begin = time.monotonic()
    yield
    assert time.monotonic() - begin < seconds


def served(url: str) -> int:
    """Salt of the run whose records are served; all of them must be of this run."""
    with StoreReader.open(url) as store:
        batch = store.get_many(range(TOTAL))
        assert batch.found.all()
        salts = np.rint((batch.summary[:, 0, 0] - np.arange(TOTAL)) / 1000)
        assert len(set(salts.tolist())) == 1, salts
        return int(salts[0])


def test_a_server_that_cannot_be_reached(start_server):
    server = start_server()
    server.kill()
    with within(5), pytest.raises(StoreUnavailableError, match=r"127\.0\.0\.1:\d+/mine: the server cannot be reached"):
        StoreReader.open(server.url(user=":secret@"))
    with within(120), pytest.raises(StoreUnavailableError):  # A name server that does not answer takes its own time.
        StoreReader.open("redis://store.invalid/mine")


def test_a_server_that_does_not_answer(proxy, build, server):
    build.write_store(server.url())
    with StoreReader.open(proxy.url(options="?timeout_s=0.5")) as store:
        proxy.silent = True
        with within(20), pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.5 s"):
            store.get_many([1])
        proxy.silent = False
        assert store.get_many([1, 99]).found.tolist() == [True, False], "and works again without being opened again"


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """The URL of a service that answers the first command of each connection."""

    def serve() -> None:
        while True:
            try:
                client, _ = listener.accept()
                with client:
                    client.recv(1000)
                    answer(client)
                    client.recv(1000)
            except ConnectionError:
                continue
            except OSError:
                return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=serve, daemon=True).start()
        yield f"redis://127.0.0.1:{listener.getsockname()[1]}/mine"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"$x\r\n", pytest.param(b"*1\r\n" * 100_000, id="nested")]
)
def test_another_protocol_on_the_port(greeting):
    refused = pytest.raises(StoreError, match=r"not a Valkey or Redis server|cannot be reached")
    with answering(lambda client: client.sendall(greeting)) as url, within(6), refused:
        StoreReader.open(f"{url}?timeout_s=1")


def test_a_server_that_sends_a_byte_at_a_time():
    """Each byte comes soon enough, but the reply as a whole does not."""

    def trickle(client: socket.socket) -> None:
        while True:
            client.sendall(b"+")
            time.sleep(0.2)

    with answering(trickle) as url, within(4), pytest.raises(StoreUnavailableError, match=r"not answer within 0\.5 s"):
        StoreReader.open(f"{url}?timeout_s=0.5")


def test_passwords(start_server, build, monkeypatch, caplog):
    server = start_server("--requirepass", "hunter2")
    with pytest.raises(StoreError, match=r"refuses the user or the password.*VISTA_REDIS_PASSWORD"):
        StoreReader.open(server.url())
    with pytest.raises(StoreError, match="refuses the user or the password") as caught:
        StoreReader.open(server.url(user=":wrong-one@"))
    assert "wrong-one" not in f"{caught.value!r} {caught.value.__cause__!r}"
    build.write_store(server.url(user=":hunter2@"))
    monkeypatch.setenv("VISTA_REDIS_PASSWORD", "hunter2")
    with StoreReader.open(server.url()) as store:
        assert store.get_many([1]).found.all() and "hunter2" not in f"{store.path} {store.path!r} {caplog.text}"


def test_tls(start_server, build, tmp_path, monkeypatch):
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost".split()  # noqa: SIM905
    names = ["-addext", "subjectAltName=DNS:localhost", "-keyout", tmp_path / "key", "-out", tmp_path / "certificate"]
    try:
        subprocess.run(["openssl", *words, *names], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs openssl")
    files = ["--tls-cert-file", tmp_path / "certificate", "--tls-key-file", tmp_path / "key"]
    server = start_server("--tls-auth-clients", "no", *map(str, files))
    port = free_port()
    server.command("CONFIG", "SET", "tls-port", port)
    url = f"rediss://localhost:{port}/mine"
    with pytest.raises(StoreUnavailableError, match=r"cannot be reached.*certificate"):
        StoreReader.open(url)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "certificate"))
    build.write_store(url, 1)
    assert served(url) == 1 == served(server.url())
    with pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.3 s.*TLS"):
        StoreReader.open(f"rediss://localhost:{server.port}/mine?timeout_s=0.3")


def test_a_reply_that_is_cut(server, proxy, build):
    """A request repeats once over a new connection; if that is cut too, it fails, and no byte of either is served."""
    build.write_store(server.url(), codec="float32")
    with StoreReader.open(proxy.url()) as store:
        proxy.cuts = [(0, 1000)]
        np.testing.assert_array_equal(store.get_many(range(TOTAL)).summary, build.summaries(range(TOTAL)))
        assert not proxy.cuts
        for size in (1, 20, 1000, 5000):
            proxy.cuts = [(0, size)] * 2
            with within(5), pytest.raises(StoreUnavailableError, match="closed the connection"):
                store.get_many(range(TOTAL))
            np.testing.assert_array_equal(store.get_many(range(TOTAL)).summary, build.summaries(range(TOTAL)))


@pytest.mark.parametrize("replies", [6, 30])
def test_a_writer_whose_connection_is_cut_can_resume(server, proxy, build, replies):
    """Wherever the connection breaks, the same run resumes and nothing is written twice or lost."""
    build.write_store(server.url())
    proxy.cuts = [(replies, 0), (0, 0)]
    try:
        build.write_store(proxy.url(), 1, batch=8, run_digest="log-2")
        assert not proxy.cuts, "the run was over before the cut"
    except StoreError as error:
        assert isinstance(error, StoreUnavailableError | StoreWriteError | StoreLockedError), error
        assert served(server.url()) in (0, 1)
    proxy.cuts = []
    assert build.write_store(proxy.url(), 1, batch=8, run_digest="log-2").count == TOTAL
    assert served(server.url()) == 1


def test_a_lock_whose_reply_is_lost_is_held(server, proxy):
    connection = ServerConnection(StoreUrl.parse(proxy.url()))
    connection.check()
    lock = ServerLock(connection, b"{mine}:writer")
    server.command("CONFIG", "RESETSTAT")
    proxy.cuts = [(0, 0)]
    lock.acquire()
    stats = server.command("INFO", "commandstats")
    assert stats["cmdstat_set"]["calls"] == 2 and stats["cmdstat_get"]["calls"] == 1, "it does not wait for itself"
    lock.require(server.command("GET", "{mine}:writer"))
    lock.release()
    assert not server.command("EXISTS", "{mine}:writer")


def test_a_server_that_stalls_within_a_change(proxy):
    """The client also waits for a reply when it leaves the change."""
    server = ServerConnection(StoreUrl.parse(proxy.url(options="?timeout_s=0.5")))

    def stall():
        proxy.silent = True
        return [("SET", b"a", 1)], None

    with within(20), pytest.raises(StoreUnavailableError, match=r"did not answer within 0\.5 s"):
        server.change([b"a"], stall)
    proxy.silent = False
    assert server.change([b"a"], lambda: ([("SET", b"a", 2)], 5)) == 5 and server.command("GET", b"a") == b"2"


def test_a_lock_that_never_expires_is_refused(server, build):
    build.write_store(server.url())
    server.command("SET", "{mine}:writer", "somebody")
    with within(5), pytest.raises(StoreError, match=r"the lock \{mine\}:writer never expires.*remove this key"):
        build.open_writer(server.url(), run_digest="log-2")


def test_a_writer_notices_that_the_server_lost_its_last_batches(start_server, build):
    """As after a restart without a recent snapshot: what is missing would otherwise never be written."""
    server = start_server()
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(16), 1)
        server.command("SAVE")
        build.put_users(writer, range(16, 32), 1)
        server.kill()
        server.start()
        with pytest.raises(StoreWriteError, match=r"the server lost some of the last writes.*rerun the command"):
            build.put_users(writer, range(32, 40), 1)
        assert served(url) == 0
    with build.open_writer(url, run_digest="log-2") as writer:
        assert writer.cursor == 16
    assert build.write_store(url, 1, run_digest="log-2").count == TOTAL and served(url) == 1


def test_a_server_without_memory_keeps_serving_the_previous_generation(start_server, build):
    server = start_server()
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(16), 1)
        server.command("CONFIG", "SET", "maxmemory", 100_000)
        with pytest.raises(StoreWriteError, match=r"no memory left \(maxmemory\).*raise maxmemory"):
            build.put_users(writer, range(16, 32), 1)
        assert served(url) == 0
    with pytest.raises(StoreWriteError, match="no memory left"):
        build.open_writer(url, run_digest="log-2")
    server.command("CONFIG", "SET", "maxmemory", 0)
    assert build.write_store(url, 1, run_digest="log-2").count == TOTAL and served(url) == 1


def test_a_server_that_begins_to_evict_records(start_server, build):
    """Users that it has evicted since the store was opened are not taken for new ones."""
    server = start_server()
    build.write_store(server.url())
    with StoreReader.open(server.url()) as store:
        assert store.get_many([1, 99]).found.tolist() == [True, False]
        server.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru", "maxmemory", "100mb")
        server.command("DEL", b"{mine}:gen-1:" + user_keys([1])[0])  # as if it were evicted
        time.sleep(server_generation.RECHECKED_S)
        for _ in range(2):
            with pytest.raises(StoreError, match=r"evicts records .*allkeys-lru.*set maxmemory-policy to noeviction"):
                store.get_many([1, 2])
        assert store.get_many([2]).found.all()
        server.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
        server.command("SET", "{mine}:CURRENT", "x")  # which does not matter to what is open
        assert store.get_many([2, 99]).found.tolist() == [True, False]


def test_a_server_that_is_emptied(start_server, build):
    """As by a restart without its data: requests may succeed again later, so a service answers 503, not 500."""
    server = start_server()
    build.write_store(server.url())
    with StoreReader.open(server.url()) as store:
        server.command("FLUSHALL")
        for use in (lambda: store.get_many([1]), store.reload):
            with pytest.raises(StoreUnavailableError, match="has lost the store that was open"):
                use()
        build.write_store(server.url(), 1)
        assert store.get_many(range(TOTAL)).found.all()


def test_a_replica_that_has_a_part_of_a_generation_refuses_it(start_server, build):
    """CURRENT and some records are there, but not all of the generation: no user is taken for missing."""
    server = start_server()
    with build.open_writer(server.url()) as writer:
        build.put_users(writer, range(16))
    server.command("SET", "{mine}:CURRENT", pointer_to(1))
    with pytest.raises(StoreError, match="gen-1 was never finished"):
        StoreReader.open(server.url())
    server.command("SET", "{mine}:CURRENT", pointer_to(2))
    with pytest.raises(StoreError, match="has no gen-2; name an existing generation: gen-1"):
        StoreReader.open(server.url())


def update(url: str, build: Any) -> None:
    build.update(url, range(4), salt=1)


def test_keys_that_hold_something_else(start_server, build):
    """Such as those of another program: an update works, or raises a typed error."""
    server = start_server()
    url = server.url()
    build.write_store(url)
    users = server.command("KEYS", "*:ui*")
    names = [name for name in server.command("KEYS", "{mine}:*") if name not in users]
    assert len(names) == 7 and len(users) == TOTAL
    for name in [*names, b"{mine}:tombstones", users[0]]:
        server.command("FLUSHALL")
        build.write_store(url)
        server.command("DEL", name)
        server.command("SADD", name, "x")
        with suppress(StoreError, ConfigError):
            update(url, build)
