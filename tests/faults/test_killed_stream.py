"""A killed watch of a topic resumes: every message is in the log and in the store exactly once."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import DAY, START, small_config, small_frame
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
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
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """log/, model/, and store/ before the first message."""
    folder = tmp_path_factory.mktemp("stream")
    columns = SourceColumns(action="action", rating="rating")
    log = EventLog.from_frame(small_frame(), folder / "log", time_unit="ms", columns=columns)
    config = small_config(log, "unused")
    model = VistaModel(config.model, schema_of(log, config), log.items, config.data).eval()
    model.save_pretrained(folder / "model")
    refresh(model, log, folder / "store", options=RefreshOptions(codec=Codec.float32), created_at=1)
    return folder


def watch(say: Say, folder: str, source: str, once: bool) -> None:
    """Run the watch; says "read", "appended", "begin", and "done" when it has read a batch, published its segment, and
    around each transaction of the store."""
    if not once:
        report_steps(say)
    run_watch(
        WatchConfig(
            data=f"{folder}/log",
            model=f"{folder}/model",
            store=f"{folder}/store",
            source=source,
            stream=StreamConfig(max_messages=1_000 if once else 6),
            events=SourceConfig(timestamp="timestamp", time_unit="ms", action="action", rating="rating"),
            on_bad_rows=OnBadRows.quarantine,
            poll_s=0.01,
            once=once,
            device="cpu",
            num_threads=1,
        )
    )


def report_steps(say: Say) -> None:
    """Have the steps of a watch say when they happen."""
    from vista.log.ingest.kafka.kafka_reader import KafkaReader
    from vista.store.lmdb.environment import SharedEnvironment

    read, commit, write = KafkaReader.read, KafkaReader.commit, SharedEnvironment.write

    def read_and_tell(reader: KafkaReader, *arguments: Any) -> Any:
        batch = read(reader, *arguments)
        say("read")
        return batch

    def tell_and_commit(reader: KafkaReader, *arguments: Any) -> None:
        say("appended")
        commit(reader, *arguments)

    def write_and_tell(environment: SharedEnvironment, *arguments: Any) -> Any:
        say("begin")
        written = write(environment, *arguments)
        say("done")
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
    "Each message enters once",
    fault="kill -9 of `watch source=kafka://`, six times per repetition, by step; messages arrive in between",
    full=100,
    short=5,
    shares={"while a segment is written": 0.1, "while the store is updated": 0.1},
)
def test_killed_stream(trial: Trial, nursery: Nursery, base: Path, kafka: MockKafka) -> None:
    folder, topic = trial.folder / "watched", f"events-{trial.promise.full}-{trial.number}-{time.monotonic_ns()}"
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

    for _ in range(KILLS):
        send(trial.random.randrange(4, 14))
        child = nursery.start(watch, folder, source, False)
        step, turn = trial.random.choice(["read", "appended", "begin", "done"]), trial.random.randrange(1, 3)
        while True:
            heard = child.hear()
            assert heard is not None, child.raised
            turn -= heard == step
            if turn <= 0 or (heard == "read" and trial.random.random() < 0.02):
                break
        time.sleep(trial.random.choice([0, trial.random.uniform(0, 0.02), trial.random.uniform(0, 0.5)]))
        child.kill()
        child.end()
        assert child.exit_code == -9, child.raised
        trial.count(
            {
                "read": "while a segment is written",
                "appended": "after a segment",
                "begin": "while the store is updated",
                "done": "after an update of the store",
            }[child.messages[-1]]
        )
    nursery.call(watch, folder, source, True)
    events, letters = held(folder)
    assert events == sent
    assert sorted(letters) == sorted(places)
