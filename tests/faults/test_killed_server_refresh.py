"""Refreshes into a Valkey server, of which the process or the server is killed: the same records as without kills."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.faults import server_kills as kills
from tests.faults.harness import Trial, promise
from tests.faults.judging import LOST
from tests.faults.losses import compare
from tests.faults.nursery import Child, Nursery
from tests.faults.server_kills import (
    FIRST,
    FULL,
    INCREMENTAL,
    STORE,
    USERS,
    Contents,
    Growth,
    contents,
    current,
    records,
)
from tests.store.remote.valkey_server import ValkeyServer
from vista.errors import StoreUnavailableError
from vista.store import StoreReader

LOSES_NOTHING = "Kills beyond one machine lose nothing"


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
    full=40,
    short=1,
    kinds=[FULL, INCREMENTAL],
    judged=True,
)
def test_killed_refresh_into_server(trial: Trial, nursery: Nursery, growth: Growth, valkey: ValkeyServer) -> None:
    refresh_with_kills(trial, nursery, growth, valkey, of_server=False)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of the Valkey server, which restarts, at any request of a refresh ({kind})",
    full=20,
    short=1,
    kinds=[FULL, INCREMENTAL],
    judged=True,
)
def test_killed_server(trial: Trial, nursery: Nursery, growth: Growth, valkey: ValkeyServer) -> None:
    refresh_with_kills(trial, nursery, growth, valkey, of_server=True)


def refresh_with_kills(
    trial: Trial, nursery: Nursery, growth: Growth, server: ValkeyServer, *, of_server: bool
) -> None:
    """Run a refresh of the promise's kind with kills of its process or of the server, and then to its end."""
    kind, url, num_kills = trial.promise.kind, server.url(STORE), 0
    kills.restore(server, growth.dump)
    left = growth.requests[kind]
    with StoreReader.open(url) as reader:
        before = reader.get_many(USERS).summary if kind == FULL else None
        while left:
            at, share = trial.random.randint(1, left), trial.random.choice([0.0, trial.random.random(), 1.0])
            assert server.process is not None
            pid = server.process.pid if of_server else 0
            child = nursery.start(kills.refresh_into, growth.folder, url, kind, at, share, pid)
            read_until_the_end(trial, reader, child, before)
            assert child.exit_code == 0 or (child.typed if of_server else child.exit_code == -9), child.raised
            if child.exit_code or child.returned >= at:
                num_kills += 1
                if of_server:
                    kills.restart(server)
            found = held(trial, server, growth, kind)
            missed = max(child.messages, default=0) - num_written(found, growth, kind)
            if missed > 0:
                trial.count(LOST, missed)
                raise AssertionError(f"{missed} acknowledged users are lost")
            kills.release_lock(server)
            published = current(found) == 2
            trial.count("after it was published" if published else "before the end")
            left = 0 if published or trial.random.random() < 0.6 else left - at
        if not published:  # A full refresh would write the next generation.
            nursery.call(kills.refresh_into, growth.folder, url, kind)
        compare(trial, contents(server), growth.after[kind])
        assert before is None or np.array_equal(reader.get_many(USERS).summary, before)
    assert num_kills
    trial.count("kills", num_kills)
