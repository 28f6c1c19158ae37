"""Kills in the traffic with a Valkey server lose nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults.harness import LOSES_NOTHING, LOST, Trial, compare, promise
from tests.faults.nursery import Child, Nursery, Say
from tests.faults.oracle import Contents
from tests.refresh import conftest as growing
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.checks import Codec
from vista.errors import StoreUnavailableError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.layout import parse_pointer
from vista.store.server_generation import ServerWriter

STORE = "mine"
FIRST, FULL, INCREMENTAL = "first refresh", "full refresh", "incremental refresh"
USERS_PER_BATCH = 4
USERS = list(range(1, 25))
"""Users of the first segment, who have records in every generation."""


@dataclass(frozen=True)
class Growth:
    """A log that grew, and what refreshes of it leave on a server if nobody kills them."""

    folder: Path
    """log/ of two segments, and model/."""
    after: dict[str, Contents]
    """By kind of refresh. The full and the incremental one follow the first one."""
    requests: dict[str, int]
    dump: dict[bytes, bytes]
    """The server after the first refresh, for `restore`."""


@pytest.fixture(scope="module")
def growth(valkey: ValkeyServer, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Growth:
    """A log that grew, and what refreshes of it into the server leave."""
    folder = tmp_path_factory.mktemp("growth")
    growing.append(folder / "log", growing.events(dict.fromkeys(USERS, 6)))
    counts = {3: 4, 31: 5, **dict.fromkeys(range(10, 28), 2)}
    growing.append(folder / "log", growing.events(counts, start=growing.START + 500 * growing.HOUR))
    growing.model(counter_keys=["item", "genre"]).save_pretrained(folder / "model")
    for module in (__name__, "vista.store.server"):
        nursery.imports(module)
    after, requests = {}, {}
    dump: dict[bytes, bytes] = {}
    for kind in (FIRST, FULL, INCREMENTAL):
        restore(valkey, dump)
        requests[kind] = nursery.call(refresh_into, folder, valkey.url(STORE), kind)
        after[kind] = contents(valkey)
        dump = dump or dumped(valkey)
    return Growth(folder, after, requests, dump)


class CountedRequests:
    """Counts what this process sends to servers, and kills a process at one of these requests."""

    def __init__(self, kill_at: int = 0, share: float = 0.0, pid: int = 0) -> None:
        """Count from now on.

        Args:
            kill_at: number of the request, 1 is the next; 0 kills nothing.
            share: of the bytes of this request that are sent before.
            pid: the process to kill; by default this one.
        """
        self.number = 0
        send = socket.socket.sendall

        def counted(connection: socket.socket, data: bytes, *flags: Any) -> None:
            self.number += 1
            if self.number != kill_at:
                return send(connection, data, *flags)
            send(connection, data[: round(share * len(data))])
            os.kill(pid or os.getpid(), signal.SIGKILL)
            send(connection, data[round(share * len(data)) :])

        setattr(socket.socket, "sendall", counted)  # noqa: B010


def refresh_into(say: Say, folder: str, url: str, kind: str, *kill: Any) -> int:
    """Run a refresh of one of the three kinds; says how many users are written after each acknowledged batch.

    Args:
        folder: has log/ of two segments, and model/.
        kill: arguments of `CountedRequests`.

    Returns:
        The number of requests to the server.
    """
    requests, put, done = CountedRequests(*kill), ServerWriter.put, 0

    def put_and_tell(*arguments: Any) -> int:
        nonlocal done
        count = put(*arguments)
        done += count
        say(done)
        return count

    setattr(ServerWriter, "put", put_and_tell)  # noqa: B010
    log = EventLog.open(Path(folder, "log"), last_segment=1 if kind == FIRST else 2)
    model, created_at = VistaModel.from_pretrained(Path(folder, "model")), 1 + (kind != FIRST)
    if kind == INCREMENTAL:
        options = RefreshOptions(users_per_batch=USERS_PER_BATCH)
        refresh_incremental(model, log, url, options=options, created_at=created_at)
    else:
        options = RefreshOptions(codec=Codec.float32, users_per_batch=USERS_PER_BATCH)
        refresh(model, log, url, options=options, created_at=created_at)
    return requests.number


def contents(server: ValkeyServer) -> Contents:
    """Everything on the server, except for the writer's lock and random words."""
    found: Contents = {}
    with server.client() as client:
        for key in client.keys():  # noqa: SIM118
            kind = client.type(key)
            if key.endswith((b":writer", b":synced")):
                continue
            if kind == b"string":
                found[key] = b"a random word" if key.endswith(b"!complete") else client.get(key)
            else:
                found[key] = client.smembers(key) if kind == b"set" else client.zrange(key, 0, -1)
    return found


def dumped(server: ValkeyServer) -> dict[bytes, bytes]:
    """Everything on the server, for `restore`."""
    with server.client() as client:
        return {key: client.dump(key) for key in client.keys()}  # noqa: SIM118


def restore(server: ValkeyServer, dump: dict[bytes, bytes]) -> None:
    """Make a server hold what it held at the time of `dumped`."""
    with server.client() as client:
        client.flushall()
        for key, value in dump.items():
            client.restore(key, 0, value)


def records(contents: Contents, generation: int) -> dict[bytes, bytes]:
    """User key -> record of a generation, after a comparison with its list of users."""
    prefix = b"{%s}:gen-%d:" % (STORE.encode(), generation)
    found = {key.removeprefix(prefix): value for key, value in contents.items() if key.startswith(prefix + b"u")}
    assert contents.get(prefix + b"!users", []) == sorted(found), "the list of users is not that of the records"
    return found


def current(contents: Contents) -> int:
    """Number of the published generation."""
    return parse_pointer(contents[b"{%s}:CURRENT" % STORE.encode()])


def release_lock(server: ValkeyServer) -> None:
    """Remove the lock of a killed writer, which would otherwise expire after seconds."""
    server.command("DEL", b"{%s}:writer" % STORE.encode())


def restart(server: ValkeyServer) -> None:
    """Start a killed server, and wait until it has loaded its files."""
    import redis

    assert server.process is not None
    assert server.process.wait(20) == -signal.SIGKILL
    server.start()
    while True:
        try:
            server.command("PING")
            return
        except redis.exceptions.BusyLoadingError:
            time.sleep(0.01)


def held(trial: Trial, server: ValkeyServer, growth: Growth, kind: str) -> Contents:
    """What the server holds: the generation before the refresh, or the new one, or in place some records of both."""
    before, after, found = growth.after[FIRST], growth.after[kind], contents(server)
    number = current(found)
    both = [records(before, 1), records(after, current(after))]
    allowed = both if kind == INCREMENTAL else [both[number - 1]]
    compare(trial, records(found, number), *allowed)
    return found


def num_written(found: Contents, growth: Growth, kind: str) -> int:
    """How many users have their new record."""
    after = growth.after[kind]
    number = current(after)
    return len(records(found, number).items() & records(after, number).items())


def read_until_the_end(trial: Trial, reader: StoreReader, child: Child, expected: Any) -> None:
    """Read what was published before, as often as possible, until a child has ended. `expected`: the users' summaries;
    None if they are being replaced."""
    while child.exit_code is None:
        child.nursery.listen()
        try:
            batch = reader.get_many(USERS)
        except StoreUnavailableError:
            assert "server" in trial.promise.name, "the server could not be reached"
            child.end()
            return
        assert batch.found.all() and (expected is None or np.array_equal(batch.summary, expected))
        trial.count("reads meanwhile")


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of a refresh into a Valkey server ({kind}) at any request, whole or in part",
    full=15,
    kinds=[FULL, INCREMENTAL],
)
def test_killed_refresh_into_server(trial: Trial, nursery: Nursery, growth: Growth, valkey: ValkeyServer) -> None:
    refresh_with_kills(trial, nursery, growth, valkey, of_server=False)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of the Valkey server, which restarts, at any request of a refresh ({kind})",
    full=6,
    kinds=[FULL, INCREMENTAL],
)
def test_killed_server(trial: Trial, nursery: Nursery, growth: Growth, valkey: ValkeyServer) -> None:
    refresh_with_kills(trial, nursery, growth, valkey, of_server=True)


def refresh_with_kills(
    trial: Trial, nursery: Nursery, growth: Growth, server: ValkeyServer, *, of_server: bool
) -> None:
    """Run a refresh of the promise's kind with kills of its process or of the server, and then to its end."""
    kind, url, num_kills = trial.promise.kind, server.url(STORE), 0
    restore(server, growth.dump)
    left = growth.requests[kind]
    with StoreReader.open(url) as reader:
        before = reader.get_many(USERS).summary if kind == FULL else None
        while left:
            at = trial.random.randint(1, left) if num_kills else 1 + trial.point(left)
            share = trial.random.choice([0.0, trial.random.random(), 1.0])
            assert server.process is not None
            pid = server.process.pid if of_server else 0
            child = nursery.start(refresh_into, growth.folder, url, kind, at, share, pid)
            read_until_the_end(trial, reader, child, before)
            assert child.exit_code == 0 or (child.typed if of_server else child.exit_code == -9), child.raised
            if child.exit_code or child.returned >= at:
                num_kills += 1
                if of_server:
                    restart(server)
            found = held(trial, server, growth, kind)
            missed = max(child.messages, default=0) - num_written(found, growth, kind)
            if missed > 0:
                trial.count(LOST, missed)
                raise AssertionError(f"{missed} acknowledged users are lost")
            release_lock(server)
            published = current(found) == 2
            trial.count("after it was published" if published else "before the end")
            left = 0 if published or trial.random.random() < 0.6 else left - at
        if not published:  # A full refresh would write the next generation.
            nursery.call(refresh_into, growth.folder, url, kind)
        compare(trial, contents(server), growth.after[kind])
        assert before is None or np.array_equal(reader.get_many(USERS).summary, before)
    assert num_kills
    trial.count("kills", num_kills)


TO_SERVER, TO_FOLDER = "to a server", "from a server"
