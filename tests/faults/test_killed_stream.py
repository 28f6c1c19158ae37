"""A killed watch of a topic resumes: every message is in the log and in the store exactly once."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DAY, START, small_config, small_frame
from tests.faults import preload
from tests.faults.harness import Trial, promise
from tests.faults.losses import compare_events
from tests.faults.nursery import Nursery, Say
from tests.faults.test_killed_server_refresh import LOSES_NOTHING
from tests.refresh.mock_kafka import MockKafka
from vista.cli.refresh_commands import run_watch
from vista.config import SourceColumns, SourceConfig, WatchConfig
from vista.config.choices import Codec, OnBadRows
from vista.config.stream_config import StreamConfig
from vista.log.event_log import EventLog
from vista.log.segment_manifest import DEAD_LETTERS_FILE
from vista.model.vista_model import VistaModel
from vista.refresh import RefreshOptions, refresh
from vista.store import StoreReader
from vista.training.log_schema import schema_of

KILLS = 6
PARTITIONS = 3


@pytest.fixture(scope="module")
def kafka() -> Iterator[MockKafka]:
    if find_spec("confluent_kafka") is None and not os.environ.get("CI"):
        pytest.skip("the extra `kafka` is not installed")
    with MockKafka() as started:
        yield started


@pytest.fixture(scope="module")
def base(traced: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/, model/, and store/ before the first message."""
    for module in ("tests.faults.test_killed_stream", "vista.log.ingest.kafka.kafka_reader"):
        traced.imports(module)
    folder = tmp_path_factory.mktemp("stream")
    columns = SourceColumns(action="action", rating="rating")
    log = EventLog.from_frame(small_frame(), folder / "log", time_unit="ms", columns=columns)
    config = small_config(log, "unused")
    model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store", options=RefreshOptions(codec=Codec.float32), created_at=1)
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
    from vista.log.ingest.kafka.kafka_reader import KafkaReader
    from vista.store.lmdb.environment import SharedEnvironment

    read, commit, write = KafkaReader.read, KafkaReader.commit, SharedEnvironment.write
    preload.watch(folder)

    def tell(step: str) -> None:
        nonlocal turn
        say(step)
        turn -= step == at_step
        if step == at_step and turn == 0:
            if at_call == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            preload.kill_at(preload.WRITES | preload.SYNCS | preload.NAMES, at_call, signal.SIGKILL)

    def read_and_tell(reader: KafkaReader, *arguments: Any) -> Any:
        batch = read(reader, *arguments)
        tell("read")
        return batch

    def tell_and_commit(reader: KafkaReader, *arguments: Any) -> None:
        tell("appended")
        commit(reader, *arguments)

    def write_and_tell(environment: SharedEnvironment, *arguments: Any) -> Any:
        tell("begin")
        written = write(environment, *arguments)
        tell("done")
        return written

    for owner, name, function in (
        (KafkaReader, "read", read_and_tell),
        (KafkaReader, "commit", tell_and_commit),
        (SharedEnvironment, "write", write_and_tell),
    ):
        setattr(owner, name, function)


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
    with StoreReader.open(folder / "store") as opened, StoreReader.open(folder / "whole") as expected:
        keys = list(expected.keys())
        assert list(opened.keys()) == keys and opened.manifest.applied_segment == log.last_segment
        actual, wanted = opened.get_many(keys), expected.get_many(keys)
        for name in ("event_count", "last_event_ts", "history_digest"):
            assert getattr(actual, name).tolist() == getattr(wanted, name).tolist(), name
        np.testing.assert_allclose(actual.summary, wanted.summary, atol=1e-4)
    return events, [(letter["partition"], letter["offset"]) for letter in letters]


@promise(
    LOSES_NOTHING,
    fault="beyond one machine, kill -9 of `watch source=kafka://`, by step and system call; messages arrive in between",
    full=60,
    short=6,
    each=KILLS,
    judged=True,
    shares={"while a segment is written": 0.1, "while the store is updated": 0.1},
)
def test_killed_stream(trial: Trial, traced: Nursery, kafka: MockKafka, base: Path) -> None:
    folder, topic = (
        trial.folder.resolve() / "watched",
        f"events-{trial.promise.full}-{trial.number}-{time.monotonic_ns()}",
    )
    shutil.copytree(base, folder)
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
    while num_kills < KILLS:
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
