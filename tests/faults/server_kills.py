"""Kills in the traffic between a process and a Valkey server, and everything that the server holds.

Functions that take `say` are jobs of a nursery.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import preload
from tests.faults.nursery import Nursery, Say
from tests.refresh import conftest as growing
from tests.store.remote.valkey_server import ValkeyServer
from vista.config.choices import Codec
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store.admin.copying import copy_generation
from vista.store.erasure import erase
from vista.store.layout import parse_pointer
from vista.store.lmdb import transactions
from vista.store.lmdb.data_file import open_environment
from vista.store.remote import remote_records
from vista.store.remote.generation_on_server import GenerationOnServer

STORE = "mine"
Contents = dict[bytes, Any]
"""Key on a server -> its value: bytes, a set, or the members of a sorted set in order."""
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

    @classmethod
    def make(cls, folder: Path, server: ValkeyServer, nursery: Nursery) -> Growth:
        """Make the log and run the refreshes; the nursery then has all that the jobs of this file import."""
        growing.append(folder / "log", growing.events(dict.fromkeys(USERS, 6)))
        counts = {3: 4, 31: 5, **dict.fromkeys(range(10, 28), 2)}
        growing.append(folder / "log", growing.events(counts, start=growing.START + 500 * growing.HOUR))
        growing.model(counters=True, counter_categories=["genre"]).save_pretrained(folder / "model")
        for module in (__name__, "vista.store.remote.locked_server"):
            nursery.imports(module)
        after, requests = {}, {}
        dump: dict[bytes, bytes] = {}
        for kind in (FIRST, FULL, INCREMENTAL):
            restore(server, dump)
            requests[kind] = nursery.call(refresh_into, folder, server.url(STORE), kind)
            after[kind] = contents(server)
            dump = dump or dumped(server)
        return cls(folder, after, requests, dump)


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
    requests, put, done = CountedRequests(*kill), GenerationOnServer.put, 0

    def put_and_tell(*arguments: Any) -> int:
        nonlocal done
        count = put(*arguments)
        done += count
        say(done)
        return count

    setattr(GenerationOnServer, "put", put_and_tell)  # noqa: B010
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
    transactions._WALK_USERS = remote_records._BATCH_RECORDS = USERS_PER_BATCH
    requests = CountedRequests(*kill)
    preload.watch(target)
    preload.kill_at(preload.WRITES | preload.SYNCS | preload.NAMES, kill_call or preload.FOREVER, signal.SIGKILL)
    copy_generation(source, target)
    return [requests.number, preload.calls_since(kill_call or preload.FOREVER)]


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


def folder_contents(store: Path) -> Contents:
    """The keys and values of all generations in a folder, and its CURRENT and LAST."""
    found: Contents = {name.encode(): (store / name).read_bytes() for name in ("CURRENT", "LAST")}
    for path in sorted(store.glob("gen-*/summary")):
        with closing(open_environment(path, readonly=True)) as environment, environment.begin() as transaction:
            found |= {b"%s:%s" % (path.parent.name.encode(), key): value for key, value in transaction.cursor()}
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
