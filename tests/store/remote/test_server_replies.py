"""Error replies of real servers, and keys that hold something else: each is a typed error, and nothing is removed."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.store.remote.valkey_server import ValkeyServer, free_port
from vista.errors import ConfigError, StoreError, StoreUnavailableError, StoreWriteError
from vista.store import StoreReader
from vista.store.admin.copying import copy_generation
from vista.store.admin.rollback import roll_back
from vista.store.admin.store_stats import store_stats
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.remote.server_connection import ServerConnection

TOTAL = 40


def resume(url: str, folder: Path, build: Any) -> None:
    with build.open_writer(url, run_digest="log-3") as writer:
        assert writer.cursor == 16, "nothing that was written is lost"


def copy(url: str, folder: Path, build: Any) -> None:
    assert copy_generation(folder, url, publish=False).num_resumed in (16, TOTAL)


def verify(url: str, folder: Path, build: Any) -> None:
    assert verify_store(url).num_problems == 0


def stats(url: str, folder: Path, build: Any) -> None:
    assert [each.problem for each in store_stats(url).generations] == [""] * 3


def update(url: str, folder: Path, build: Any) -> None:
    build.update(url, range(4), salt=1)


def roll(url: str, folder: Path, build: Any) -> None:
    roll_back(url, to=1)


def remove(url: str, folder: Path, build: Any) -> None:
    erase(url, [3])


def open_older(url: str, folder: Path, build: Any) -> None:
    with StoreReader.open(url, summarizer_id=build.summarizer("b")) as store:
        assert store.generation == 1 and store.get_many(range(TOTAL)).found.all()


def make_busy(server: ValkeyServer) -> None:
    """Run a script that does not end, so that every other command gets the reply BUSY."""
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"*3\r\n$4\r\nEVAL\r\n$17\r\nwhile true do end\r\n$1\r\n0\r\n")
        deadline = time.monotonic() + 20
        with socket.create_connection(("127.0.0.1", server.port)) as other:
            while time.monotonic() < deadline:
                other.sendall(b"PING\r\n")
                if other.recv(100).startswith(b"-BUSY"):
                    return
    pytest.fail("the server is not busy")


@pytest.mark.parametrize("operation", [resume, copy, verify, update, roll, remove, open_older])
def test_a_server_that_is_busy_during_one_command(start_server, build, tmp_path, monkeypatch, operation):
    """What cannot be read at the moment is not taken for damaged, missing, or of another run."""
    server = start_server("--busy-reply-threshold", "1")
    url, folder = server.url(), tmp_path / "source"
    build.write_store(folder, run_digest="log-3")
    commands, place, failures = [0], 0, 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            commands[0] += 1
            if commands[0] != place + 1:
                return function(*arguments)
            make_busy(server)
            try:
                return function(*arguments)
            finally:
                server.command("SCRIPT", "KILL")

        return call

    is_busy = True
    while is_busy:  # until the operation ends before so many commands
        server.command("FLUSHALL")
        build.write_store(url, summarizer_id=build.summarizer("b").hex())
        build.write_store(url, 1, run_digest="log-2")
        with build.open_writer(url, run_digest="log-3") as writer:
            build.put_users(writer, range(16))
        commands[0] = 0
        with monkeypatch.context() as patch:
            for name in ("command", "pipeline"):
                patch.setattr(ServerConnection, name, counted(getattr(ServerConnection, name)))
            try:
                operation(url, folder, build)
            except StoreUnavailableError as error:
                assert "BUSY" in str(error)
                failures += 1
        is_busy = commands[0] > place
        server.command("DEL", "{mine}:writer")  # if it could not be released
        operation(url, folder, build)
        place += {copy: 9, roll: 7, resume: 1, open_older: 1}.get(operation, 3)
    assert failures >= 2


def test_a_cluster(start_server, build):
    """The store is on one node, which serves it. Another node tells where."""
    buses = [free_port() for _ in range(2)]
    nodes = [start_server("--cluster-enabled", "yes", "--cluster-port", str(bus)) for bus in buses]
    with pytest.raises(StoreUnavailableError, match=r"refuses a command .*(CLUSTERDOWN|slot not served)"):
        build.write_store(nodes[0].url())
    nodes[0].command("CLUSTER", "ADDSLOTSRANGE", 0, 8191)
    nodes[1].command("CLUSTER", "ADDSLOTSRANGE", 8192, 16383)
    nodes[0].command("CLUSTER", "MEET", "127.0.0.1", nodes[1].port, buses[1])
    deadline = time.monotonic() + 20
    while any(b"cluster_state:ok" not in node.command("CLUSTER", "INFO") for node in nodes):
        assert time.monotonic() < deadline, "the cluster does not form"
        time.sleep(0.05)
    slot = nodes[0].command("CLUSTER", "KEYSLOT", "{mine}:CURRENT")
    own, other = nodes if slot < 8192 else nodes[::-1]
    assert build.write_store(own.url()).count == TOTAL and erase(own.url(), [3]) == 1
    with StoreReader.open(own.url()) as store:
        assert store.get_many(range(TOTAL)).found.sum() == TOTAL - 1
    for use in (StoreReader.open, build.write_store, verify_store):
        with pytest.raises(
            StoreUnavailableError, match=rf"is a node of a cluster.* write 127\.0\.0\.1:{own.port} in the URL"
        ):
            use(other.url())
    with pytest.raises(StoreUnavailableError, match="refuses a command"):  # A cluster has only database 0.
        StoreReader.open(own.url("1/mine"))


def test_a_server_that_accepts_no_writes(start_server, build):
    server = start_server()
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(16))
        server.command("CONFIG", "SET", "min-replicas-to-write", 1)
        with pytest.raises(StoreWriteError, match=r"accepts no writes at the moment .*NOREPLICAS"):
            build.put_users(writer, range(16, 32))
        server.command("CONFIG", "SET", "min-replicas-to-write", 0)
        build.put_users(writer, range(16, 40))
        assert writer.publish().count == TOTAL
    (server.folder / "dump.rdb").mkdir()  # so that a snapshot fails
    server.command("CONFIG", "SET", "save", "3600 1000000")
    server.command("BGSAVE")
    with pytest.raises(StoreWriteError, match=r"accepts no writes at the moment .*MISCONF"):
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            build.update(url, range(3), salt=1)
    with StoreReader.open(url) as store:
        assert store.get_many(range(TOTAL)).found.all()


def test_a_server_that_loads_its_data(start_server, build):
    server = start_server(
        "--save", "3600 1", "--loading-process-events-interval-bytes", "1024", "--enable-debug-command", "yes"
    )
    build.write_store(server.url(), total_users=400)
    server.command("SAVE")
    with StoreReader.open(server.url()) as store:
        server.kill()
        server.options = (*server.options, "--key-load-delay", "100000")
        server.start()
        with pytest.raises(StoreUnavailableError, match="is still loading its data"):
            store.get_many([1])
        server.command("CONFIG", "SET", "key-load-delay", 0)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                assert store.get_many([1]).found.all()
                break
            except StoreUnavailableError:
                time.sleep(0.02)
    with StoreReader.open(server.url()) as store:
        assert store.get_many(range(400)).found.all()


def test_a_replica_that_must_not_serve_old_data(start_server, build):
    primary, replica = start_server("--repl-diskless-sync-delay", "0"), start_server("--replica-serve-stale-data", "no")
    build.write_store(primary.url())
    primary.kill()
    replica.command("REPLICAOF", "127.0.0.1", primary.port)
    with pytest.raises(StoreUnavailableError, match=r"refuses a command .*Link with MASTER is down"):
        StoreReader.open(replica.url())


@pytest.mark.parametrize("operation", [resume, copy, verify, stats, update, roll, remove, open_older])
def test_keys_that_hold_something_else(start_server, build, tmp_path, operation):
    """Such as those of another program: every operation works, or raises a typed error."""
    server = start_server()
    url = server.url(options="?ttl_days=1")
    build.write_store(tmp_path, run_digest="log-3")
    build.write_store(url)
    users = server.command("KEYS", "*:ui*")
    names = [name for name in server.command("KEYS", "{mine}:*") if name not in users]
    assert len(names) == 8 and len(users) == TOTAL
    for command in ("SET", "SADD"):
        for name in [*names, b"{mine}:tombstones", users[0]]:
            server.command("FLUSHALL")
            build.write_store(url)
            server.command("DEL", name)
            server.command(command, name, "x")
            try:
                operation(url, tmp_path, build)
            except (StoreError, ConfigError, AssertionError) as error:
                assert not isinstance(error, AssertionError) or operation in (resume, copy, stats, verify, open_older)
