"""Killed erasures on a Valkey server: nobody else loses a record, and once repeated, nothing of the erased is left."""

from __future__ import annotations

import pytest

from tests.faults import server_kills as kills
from tests.faults.harness import Trial, promise
from tests.faults.losses import compare
from tests.faults.nursery import Nursery
from tests.faults.server_kills import FIRST, FULL, STORE, USERS, Contents, Growth, contents, records
from tests.faults.test_killed_server_refresh import LOSES_NOTHING
from tests.store.remote.valkey_server import ValkeyServer
from vista.store import StoreReader, user_keys

ERASED = [2, 3, 11, 12, 13, 24]


@pytest.fixture(scope="module")
def erased(growth: Growth, valkey: ValkeyServer, nursery: Nursery) -> tuple[int, Contents]:
    """The requests of an erasure, and what the server holds after it and a full refresh."""
    kills.restore(valkey, growth.dump)
    requests = nursery.call(kills.erase_from, valkey.url(STORE), ERASED)
    nursery.call(kills.refresh_into, growth.folder, valkey.url(STORE), FULL)
    return requests, contents(valkey)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of an erasure on a Valkey server, and of the refresh around it, at any request",
    full=20,
    short=1,
    judged=True,
)
def test_killed_server_erasure(
    trial: Trial, nursery: Nursery, growth: Growth, erased: tuple[int, Contents], valkey: ValkeyServer
) -> None:
    url, (num_requests, after), gone = valkey.url(STORE), erased, set(user_keys(ERASED))
    kills.restore(valkey, growth.dump)

    def kill(job: object, *arguments: object, requests: int) -> None:
        at, share = trial.random.randint(1, requests), trial.random.choice([0.0, trial.random.random(), 1.0])
        child = nursery.start(job, *arguments, at, share).end()  # type: ignore[arg-type]
        assert child.exit_code == -9, child.raised
        trial.count("kills")
        kills.release_lock(valkey)

    def judge() -> None:
        found = contents(valkey)
        for number, kind in ((1, FIRST), (2, FULL)):
            held, whole = records(found, number), records(growth.after[kind], number)
            wanted = whole if number == 1 else {key: whole[key] for key in held}
            compare(trial, held, wanted, {key: value for key, value in wanted.items() if key not in gone})

    if trial.random.random() < 0.7:  # An unfinished generation loses its erased users too.
        kill(kills.refresh_into, growth.folder, url, FULL, requests=growth.requests[FULL] - 20)
    with StoreReader.open(url) as reader:
        kill(kills.erase_from, url, ERASED, requests=num_requests)
        judge()
        assert reader.get_many([user for user in USERS if user not in ERASED]).found.all()
        nursery.call(kills.erase_from, url, ERASED)
        judge()
        assert not reader.get_many(ERASED).found.any()
        assert not [key for key in contents(valkey) if any(key.endswith(b":" + user) for user in gone)]
    if trial.random.random() < 0.5:
        kill(kills.refresh_into, growth.folder, url, FULL, requests=growth.requests[FULL] - 20)
    nursery.call(kills.refresh_into, growth.folder, url, FULL)
    compare(trial, contents(valkey), after)
