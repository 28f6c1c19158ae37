"""A refresh with Ray of which actors or the driver are killed: the same bytes as of a refresh in one process.

There are no short forms: tests/refresh/test_ray_refresh.py has a kill of each.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.faults import preload
from tests.faults.harness import Trial, promise
from tests.faults.losses import compare
from tests.faults.nursery import Nursery, Say
from tests.faults.server_kills import Contents, folder_contents
from tests.faults.test_killed_server_refresh import LOSES_NOTHING
from tests.refresh import conftest as growing
from vista.config import RayConfig
from vista.log.event_log import EventLog
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreReader

NUM_USERS, USERS_PER_BATCH = 160, 4
KILLS, SPACING = 4, 10
"""Kills per refresh, and batches per kill."""


@dataclass(frozen=True)
class Cluster:
    """A running Ray, the inputs of a refresh, and what it leaves if nobody kills it."""

    address: str
    folder: Path
    """log/, model/, and first/, a store with one generation."""
    after: Contents
    num_calls: int
    """System calls of the refresh that change the store."""


def refresh_by_actors(say: Say, folder: str, store: str, address: str, kill_call: int, kill_after: list[int]) -> int:
    """Write the second generation by an actor, or by this process without an address.

    Args:
        kill_call: number of the system call that changes the store at which this process is killed; 0 for none.
        kill_after: numbers of the batches after whose return their actor is killed.

    Returns:
        The number of such system calls.
    """
    preload.watch(store)
    preload.kill_at(preload.WRITES | preload.SYNCS | preload.NAMES, kill_call or preload.FOREVER, signal.SIGKILL)
    run = {"options": RefreshOptions(users_per_batch=USERS_PER_BATCH), "created_at": 2}
    if address:
        run["engine"] = killing_engine(say, folder, address, kill_after)
    refresh(VistaModel.from_pretrained(Path(folder, "model")), EventLog.open(Path(folder, "log")), store, **run)
    return preload.calls_since(kill_call or preload.FOREVER)


def killing_engine(say: Say, folder: str, address: str, kill_after: list[int]) -> Any:
    """An engine that kills an actor after some batches; says "killed" then."""
    from vista.refresh import ray_engine

    get, number = ray_engine._get, 0

    def get_and_kill(*arguments: Any) -> Any:
        nonlocal number
        result = get(*arguments)
        number += 1
        if number in kill_after:
            os.kill(result.process, signal.SIGKILL)
            say("killed")
        return result

    setattr(ray_engine, "_get", get_and_kill)  # noqa: B010
    return ray_engine.RayEngine(Path(folder, "model"), RayConfig(address=address, num_actors=1))


def host_ray(say: Say, folder: str) -> None:
    """Run a Ray of one CPU until SIGTERM; says its address."""
    import ray

    del os.environ["LD_PRELOAD"]  # Ray's processes need none of it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    quiet = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    ray.init(num_cpus=1, object_store_memory=80_000_000, _temp_dir=folder, **quiet)
    say(ray.get_runtime_context().gcs_address)
    signal.sigwait({signal.SIGTERM})
    ray.shutdown()


@pytest.fixture(scope="module")
def drivers(library: str) -> Iterator[Nursery]:
    """A nursery whose children may all use one Ray, without a token, and without a limit of memory."""
    if find_spec("ray") is None:
        pytest.skip("the extra `ray` is not installed")
    with Nursery(LD_PRELOAD=library, RAY_AUTH_MODE="disabled", RAY_memory_monitor_refresh_ms="0") as started:
        for module in ("tests.faults.test_killed_actors", "vista.refresh.ray_engine"):
            started.imports(module)
        yield started


@pytest.fixture(scope="module")
def cluster(drivers: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster").resolve()
    log = growing.append(folder / "log", growing.events({user: 1 + user % 9 for user in range(NUM_USERS)}))
    model = growing.model(counters=True, counter_categories=["genre"])
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "first", created_at=1)
    shutil.copytree(folder / "first", folder / "store")
    num_calls = drivers.call(refresh_by_actors, folder, folder / "store", "", 0, [])
    with tempfile.TemporaryDirectory(prefix="vr-", ignore_cleanup_errors=True) as sockets:  # Their paths must be short.
        host = drivers.start(host_ray, sockets)
        address = host.hear(300)
        assert address, host.raised
        yield Cluster(address, folder, folder_contents(folder / "store"), num_calls)
        host.kill(signal.SIGTERM)
        host.result(300)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of an actor of a refresh with Ray, after any batch, four times per refresh",
    full=20,
    short=0,
    each=KILLS,
    judged=True,
)
def test_killed_actor(trial: Trial, drivers: Nursery, cluster: Cluster) -> None:
    store = trial.folder.resolve() / "store"
    shutil.copytree(cluster.folder / "first", store)
    # Up to four batches after a kill may still be of the killed process.
    numbers = [place * SPACING + trial.random.randrange(1, SPACING - 4) for place in range(KILLS)]
    child = drivers.start(refresh_by_actors, cluster.folder, store, cluster.address, 0, numbers).end(300)
    assert child.exit_code == 0, child.raised
    assert child.messages == ["killed"] * KILLS
    trial.count("kills", KILLS)
    compare(trial, folder_contents(store), cluster.after)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of the driver of a refresh with Ray, at any system call that changes the store",
    full=5,
    short=0,
    judged=True,
)
def test_killed_driver(trial: Trial, drivers: Nursery, cluster: Cluster) -> None:
    store = trial.folder.resolve() / "store"
    shutil.copytree(cluster.folder / "first", store)
    before = folder_contents(store)
    job = (refresh_by_actors, cluster.folder, store, cluster.address)
    with StoreReader.open(store) as reader:
        child = drivers.start(*job, trial.random.randint(1, cluster.num_calls), []).end(300)
        assert child.exit_code == -9, child.raised
        trial.count("kills")
        assert reader.get_many(range(NUM_USERS)).found.all()
    published = (store / "CURRENT").read_bytes() != before[b"CURRENT"]
    trial.count("after it was published" if published else "before the end")
    if not published:
        found = folder_contents(store)
        compare(trial, {key: value for key, value in found.items() if not key.startswith(b"gen-2")}, before)
        drivers.start(*job, 0, []).end(300).result()
    compare(trial, folder_contents(store), cluster.after)
