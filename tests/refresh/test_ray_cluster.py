"""A refresh in a Ray cluster of two nodes, one of which is lost."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vista.config import RayConfig
from vista.errors import ConfigError
from vista.log.event_log import EventLog
from vista.refresh import RefreshOptions, refresh
from vista.refresh.refresh_actor import ActorResult
from vista.store.layout import environment_path
from vista.store.lmdb.environment import SharedEnvironment

ray_extra = pytest.importorskip(
    "vista.refresh.ray_extra", reason="the extra `ray` is not installed", exc_type=ImportError
)
ray_engine = import_module("vista.refresh.ray_engine")
pytestmark = pytest.mark.research
NOW = 1_800_000_000_000


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without CPUs and one node of two."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="vr-")  # Ray's sockets must have short paths.
    Path("/tmp/ray").mkdir(exist_ok=True)  # Clusters write their address there, whatever their own folder is.
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": folder, **small})
    made.add_node(num_cpus=2, **small)
    yield made
    ray_extra.ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def records(store: Path) -> dict[bytes, bytes]:
    shared = SharedEnvironment.acquire(environment_path(store, 1))
    try:
        return shared.read(lambda transaction: {bytes(key): bytes(value) for key, value in transaction.cursor()})
    finally:
        shared.release()


def test_a_lost_node_loses_nothing(
    cluster: Any,
    tmp_path: Path,
    grow: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = grow.model(num_seeds=64, dim=64)
    model.save_pretrained(tmp_path / "model")
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(400)}))
    options = RefreshOptions(users_per_batch=40, tokens_per_batch=1_000)
    refresh(model, log, tmp_path / "local", options=options, created_at=NOW)

    get, number = ray_engine._get, 0

    def get_and_lose_node(task: Any, log: EventLog) -> ActorResult:
        nonlocal number
        result: ActorResult = get(task, log)
        number += 1
        if number == 2:
            (lost,) = cluster.worker_nodes
            cluster.add_node(num_cpus=2, object_store_memory=80_000_000)
            cluster.remove_node(lost, allow_graceful=False)
        return result

    monkeypatch.setattr(ray_engine, "_get", get_and_lose_node)
    config = RayConfig(address=cluster.address, num_actors=2)
    engine = ray_engine.RayEngine(tmp_path / "model", config)
    refresh(model, log, tmp_path / "store", options=options, engine=engine, created_at=NOW)
    assert number == 10 and records(tmp_path / "store") == records(tmp_path / "local")
    assert "of an actor ended; its batches were repeated" in caplog.text
    with pytest.raises(ConfigError, match=r"ray\.address='127\.0\.0\.1:1': Ray cannot be started or reached there"):
        nowhere = ray_engine.RayEngine(tmp_path / "model", RayConfig(address="127.0.0.1:1"))
        refresh(model, log, tmp_path / "other", options=options, engine=nowhere)
