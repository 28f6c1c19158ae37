"""A full refresh in actors of Ray: the same bytes as in one process, also after kills; errors keep their types."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from importlib import import_module, reload
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vista.config import RayConfig, RefreshConfig
from vista.config.checks import Codec, Precision
from vista.device import cpu_settings
from vista.errors import (
    CheckpointError,
    ConfigError,
    LogFormatError,
    MissingDependencyError,
    SummarizerMismatchError,
    VistaError,
    WorkerDiedError,
)
from vista.log.event_log import EventLog
from vista.refresh import RefreshOptions, refresh
from vista.refresh.full import BatchEncoder, StageClock
from vista.store import StoreReader
from vista.store.folder_generation import SharedEnvironment
from vista.store.layout import environment_path, state_path
from vista.store.record import RecordSpec
from vista.store.state_record import StateSpec

ray: Any = None
ray_engine: Any = None
NOW = 1_800_000_000_000
KEY = bytes(range(32))
NUM_USERS = 150
OPTIONS = RefreshOptions(codec=Codec.int8, users_per_batch=5, tokens_per_batch=64)
"""Twelve batches of the sixty users."""


@pytest.fixture(scope="module", autouse=True)
def imported() -> None:
    """Import Ray, which takes a second, only in the process that runs these tests."""
    global ray, ray_engine
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    ray_engine = import_module("vista.refresh.ray_engine")


@pytest.fixture(scope="module")
def short_folder():
    """Ray's sockets must have short paths."""
    folder = Path(tempfile.mkdtemp(prefix="vr-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def running_ray(short_folder):
    ray.init(
        num_cpus=2,
        object_store_memory=80_000_000,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        _temp_dir=str(short_folder / "module"),
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def made(tmp_path_factory, grow):
    """A model in a folder, a log of two segments, and the store that this process writes. User 7's is not finite."""
    folder = tmp_path_factory.mktemp("made")
    model = grow.model(num_tail_features=2, counter_keys=["item", "genre"])
    frames = [
        grow.events({user: 1 + user % 9 for user in range(60)}),
        grow.events({3: 2}, grow.start + 500 * grow.hour),
    ]
    for frame in frames:
        frame["item"] = np.where(frame["item"] == 0, 10, frame["item"])
    frame = frames[0]
    frame["item"][np.flatnonzero(frame["user"] == 7)[0]] = 0
    with torch.no_grad():
        model.item_table[int(model.item_rows([0])[0])] = 1e38
    model.save_pretrained(folder / "model")
    log = [grow.append(folder / "log", frame) for frame in frames][-1]
    report = refresh(model, log, folder / "local", options=OPTIONS, key=KEY, created_at=NOW)
    return SimpleNamespace(folder=folder, model=model, log=log, report=report, local=folder / "local")


def contents(store: Path) -> dict[str, dict[bytes, bytes]]:
    """All keys and values of generation 1, with its manifest and cursor."""
    found = {}
    for path in filter(Path.exists, (environment_path(store, 1), state_path(store, 1))):
        with SharedEnvironment.acquire(path) as shared:
            found[path.name] = shared.read(lambda transaction: {bytes(k): bytes(v) for k, v in transaction.cursor()})
    return found


def engine(made: SimpleNamespace, **config: Any) -> ray_engine.RayEngine:
    return ray_engine.RayEngine(made.folder / "model", RayConfig(**{"num_actors": 2, **config}))


class Kills:
    """Kills the actors of some of the results, as soon as the caller has them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, numbers: set[int]) -> None:
        self.number, self.numbers, self.killed, self.get = 0, numbers, 0, ray_engine._get
        monkeypatch.setattr(ray_engine, "_get", self)

    def __call__(self, task: Any, log: EventLog) -> ray_engine.ActorResult:
        result = self.get(task, log)
        self.number += 1
        if self.number in self.numbers:
            with suppress(ProcessLookupError):  # It died after a result before this one.
                os.kill(result.process, signal.SIGKILL)
                self.killed += 1
        return result


def actor_job(made: SimpleNamespace, spec: RecordSpec, state_spec: StateSpec | None = None) -> ray_engine.ActorJob:
    return ray_engine.ActorJob(
        model=str(made.folder / "model"),
        device="cpu",
        num_threads=1,
        log=str(made.folder / "log"),
        last_segment=2,
        log_digest=ray_engine.log_digest(made.log),
        precision=Precision.float32,
        tokens_per_batch=64,
        spec=spec,
        state_spec=state_spec,
    )


def test_the_records_of_an_actor_are_those_of_the_local_refresh(made, tmp_path):
    """Of one in this process, without Ray: it opens the model and the log by their paths."""

    class InThisProcess:
        def encode(self, encoder, batches, spec, state_spec, clock):
            actor = ray_engine.RefreshActor(actor_job(made, spec, state_spec))
            for users, counts in batches:
                yield actor.encode(users, counts).records

    with cpu_settings(1):
        refresh(
            made.model, made.log, tmp_path / "store", engine=InThisProcess(), options=OPTIONS, key=KEY, created_at=NOW
        )
    assert contents(tmp_path / "store") == contents(made.local)


@pytest.mark.nightly
def test_the_store_is_that_of_the_local_refresh_although_an_actor_is_killed(
    running_ray, made, tmp_path, monkeypatch, caplog
):
    kills, options = Kills(monkeypatch, {3}), {"options": OPTIONS, "key": KEY, "created_at": NOW}
    report = refresh(made.model, made.log, tmp_path / "store", engine=engine(made, num_actors=1), **options)
    assert kills.killed == 1 and "of an actor ended; its batches were repeated" in caplog.text
    assert contents(tmp_path / "store") == contents(made.local)
    assert len(contents(made.local)["summary"]) == 59 + 3 and len(contents(made.local)["state"]) == 59
    same = ("num_users", "num_events", "counts", "failures", "bytes_per_user")
    assert [getattr(report, name) for name in same] == [getattr(made.report, name) for name in same]
    assert set(report.failures) == {"7"} and "NaN" in report.failures["7"]
    assert report.shares["wait"] > 0 and report.shares["summarize"] == 0


@pytest.mark.nightly
def test_a_batch_whose_actors_die_ends_the_run_which_resumes(running_ray, made, tmp_path, monkeypatch):
    options: dict[str, Any] = {"options": OPTIONS, "key": KEY, "created_at": NOW}
    with monkeypatch.context() as patch:
        patch.setattr(ray_engine, "MAX_RETRIES", 0)
        Kills(patch, {3})
        with pytest.raises(WorkerDiedError, match=r"from user \d+ to user \d+ died 1 time.*again to resume"):
            refresh(made.model, made.log, tmp_path / "store", engine=engine(made, num_actors=1), **options)
    report = refresh(made.model, made.log, tmp_path / "store", **options)  # another engine
    assert report.resumed_at >= 10
    assert contents(tmp_path / "store") == contents(made.local)


def test_a_batch_that_ray_loses_is_not_a_death(made, monkeypatch):
    def get(reference: Any) -> None:
        raise ray.exceptions.ObjectLostError("ab" * 28, None, "")

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(
        WorkerDiedError, match="Ray did not return the batch from user 3 to user 5; check its nodes"
    ) as e:
        ray_engine._get(ray_engine._Task(None, 0, np.array([3, 4, 5])), made.log)
    assert "died" not in str(e.value)


@pytest.mark.nightly
def test_an_error_of_an_actor_keeps_type_and_message(running_ray, made, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        one = ray_engine.RayEngine(tmp_path / "nowhere", RayConfig(num_actors=1))
        refresh(made.model, made.log, tmp_path / "store", options=OPTIONS, engine=one)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_digest": "0"}, LogFormatError, "is not the log with which this refresh began"),
        ({"spec": RecordSpec(bytes(32), 1, 3, 16, Codec.int8)}, SummarizerMismatchError, "is not the model with which"),
    ],
)
def test_an_actor_refuses_another_log_or_model(made, change, error, message):
    job = actor_job(made, RecordSpec(made.model.summarizer_id(), 1, 3, 16, Codec.int8))
    users, counts = np.arange(2), np.array([1, 1])
    # An actor changes the settings of its process, which is this one here.
    with cpu_settings(1), pytest.raises(error, match=message):
        result = ray_engine.RefreshActor(replace(job, **change)).encode(users, counts).records
        assert isinstance(result, VistaError)
        raise result


@pytest.mark.nightly
def test_more_actors_than_the_cluster_has_room_for(running_ray, made, tmp_path):
    with pytest.raises(ConfigError, match=r"ray\.num_actors=9: Ray at local has room for 2 actors of 1 CPU"):
        refresh(made.model, made.log, tmp_path / "store", engine=engine(made, num_actors=9))


def test_ray_is_not_started_for_nothing(made):
    encoder = BatchEncoder.of(made.model, made.log, Precision.float32, 64)
    spec = RecordSpec(made.model.summarizer_id(), 1, 3, 16, Codec.int8)
    one = engine(made, address="127.0.0.1:1")
    assert list(one.encode(encoder, [], spec, None, StageClock())) == []


def test_bad_configurations_are_refused():
    with pytest.raises(ConfigError, match=r"ray: works only for a full refresh; use shard=i/n"):
        RefreshConfig(ray=RayConfig(), incremental=True)
    with pytest.raises(ConfigError, match=r"ray\.address: write host:port of the head"):
        RayConfig(address="ray://head:10001")


def test_the_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[ray\]'"):
        reload(ray_engine)


def wait_for_the_end_of(folder: Path) -> None:
    """Wait until no service of the Ray that was started in a folder is running."""
    until = time.monotonic() + 60
    while any(str(folder).encode() in command for command in commands()):
        assert time.monotonic() < until
        time.sleep(0.05)


def commands() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes()


def start_refresh(folder: Path, store: Path, temporary: Path) -> subprocess.Popen[str]:
    """`vista refresh ray.num_actors=1` in a process with a Ray of its own; returns it with some batches done."""
    words = [f"data={folder / 'log'}", f"model={folder / 'model'}", f"store={store}", "users_per_batch=1"]
    words += ["tokens_per_batch=64", "device=cpu", "num_threads=1", "ray.num_actors=1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vista.cli.main", "refresh", "--quiet", *words],
        env={**os.environ, "TMPDIR": str(temporary)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    progress, until = store / "refresh.jsonl", time.monotonic() + 120
    before = len(progress.read_text().splitlines()) if progress.exists() else 0
    while not (progress.exists() and len(progress.read_text().splitlines()) >= before + 3):
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.005)
    return process


@pytest.mark.nightly
def test_a_killed_and_an_interrupted_run_resume(tmp_path, grow, short_folder):
    model = grow.model()
    model.save_pretrained(tmp_path / "model")
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(NUM_USERS)}))
    temporary = short_folder / "own"
    temporary.mkdir()
    killed = start_refresh(tmp_path, tmp_path / "store", temporary)
    killed.kill()
    killed.communicate()
    wait_for_the_end_of(temporary)
    shutil.rmtree(temporary)
    temporary.mkdir()
    interrupted = start_refresh(tmp_path, tmp_path / "store", temporary)
    interrupted.send_signal(signal.SIGINT)
    _, errors = interrupted.communicate(timeout=60)
    assert interrupted.returncode == 130 and errors.splitlines()[-1] == "interrupted; rerun the command to resume"
    wait_for_the_end_of(temporary)
    assert not list(temporary.iterdir())
    options = RefreshOptions(users_per_batch=1, tokens_per_batch=64)
    report = refresh(model, log, tmp_path / "store", options=options)
    assert 6 <= report.resumed_at < NUM_USERS
    with StoreReader.open(tmp_path / "store") as store:
        created_at = store.manifest.created_at
    refresh(model, log, tmp_path / "local", options=options, created_at=created_at)
    assert contents(tmp_path / "store") == contents(tmp_path / "local")


@pytest.fixture
def cluster():
    """A head without CPUs and one node of two."""
    from ray.cluster_utils import Cluster

    folder = tempfile.mkdtemp(prefix="vr-")  # Ray's sockets must have short paths.
    address = Path(tempfile.gettempdir(), "ray")
    address.mkdir(exist_ok=True)  # Clusters write their address there, whatever their own folder is.
    small = {"object_store_memory": 80_000_000, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": folder, **small})
    made.add_node(num_cpus=2, **small)
    yield made
    ray.shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.research
def test_a_lost_node_loses_nothing(cluster, tmp_path, grow, monkeypatch, caplog):
    model = grow.model(num_seeds=64, dim=64)
    model.save_pretrained(tmp_path / "model")
    log = grow.append(tmp_path / "log", grow.events({user: 1 + user % 9 for user in range(400)}))
    options = RefreshOptions(users_per_batch=40, tokens_per_batch=1_000)
    refresh(model, log, tmp_path / "local", options=options, created_at=NOW)

    get, number = ray_engine._get, 0

    def get_and_lose_node(task: Any, log: EventLog) -> ray_engine.ActorResult:
        nonlocal number
        result: ray_engine.ActorResult = get(task, log)
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
    assert number == 10 and contents(tmp_path / "store") == contents(tmp_path / "local")
    assert "of an actor ended; its batches were repeated" in caplog.text
    with pytest.raises(ConfigError, match=r"ray\.address='127\.0\.0\.1:1': Ray cannot be started or reached there"):
        nowhere = ray_engine.RayEngine(tmp_path / "model", RayConfig(address="127.0.0.1:1"))
        refresh(model, log, tmp_path / "other", options=options, engine=nowhere)
