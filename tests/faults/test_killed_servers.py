"""Kills in the traffic with a Valkey server lose nothing: refreshes, erasures, and copies."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.faults import preload
from tests.faults.harness import LOSES_NOTHING, LOST, Trial, compare, promise
from tests.faults.nursery import Child, Nursery, Say
from tests.faults.oracle import Contents, folder_contents
from tests.refresh import conftest as growing
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.checks import Codec
from vista.errors import StoreUnavailableError
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader, folder_generation, server_generation, user_keys
from vista.store.admin import copy_generation
from vista.store.layout import parse_pointer
from vista.store.server_generation import ServerWriter
from vista.store.writer import erase

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


def copy(say: Say, source: str, target: str, kill_call: int, *kill: Any) -> list[int]:
    """Copy and publish a generation in small batches.

    Args:
        kill_call: number of the system call that changes a target folder at which this process is killed; 0 for none.
        kill: arguments of `CountedRequests`.

    Returns:
        The numbers of requests to servers and of such system calls.
    """
    folder_generation._WALK_USERS = server_generation._BATCH_RECORDS = USERS_PER_BATCH
    requests = CountedRequests(*kill)
    preload.watch(target)
    preload.die_at(kill_call)
    copy_generation(source, target)
    return [requests.number, preload.calls_since(kill_call)]


def erase_from(say: Say, url: str, users: list[int], *kill: Any) -> int:
    """Erase users; returns the number of requests to the server."""
    requests = CountedRequests(*kill)
    erase(url, users)
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
    """Read what was published before, as often as possible, until a child has ended.

    Args:
        expected: the users' summaries; None if they are being replaced.
    """
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
    full=12,
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


ERASED = [2, 3, 11, 12, 13, 24]


@pytest.fixture(scope="module")
def erased(growth: Growth, valkey: ValkeyServer, nursery: Nursery) -> tuple[int, Contents]:
    """The requests of an erasure, and what the server holds after it and a full refresh."""
    restore(valkey, growth.dump)
    requests = nursery.call(erase_from, valkey.url(STORE), ERASED)
    nursery.call(refresh_into, growth.folder, valkey.url(STORE), FULL)
    return requests, contents(valkey)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of an erasure on a Valkey server, and of the refresh around it, at any request",
    full=8,
)
def test_killed_server_erasure(
    trial: Trial, nursery: Nursery, growth: Growth, erased: tuple[int, Contents], valkey: ValkeyServer
) -> None:
    url, (num_requests, after), gone = valkey.url(STORE), erased, set(user_keys(ERASED))
    restore(valkey, growth.dump)

    def kill(job: object, *arguments: object, requests: int) -> None:
        at, share = trial.random.randint(1, requests), trial.random.choice([0.0, trial.random.random(), 1.0])
        child = nursery.start(job, *arguments, at, share).end()  # type: ignore[arg-type]
        assert child.exit_code == -9, child.raised
        trial.count("kills")
        release_lock(valkey)

    def judge() -> None:
        found = contents(valkey)
        for number, kind in ((1, FIRST), (2, FULL)):
            held, whole = records(found, number), records(growth.after[kind], number)
            wanted = whole if number == 1 else {key: whole[key] for key in held}
            compare(trial, held, wanted, {key: value for key, value in wanted.items() if key not in gone})

    if trial.random.random() < 0.7:  # An unfinished generation loses its erased users too.
        kill(refresh_into, growth.folder, url, FULL, requests=growth.requests[FULL] - 20)
    with StoreReader.open(url) as reader:
        kill(erase_from, url, ERASED, requests=num_requests)
        judge()
        assert reader.get_many([user for user in USERS if user not in ERASED]).found.all()
        nursery.call(erase_from, url, ERASED)
        judge()
        assert not reader.get_many(ERASED).found.any()
        assert not [key for key in contents(valkey) if any(key.endswith(b":" + user) for user in gone)]
    if trial.random.random() < 0.5:
        kill(refresh_into, growth.folder, url, FULL, requests=growth.requests[FULL] - 20)
    nursery.call(refresh_into, growth.folder, url, FULL)
    compare(trial, contents(valkey), after)


TO_SERVER, TO_FOLDER = "to a server", "from a server"


@dataclass(frozen=True)
class Copies:
    """Stores with one and with two generations, and what a copy of the second one to the store with one leaves."""

    folder: Path
    """one/ and two/."""
    on_server: dict[bytes, bytes]
    """A server with both generations, for `restore`."""
    after: dict[str, Contents]
    points: dict[str, list[int]]
    """Requests and system calls of the copies, by kind."""


@pytest.fixture(scope="module")
def copies(growth: Growth, valkey: ValkeyServer, traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    folder, model = tmp_path_factory.mktemp("copies").resolve(), VistaModel.from_pretrained(growth.folder / "model")
    options = RefreshOptions(codec=Codec.float32, state="none")  # type: ignore[arg-type]
    for segment, name in ((1, "one"), (2, "two")):
        if segment == 2:
            shutil.copytree(folder / "one", folder / "two")
        log = EventLog.open(growth.folder / "log", last_segment=segment)
        refresh(model, log, folder / name, options=options, created_at=segment)
    shutil.copytree(folder / "one", folder / "target")
    restore(valkey, growth.dump)
    points = {TO_SERVER: traced.call(copy, folder / "two", valkey.url(STORE), 0)}
    on_server, after = dumped(valkey), {TO_SERVER: contents(valkey)}
    points[TO_FOLDER] = traced.call(copy, valkey.url(STORE), folder / "target", 0)
    after[TO_FOLDER] = folder_contents(folder / "target")
    return Copies(folder, on_server, after, points)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of a copy {kind}: at any request, or system call that changes the folder",
    full=8,
    kinds=[TO_SERVER, TO_FOLDER],
)
def test_killed_copy(trial: Trial, traced: Nursery, growth: Growth, copies: Copies, valkey: ValkeyServer) -> None:
    kind, url, folder = trial.promise.kind, valkey.url(STORE), trial.folder / "target"
    restore(valkey, growth.dump if kind == TO_SERVER else copies.on_server)
    if kind == TO_SERVER:
        source, target, found = str(copies.folder / "two"), url, lambda: contents(valkey)
    else:
        shutil.copytree(copies.folder / "one", folder)
        source, target, found = url, str(folder), lambda: folder_contents(folder)
    before, source_before = found(), contents(valkey) if kind == TO_FOLDER else {}
    num_requests, num_calls = copies.points[kind]
    num_kills, again = 0, True
    with StoreReader.open(target) as reader:
        expected = reader.get_many(USERS).summary
        while again:
            by_call = kind == TO_FOLDER and trial.random.random() < 0.6
            most = num_calls if by_call else num_requests
            at = trial.random.randint(1, most) if num_kills else 1 + trial.point(most)
            point = [at] if by_call else [0, at, trial.random.choice([0.0, trial.random.random(), 1.0])]
            child = traced.start(copy, source, target, *point).end()
            assert child.exit_code == -9 or (num_kills and child.exit_code == 0), child.raised
            if child.exit_code:
                num_kills += 1
                trial.count("at a system call" if by_call else "at a request")
            release_lock(valkey)
            assert np.array_equal(reader.get_many(USERS).summary, expected)
            with StoreReader.open(target) as opened:
                assert opened.get_many(USERS).found.all()
            again = trial.random.random() < 0.4
        traced.call(copy, source, target, 0)
    compare(trial, found(), copies.after[kind])
    assert before != found()
    if kind == TO_FOLDER:
        compare(trial, contents(valkey), source_before)
    trial.count("kills", num_kills)
