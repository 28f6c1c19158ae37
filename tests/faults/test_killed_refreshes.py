"""Killed incremental refreshes and watches resume: the same records as without kills."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import DAY, START, small_frame
from tests.faults import preload
from tests.faults.harness import LOSES_NOTHING, Trial, compare_events, promise
from tests.faults.nursery import Nursery, Say, tell_around
from tests.faults.operations import COLUMNS, save_model
from tests.faults.test_killed_servers import STORE, CountedRequests, release_lock, restore
from tests.refresh.kafka_clusters import MockKafka
from tests.store.remote.valkey_server import ValkeyServer
from vista.cli.serving_commands import run_watch
from vista.config import SourceConfig, WatchConfig
from vista.config.checks import Codec, OnBadRows, StateDtype
from vista.config.log_config import StreamConfig
from vista.log.event_log import EventLog
from vista.log.segment_files import DEAD_LETTERS_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh, refresh_incremental
from vista.store import StoreReader
from vista.store.folder_generation import SharedEnvironment
from vista.store.server_generation import ServerWriter

FLOAT32 = RefreshOptions(codec=Codec.float32, state=StateDtype.float32)


def first_generation(folder: Path, *, counters: bool) -> VistaModel:
    """Make log/, model/, and store/; returns the model."""
    log = EventLog.from_frame(small_frame(), folder / "log", **COLUMNS)
    model = save_model(log, folder / "model", counters=counters)
    refresh(model, log, folder / "store", options=FLOAT32, created_at=1)
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
    refresh(model, log, folder / "whole", options=FLOAT32, created_at=1)
    return folder


def refresh_segments(say: Say, folder: str, store: str, last_segment: int) -> dict[str, int]:
    """Refresh up to a segment; says "begin" and "done" around each transaction. Returns the counts of the report."""
    tell_around(SharedEnvironment, "write", say, "begin", "done")
    log = EventLog.open(Path(folder, "log"), last_segment=last_segment)
    model = VistaModel.from_pretrained(Path(folder, "model"))
    return refresh_incremental(model, log, store, options=RefreshOptions(users_per_batch=2), created_at=2).counts


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
    full=40,
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


def watch(say: Say, folder: str, source: str, store: str, kill: tuple[str, int, int] = ("", 0, 0)) -> None:
    """Read and apply all messages of the topic; says each step.

    Args:
        kill: a step, its turn, and the number of the system call that changes the folder after this turn, at which this
            process is killed; 0 kills it in the step. Steps are "read", "appended", "begin", and "done": a batch is
            read, its segment is published, and a transaction of the store begins and ends. If the store is on a server,
            "begin" and "done" enclose a batch of records, and requests are counted, except after "read".
    """
    report_steps(say, folder, "://" in store, *kill)
    run_watch(
        WatchConfig(
            data=f"{folder}/log",
            model=f"{folder}/model",
            store=store,
            source=source,
            stream=StreamConfig(max_messages=6),
            events=SourceConfig(timestamp="timestamp", time_unit="ms", action="action", rating="rating"),
            on_bad_rows=OnBadRows.quarantine,
            once=True,
            device="cpu",
            num_threads=1,
        )
    )


def report_steps(say: Say, folder: str, on_server: bool, at_step: str, turn: int, at_call: int) -> None:
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
            if on_server and step != "read":
                CountedRequests(at_call, share=0.5)
            else:
                preload.die_at(at_call)

    tell_around(KafkaReader, "read", tell, after="read")
    tell_around(KafkaReader, "commit", tell, "appended")
    if on_server:
        tell_around(ServerWriter, "put", tell, "begin", "done")
    else:
        tell_around(SharedEnvironment, "write", tell, "begin", "done")


def held(folder: Path, store: str) -> tuple[Counter[tuple[int, int, int]], list[tuple[int, int]]]:
    """(events of the log, as user, item, and time; dead letters, as partition and offset), after a comparison of the
    store with a full refresh."""
    log = EventLog.open(folder / "log")
    histories = log.gather(np.arange(log.num_users))
    columns = (log.users.ids(histories.owner), log.items.ids(histories.item), histories.timestamp)
    events = Counter(zip(*(np.asarray(column).tolist() for column in columns), strict=True))
    files = sorted((folder / "log").glob(f"*/{DEAD_LETTERS_FILE}"))
    letters = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    model = VistaModel.from_pretrained(folder / "model")
    refresh(model, log, folder / "whole", options=FLOAT32, created_at=1)
    assert equal_stores(print, store, str(folder / "whole")) == log.last_segment
    return events, [(letter["partition"], letter["offset"]) for letter in letters]


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of `watch source=kafka://`, by step and system call; messages arrive in between",
    full=18,
    each=STREAM_KILLS,
    shares={"while a segment is written": 0.1, "while the store is updated": 0.1},
)
def test_killed_stream(trial: Trial, traced: Nursery, kafka: MockKafka, before_messages: Path) -> None:
    folder = trial.folder.resolve() / "watched"
    shutil.copytree(before_messages, folder)
    watch_with_kills(trial, traced, kafka, folder, str(folder / "store"), lambda: None)


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of `watch source=kafka://` into a Valkey server, by step and request; "
    "messages arrive in between",
    full=18,
    each=STREAM_KILLS,
    shares={"while a segment is written": 0.1, "while the store is updated": 0.1},
)
def test_killed_stream_into_server(
    trial: Trial, traced: Nursery, kafka: MockKafka, before_messages: Path, valkey: ValkeyServer
) -> None:
    folder = trial.folder.resolve() / "watched"
    shutil.copytree(before_messages, folder, ignore=shutil.ignore_patterns("store"))
    restore(valkey, {})
    model, log = VistaModel.from_pretrained(folder / "model"), EventLog.open(folder / "log")
    refresh(model, log, valkey.url(STORE), options=FLOAT32, created_at=1)
    watch_with_kills(trial, traced, kafka, folder, valkey.url(STORE), lambda: release_lock(valkey))


def watch_with_kills(
    trial: Trial, nursery: Nursery, kafka: MockKafka, folder: Path, store: str, after_kill: Callable[[], None]
) -> None:
    """Send messages and kill the watch that reads them, and then let it read to the end."""
    topic = f"events-{trial.promise.name}-{trial.number}-{time.monotonic_ns()}"
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
        child = nursery.start(watch, folder, source, store, [step, turn, trial.random.choice([0, *range(1, 25)])]).end()
        assert child.exit_code in (0, -9), child.raised
        if child.exit_code:
            num_kills += 1
            after_kill()
            trial.count(
                {
                    "read": "while a segment is written",
                    "appended": "after a segment",
                    "begin": "while the store is updated",
                    "done": "after an update of the store",
                }[child.messages[-1]]
            )
    nursery.call(watch, folder, source, store)
    events, letters = held(folder, store)
    compare_events(trial, events, sent)
    compare_events(trial, Counter(letters), Counter(places))
