"""A server for all tests, and servers of their own for those that change the configuration."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store.remote.valkey_server import Proxy, ValkeyServer

pytest.importorskip("redis", reason="the extra `redis` is not installed")


@pytest.fixture
def start_server() -> Iterator[Callable[..., ValkeyServer]]:
    """Starts servers; all of them are killed at the end."""
    servers: list[ValkeyServer] = []
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:

        def start(*options: str) -> ValkeyServer:
            servers.append(ValkeyServer(Path(folder) / str(len(servers)), *options))
            return servers[-1]

        try:
            yield start
        finally:
            for server in servers:
                server.kill()


@pytest.fixture(scope="session")
def shared_server() -> Iterator[ValkeyServer]:
    """A server that appends to its log at once, so that a kill loses nothing."""
    with tempfile.TemporaryDirectory(prefix="valkey-") as folder:
        started = ValkeyServer(Path(folder) / "shared", "--appendonly", "yes", "--appendfsync", "always")
        yield started
        started.kill()


@pytest.fixture
def server(shared_server: ValkeyServer) -> ValkeyServer:
    """The shared server, empty. A test may kill it, but must not restart it or change its configuration."""
    assert shared_server.process is not None
    if shared_server.process.poll() is not None:
        shutil.rmtree(shared_server.folder / "appendonlydir")  # It would take a while to load.
        shared_server.start()
    shared_server.command("FLUSHALL")
    return shared_server


@pytest.fixture
def proxy(server: ValkeyServer) -> Iterator[Proxy]:
    """A proxy in front of the server."""
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


@pytest.fixture(autouse=True)
def short_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed writer's lock expires soon."""
    monkeypatch.setattr("vista.store.server_connection.LOCK_S", 3.0)
