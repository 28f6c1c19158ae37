"""Killed refreshes, additions of items, and watches resume: the same records as without kills."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vista.files
from tests.conftest import DAY, START, small_frame
from tests.faults import preload
from tests.faults.harness import LOSES_NOTHING, Trial, compare, compare_events, promise
from tests.faults.nursery import Child, Nursery, Say, tell_around
from tests.faults.operations import ADDED, COLUMNS, add_items, add_items_before, ranked, save_model
from tests.faults.oracle import Contents, folder_contents
from tests.refresh import conftest as growing
from tests.refresh.mock_kafka import MockKafka
from vista.cli.serving_commands import run_watch
from vista.config import RayConfig, SourceConfig, WatchConfig
from vista.config.checks import Codec, OnBadRows
from vista.config.log_config import StreamConfig
from vista.errors import CheckpointError
from vista.log.event_log import EventLog
from vista.log.segment_files import DEAD_LETTERS_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader, StoreWriter
from vista.store.folder_generation import SharedEnvironment

TWO_PER_BATCH = 2
NUM_BATCHES = 8


def run_refresh(say: Say, log: str, model: str, store: str, codec: str) -> int:
    """Refresh; says "begin" and "ack" around each durable batch, and "publish".

    Returns:
        Users that an earlier run had written.
    """
    tell_around(StoreWriter, "put_batch", say, "begin", "ack")
    tell_around(StoreWriter, "publish", say, "publish")
    report = refresh(
        VistaModel.from_pretrained(model),
        EventLog.open(log),
        store,
        options=RefreshOptions(codec=Codec(codec), users_per_batch=TWO_PER_BATCH),
        created_at=1,
    )
    return report.resumed_at


def served_contents(say: Say, store: str) -> list[Any]:
    """The current generation: its number, the digest of its records, and a hash of all that readers return."""
    import hashlib

    with StoreReader.open(store) as opened:
        batch = opened.get_many(np.array(list(opened.keys())))
        digest = hashlib.sha256(batch.summary.tobytes() + batch.history_digest.tobytes() + batch.created_at.tobytes())
        return [opened.generation, opened.manifest.records_digest, len(opened), digest.hexdigest()]


@pytest.fixture(scope="module")
def uninterrupted(
    event_log: EventLog, model_dir: Path, nursery: Nursery, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Any]]:
    """Contents of uninterrupted refreshes, by codec."""
    folder, expected = tmp_path_factory.mktemp("uninterrupted"), {}
    for codec in Codec:
        nursery.call(run_refresh, event_log.path, model_dir, folder / codec.value, codec.value)
        expected[codec.value] = nursery.call(served_contents, folder / codec.value)
    return expected


def kill_somewhere(trial: Trial, child: Child) -> None:
    """Kill a refresh, usually between begin and commit, and count its phase."""
    batch = trial.random.randrange(NUM_BATCHES)
    wanted = trial.random.choice(["begin"] * 7 + ["ack", "publish", "start"])
    seen = 0
    while wanted != "start" and (message := child.hear()) is not None:
        seen += message == wanted
        if seen > batch or message == wanted == "publish":
            break
    time.sleep(trial.random.choice([0, 0, trial.random.uniform(0, 0.001), trial.random.uniform(0, 0.01)]))
    child.kill()
    child.end()
    assert child.exit_code in (0, -9), child.raised
    last = child.messages[-1] if child.messages else "start"
    names = {"start": "before the first batch", "ack": "between batches", "publish": "while publishing"}
    trial.count("after the end" if child.exit_code == 0 else names.get(last, "between begin and commit"))


@promise(
    "Refresh resumes",
    fault="kill -9 of `refresh`, by phase",
    full=500,
    short=3,
    shares={"between begin and commit": 0.30},
)
def test_killed_refresh(
    trial: Trial, nursery: Nursery, event_log: EventLog, model_dir: Path, uninterrupted: dict[str, list[Any]]
) -> None:
    codec = trial.random.choice(list(Codec)).value
    job = (run_refresh, event_log.path, model_dir, trial.folder / "store", codec)
    for _ in range(trial.random.choice([1, 1, 1, 2, 4])):
        child = nursery.start(*job)
        kill_somewhere(trial, child)
        if (trial.folder / "store" / "CURRENT").exists():
            break
    else:
        done = child.messages.count("ack") if child.messages else 0
        resumed_at = nursery.call(*job)
        assert resumed_at >= TWO_PER_BATCH * done, f"{done} batches were acknowledged, resumed at {resumed_at}"
    assert nursery.call(served_contents, trial.folder / "store") == uninterrupted[codec]


def first_generation(folder: Path, *, counters: bool) -> VistaModel:
    """Make log/, model/, and store/; returns the model."""
    log = EventLog.from_frame(small_frame(), folder / "log", **COLUMNS)
    model = save_model(log, folder / "model", counters=counters)
    refresh(model, log, folder / "store", options=RefreshOptions(codec=Codec.float32), created_at=1)
    return model


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/ with three segments, model/, store/ that covers the first segment, and whole/, a full refresh of all."""
    folder = tmp_path_factory.mktemp("incremental")
    frame = small_frame()
    model = first_generation(folder, counters=True)
    for turn in (1, 2):
        own = np.arange(len(frame["user"])) % (turn + 2) == 0  # some events are new, some of these late
        later = {name: values[own] for name, values in frame.items()}
        later["timestamp"] = later["timestamp"] + turn * 40 * DAY + 7
        log = EventLog.from_frame(later, folder / "log", append=True, **COLUMNS)
    refresh(model, log, folder / "whole", options=RefreshOptions(codec=Codec.float32), created_at=1)
    return folder


def refresh_segments(say: Say, folder: str, store: str, last_segment: int) -> dict[str, int]:
    """Refresh up to a segment; says "begin" and "done" around each transaction. Returns the counts of the report."""
    tell_around(SharedEnvironment, "write", say, "begin", "done")
    log = EventLog.open(Path(folder, "log"), last_segment=last_segment)
    model = VistaModel.from_pretrained(Path(folder, "model"))
    return refresh_incremental(
        model, log, store, options=RefreshOptions(users_per_batch=TWO_PER_BATCH), created_at=2
    ).counts


def equal_stores(say: Say, store: str, whole: str) -> int:
    """Require the same events of the same users, and equal summaries up to rounding; returns the last segment."""
    with StoreReader.open(store) as opened, StoreReader.open(whole) as expected:
        users = list(expected.keys())
        assert list(opened.keys()) == users and len(opened) == len(users)
        actual, wanted = opened.get_many(users), expected.get_many(users)
        for name in ("event_count", "last_event_ts", "history_digest"):
            assert getattr(actual, name).tolist() == getattr(wanted, name).tolist(), name
        assert actual.tail.times.tolist() == wanted.tail.times.tolist()
        for counters, others in zip(actual.counters, wanted.counters, strict=True):
            assert counters.key.tolist() == others.key.tolist() and counters.codes.tolist() == others.codes.tolist()
        np.testing.assert_allclose(actual.summary, wanted.summary, atol=1e-4)
        states, wanted_states = opened.states(users), expected.states(users)
        assert states is not None and wanted_states is not None
        assert states[1].history_digest.tolist() == wanted_states[1].history_digest.tolist()
        return opened.manifest.applied_segment


@promise(
    "Refresh resumes",
    fault="kill -9 of `refresh incremental=true`, by phase; the log grows in between",
    full=500,
    short=3,
    shares={"within a transaction": 0.3},
)
def test_killed_incremental(trial: Trial, nursery: Nursery, grown: Path) -> None:
    store = trial.folder / "store"
    shutil.copytree(grown / "store", store)
    last = trial.random.choice([2, 3])
    for _ in range(trial.random.choice([1, 1, 2, 4])):
        child = nursery.start(refresh_segments, grown, store, last)
        in_transaction = trial.random.random() < 0.5
        least = trial.random.randrange(1, 36)
        for number in count(1):
            heard = child.hear()
            if heard is None or (number >= least and (heard == "begin" or not in_transaction)):
                break
        time.sleep(trial.random.choice([0, 0, trial.random.uniform(0, 0.002)]))
        child.kill()
        child.end()
        assert child.exit_code in (0, -9), child.raised
        ended = child.messages[-1] if child.messages else ""
        where = {"begin": "within a transaction", "done": "between transactions"}.get(ended, "before the first")
        trial.count("after the end" if child.exit_code == 0 else where)
        last = 3
    nursery.call(refresh_segments, grown, store, 3)
    assert nursery.call(equal_stores, store, grown / "whole") == 3
    again = nursery.call(refresh_segments, grown, store, 3)
    assert not any(again.get(name) for name in ("appended", "exchanged", "recomputed")), again


LAST = 20
"""Every other kill strikes one of the last calls, which exchange the names and remove the old model."""


def prepare_addition(say: Say, folder: str) -> None:
    add_items_before(Path(folder))


def add(say: Say, folder: str, number: int, exchanges: bool) -> int:
    """Add the items; the process is killed before its `number`-th call, 0 for none. Returns the number of calls.

    Args:
        exchanges: whether the file system can exchange two names.
    """
    logging.disable(logging.CRITICAL)
    if not exchanges:
        setattr(vista.files, "_exchanged", lambda one, other: False)  # noqa: B010
    preload.watch(str(Path(folder).resolve()))
    preload.die_at(number)
    add_items(Path(folder))
    return preload.calls_since(number)


def scores(say: Say, folder: str) -> list[float] | None:
    """What a scorer that is opened now answers; None if there is no model."""
    try:
        return ranked(Path(folder))
    except CheckpointError:
        assert not Path(folder, "featured", "model").exists()
        return None


@dataclass(frozen=True)
class Addition:
    """before/ and after/ in one folder, and what the addition in between takes."""

    folder: Path
    calls: dict[bool, int]
    """By whether names can be exchanged: number of calls."""
    old: list[float]
    new: list[float]


@pytest.fixture(scope="module")
def addition(traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Addition:
    folder, calls = tmp_path_factory.mktemp("items"), {}
    traced.call(prepare_addition, folder / "before")
    for exchanges in (True, False):
        shutil.rmtree(folder / "after", ignore_errors=True)
        shutil.copytree(folder / "before", folder / "after")
        calls[exchanges] = traced.call(add, folder / "after", 0, exchanges)
    old, new = (traced.call(scores, folder / name) for name in ("before", "after"))
    assert len(set(old[: len(ADDED)])) == 1 and len(set(new[: len(ADDED)])) == len(ADDED)
    return Addition(folder, calls, old, new)


def files_of(model: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in model.iterdir()}


@promise(
    "An addition of items is atomic",
    fault="kill -9 of `vista items add` at a system call",
    full=500,
    short=4,
    shares={"the new model": 0.1, "the old model": 0.3, "no model until the repetition": 0.005},
)
def test_killed_items_add(trial: Trial, traced: Nursery, addition: Addition) -> None:
    exchanges, made = trial.number % 2 == 0, trial.folder / "made"
    shutil.copytree(addition.folder / "before", made)
    calls = addition.calls[exchanges]
    number = trial.random.choice([trial.random.randint(1, calls), calls - trial.random.randrange(LAST)])
    child = traced.start(add, made, number, exchanges).end()
    assert child.exit_code == -9, child.raised
    seen = traced.call(scores, made)
    assert seen in ([addition.old, addition.new] if exchanges else [addition.old, addition.new, None])
    seen_model = "the new model" if seen == addition.new else "the old model"
    trial.count(seen_model if seen else "no model until the repetition")
    traced.call(add, made, 0, exchanges)
    assert traced.call(scores, made) == addition.new
    model = made / "featured" / "model"
    assert files_of(model) == files_of(addition.folder / "after" / "featured" / "model")
    assert sorted(path.name for path in model.parent.iterdir()) == ["log", "model", "new.parquet", "store"]


STREAM_KILLS = 6
PARTITIONS = 3


@pytest.fixture(scope="module")
def kafka() -> Iterator[MockKafka]:
    if find_spec("confluent_kafka") is None and not os.environ.get("CI"):
        pytest.skip("the extra `kafka` is not installed")
    with MockKafka() as started:
        yield started


@pytest.fixture(scope="module")
def before_messages(traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/, model/, and store/ before the first message."""
    for module in (__name__, "vista.log.ingest.kafka_reader"):
        traced.imports(module)
    folder = tmp_path_factory.mktemp("stream")
    first_generation(folder, counters=False)
    return folder


def watch(say: Say, folder: str, source: str, kill: tuple[str, int, int] = ("", 0, 0)) -> None:
    """Read and apply all messages of the topic; says each step.

    Args:
        kill: a step, its turn, and the number of the system call that changes the folder after this turn, at which this
            process is killed; 0 kills it in the step. Steps are "read", "appended", "begin", and "done": a batch is
            read, its segment is published, and a transaction of the store begins and ends.
    """
    report_steps(say, folder, *kill)
    run_watch(
        WatchConfig(
            data=f"{folder}/log",
            model=f"{folder}/model",
            store=f"{folder}/store",
            source=source,
            stream=StreamConfig(max_messages=6),
            events=SourceConfig(timestamp="timestamp", time_unit="ms", action="action", rating="rating"),
            on_bad_rows=OnBadRows.quarantine,
            once=True,
            device="cpu",
            num_threads=1,
        )
    )


def report_steps(say: Say, folder: str, at_step: str, turn: int, at_call: int) -> None:
    """Have the steps of a watch say when they happen, and be killed as `watch` describes."""
    from vista.log.ingest.kafka_reader import KafkaReader

    preload.watch(folder)

    def tell(step: str) -> None:
        nonlocal turn
        say(step)
        turn -= step == at_step
        if step == at_step and turn == 0:
            if at_call == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            preload.die_at(at_call)

    tell_around(KafkaReader, "read", tell, after="read")
    tell_around(KafkaReader, "commit", tell, "appended")
    tell_around(SharedEnvironment, "write", tell, "begin", "done")


def held(folder: Path) -> tuple[Counter[tuple[int, int, int]], list[tuple[int, int]]]:
    """(events of the log, as user, item, and time; dead letters, as partition and offset), after a comparison of the
    store with a full refresh."""
    log = EventLog.open(folder / "log")
    histories = log.gather(np.arange(log.num_users))
    columns = (log.users.ids(histories.owner), log.items.ids(histories.item), histories.timestamp)
    events = Counter(zip(*(np.asarray(column).tolist() for column in columns), strict=True))
    files = sorted((folder / "log").glob(f"*/{DEAD_LETTERS_FILE}"))
    letters = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    model = VistaModel.from_pretrained(folder / "model")
    refresh(model, log, folder / "whole", options=RefreshOptions(codec=Codec.float32), created_at=1)
    assert equal_stores(print, str(folder / "store"), str(folder / "whole")) == log.last_segment
    return events, [(letter["partition"], letter["offset"]) for letter in letters]


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of `watch source=kafka://`, by step and system call; messages arrive in between",
    full=60,
    short=6,
    each=STREAM_KILLS,
    judged=True,
    shares={"while a segment is written": 0.1, "while the store is updated": 0.1},
)
def test_killed_stream(trial: Trial, traced: Nursery, kafka: MockKafka, before_messages: Path) -> None:
    folder = trial.folder.resolve() / "watched"
    topic = f"events-{trial.promise.full}-{trial.number}-{time.monotonic_ns()}"
    shutil.copytree(before_messages, folder)
    source = kafka.create(topic, PARTITIONS)
    sent = Counter(zip(*(small_frame()[name].tolist() for name in ("user", "item", "timestamp")), strict=True))
    places: list[tuple[int, int]] = []
    offsets = [0] * PARTITIONS

    def send(number: int) -> None:
        for _ in range(number):
            partition, user = trial.random.randrange(PARTITIONS), 100 + trial.random.randrange(20)
            event = (user, 10 * trial.random.randrange(45), START + trial.random.randrange(200 * DAY))
            if trial.random.random() < 0.15:
                kafka.send(topic, [trial.random.choice([b"{", None, b'{"user": "x"}'])], partition)
                places.append((partition, offsets[partition]))
            else:
                fields = dict(zip(("user", "item", "timestamp"), event, strict=True)) | {"action": "like", "rating": 3}
                kafka.send(topic, [json.dumps(fields).encode()], partition)
                sent[event] += 1
            offsets[partition] += 1

    num_kills = 0
    while num_kills < STREAM_KILLS:
        send(trial.random.randrange(4, 14))
        step, turn = trial.random.choice(["read", "appended", "begin", "done"]), trial.random.randrange(1, 3)
        child = traced.start(watch, folder, source, [step, turn, trial.random.choice([0, *range(1, 25)])]).end()
        assert child.exit_code in (0, -9), child.raised
        if child.exit_code:
            num_kills += 1
            trial.count(
                {
                    "read": "while a segment is written",
                    "appended": "after a segment",
                    "begin": "while the store is updated",
                    "done": "after an update of the store",
                }[child.messages[-1]]
            )
    traced.call(watch, folder, source)
    events, letters = held(folder)
    compare_events(trial, events, sent)
    compare_events(trial, Counter(letters), Counter(places))


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
    preload.die_at(kill_call)
    run = {"options": RefreshOptions(users_per_batch=USERS_PER_BATCH), "created_at": 2}
    if address:
        run["engine"] = killing_engine(say, folder, address, kill_after)
    refresh(VistaModel.from_pretrained(Path(folder, "model")), EventLog.open(Path(folder, "log")), store, **run)
    return preload.calls_since(kill_call)


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
        for module in (__name__, "vista.refresh.ray_engine"):
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
