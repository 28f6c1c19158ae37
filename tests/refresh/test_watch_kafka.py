"""Watching topics: each message enters the log once, invalid ones become dead letters, and servers may fail."""

from __future__ import annotations

import base64
import json
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.refresh.kafka_clusters import MockKafka, lines
from tests.refresh.streams import TOPIC, dead_letters, expect, look, offsets
from vista.cli.serving_commands import run_watch
from vista.config.checks import OnBadRows, StreamStart
from vista.config.log_config import StreamConfig
from vista.errors import DataError, LogBusyError, LogFormatError, StoreError, StreamError, StreamOffsetError
from vista.log.compaction import compact_log
from vista.log.deletions import erase_users
from vista.log.event_log import EventLog
from vista.log.ingest.kafka_messages import MAX_KEPT_BYTES
from vista.log.inspection import LogStats
from vista.log.segment_files import DEAD_LETTERS_FILE, StreamPartition, stream_offsets
from vista.refresh import merge, refresh, refresh_incremental
from vista.refresh.watch import Watch
from vista.scorer import Scorer


def test_from_events_to_scores(tmp_path, grow, kafka, streamed):
    frame = grow.events({1: 5, 2: 3, 3: 4}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    streamed.report_file = str(tmp_path / "report.json")
    report = run_watch(streamed)
    assert report.stream is not None and (report.stream.messages, report.stream.dead_letters) == (12, 0)
    assert report.lag_s is not None and 0 <= report.lag_s < 60
    assert str(report).startswith("12 message(s) (") and "/s), " in str(report)
    expect(streamed, grow, tmp_path, frame)
    assert offsets(streamed) == [3, 9]
    manifest = EventLog.open(streamed.data).segments[-1].manifest
    assert list(stream_offsets([manifest])) == [StreamPartition(TOPIC, 0), StreamPartition(TOPIC, 1)]
    written = json.loads((tmp_path / "report.json").read_text())
    assert written["refreshed_users"] == 3 and written["stream"]["behind"] == {TOPIC: {"0": 0, "1": 0}}
    assert written["stream"]["messages"] == 12 and written["stream"]["messages_per_s"] > 0
    log = EventLog.open(streamed.data)
    assert list(log.event_features) == ["surface", "dwell"]
    stats = str(LogStats.of(log))
    assert f"\ntopic {TOPIC} of cluster {kafka.name}" in stats and "offsets 3 9" in stats
    with Scorer.open(streamed.model, streamed.store) as scorer:
        scores = scorer.score([1, 2, 3], [10, 20, 30])
    assert scores.shape == (3, 3) and np.isfinite(np.asarray(scores)).all()
    again = look(streamed)
    assert again.is_empty and again.refreshes == [] and EventLog.open(streamed.data).last_segment == log.last_segment


def test_merged_topics_count_once_and_are_not_lost(tmp_path, grow, kafka, streamed):
    """No log continues a store that holds their events; and two logs of one topic are not merged."""
    kafka.send_events(TOPIC, grow.events({1: 5, 3: 4}, grow.start + 500 * grow.hour))
    look(streamed)
    model, frames = grow.model(), [grow.events({1: 7, 2: 7}), grow.events({1: 3, 4: 2}, seed=1)]
    streamed_part = (streamed.store, EventLog.open(streamed.data))
    filed = grow.append(tmp_path / "other-log", frames[1])
    refresh(model, filed, tmp_path / "other-store")
    merge(model, [streamed_part, (tmp_path / "other-store", filed)], tmp_path / "merged")
    for frame in frames:
        grow.append(tmp_path / "both", frame)
    with pytest.raises(StoreError, match=r"of which one has deletions or events from Kafka.* merge them again"):
        refresh_incremental(model, grow.later(tmp_path / "both", {1: 1}), tmp_path / "merged")
    second = replace(streamed, data=str(filed.path), store=str(tmp_path / "other-store"))
    look(second)
    with pytest.raises(StoreError, match=rf"both contain events of partition 0 of topic {TOPIC} \({kafka.name}"):
        merge(model, [streamed_part, (second.store, EventLog.open(second.data))], tmp_path / "twice")


def test_a_topic_that_does_not_exist(kafka, streamed):
    streamed.source = f"kafka://{kafka.servers}/nowhere"
    with pytest.raises(StreamError, match="topic nowhere: Broker: Unknown topic or partition; create the topic"):
        look(streamed)


def test_the_group_shows_how_far_the_log_is_but_decides_nothing(kafka, streamed, grow):
    from confluent_kafka import Consumer, TopicPartition

    kafka.send_events(TOPIC, grow.events({1: 5, 2: 3}, grow.start + 500 * grow.hour))
    run_watch(streamed)
    group = Consumer({"bootstrap.servers": kafka.servers, "group.id": "vista"})
    committed = group.committed([TopicPartition(TOPIC, 0), TopicPartition(TOPIC, 1)], timeout=60)
    assert [place.offset for place in committed] == [3, 5]
    group.commit(offsets=[TopicPartition(TOPIC, 0, 0), TopicPartition(TOPIC, 1, 1)], asynchronous=False)
    group.close()
    assert look(streamed).is_empty


@pytest.mark.nightly
def test_a_check_is_limited_and_the_next_one_continues(tmp_path, grow, kafka, streamed, monkeypatch):
    frame = grow.events({1: 30, 2: 20}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    streamed.stream.max_messages = 15
    watching = Watch(streamed)
    report = watching.look()
    assert report.stream is not None and report.stream.messages == 15 and report.is_behind
    assert sum(report.stream.behind.values()) == 35 and "35 behind (shop.events, partition" in str(report)
    watching.close()
    assert not run_watch(streamed).is_behind  # it reads to the end
    expect(streamed, grow, tmp_path, frame)
    assert EventLog.open(streamed.data).last_segment == 5
    monkeypatch.setattr("vista.log.ingest.kafka_reader._BYTES_PER_MESSAGE", 1e-5)
    kafka.send_events(TOPIC, grow.events({1: 3}, grow.start + 950 * grow.hour))
    assert sum(offsets(streamed)) == 50 and not run_watch(streamed).is_behind and sum(offsets(streamed)) == 53


FIELDS = {"user": 1, "item": 10, "timestamp": 1_800_000_000_000, "action": "click", "rating": 1}


def changed(**fields: Any) -> bytes:
    """A valid event with some fields changed."""
    return json.dumps(FIELDS | fields).encode()


BAD = {
    b"\xff\xfe": "is not UTF-8",
    b"{": "is not JSON",
    b"[" * 100_000: "is not JSON",
    b"[1]": "is not a JSON object",
    b"{}{}": "is not JSON",
    b"{}": "column 'user': the value is missing",
    changed(rating=None): "column 'rating': the value is missing",
    changed(user="x"): "column 'user': 'x' is not an integer id",
    changed(user=1.5): "column 'user': '1.5' is not an integer id",
    changed(user=True): "column 'user': True is not a text or a number",
    changed(user=[1]): "column 'user': ['1'] is not a text or a number",
    changed(timestamp="soon"): "column 'timestamp': 'soon' is not a number",
    changed(timestamp=-1): "column 'timestamp': '-1' is negative",
    changed(action="\ud800"): "column 'action': '\\ud800' is not a text or a number",
    changed(rating=math.inf): "column 'rating': 'Infinity' is not a finite number",
    changed(dwell="long"): "column 'dwell': 'long' is not a number",
    changed(surface={"a": 1}): "column 'surface': {'a': '1'} is not a text or a number",
    changed(user=10**3_000): "column 'user': '1000",
    b" " * (MAX_KEPT_BYTES + 1): "is not JSON",
    None: "has no value (a tombstone)",
}
"""Message -> what is wrong with it."""


def test_invalid_messages_become_dead_letters_once(tmp_path, grow, kafka, streamed, caplog):
    frame = grow.events({1: 4}, grow.start + 500 * grow.hour)
    good = [line for _, line in lines(frame)]
    kafka.send(TOPIC, [good[0], *BAD, *good[1:]], partition=1)
    streamed.on_bad_rows = OnBadRows.quarantine
    report = run_watch(streamed)
    assert report.stream is not None and (report.stream.messages, report.stream.dead_letters) == (
        4 + len(BAD),
        len(BAD),
    )
    letters = dead_letters(streamed)
    assert [(letter["topic"], letter["partition"], letter["offset"]) for letter in letters] == [
        (TOPIC, 1, 1 + number) for number in range(len(BAD))
    ]
    for letter, (message, reason) in zip(letters, BAD.items(), strict=True):
        assert reason in letter["reason"], letter
        kept = None if letter["value"] is None else base64.b64decode(letter["value"])
        assert kept == (None if message is None else message[:MAX_KEPT_BYTES])
        assert letter["bytes"] == len(message or b"")
    assert f"the first of {len(BAD)} dead letters: topic {TOPIC}, partition 1, offset 1: " in caplog.text
    expect(streamed, grow, tmp_path, frame)
    log = EventLog.open(streamed.data)
    assert log.segments[-1].manifest["quarantined"] == len(BAD) and log.verify() > 0
    assert look(streamed).is_empty and len(dead_letters(streamed)) == len(BAD)
    (file,) = Path(streamed.data).glob(f"*/{DEAD_LETTERS_FILE}")
    file.write_bytes(file.read_bytes()[:-2] + b" \n")
    with pytest.raises(LogFormatError, match=DEAD_LETTERS_FILE):
        EventLog.open(streamed.data).verify()


def test_a_batch_of_dead_letters_alone_advances_the_offsets(tmp_path, grow, kafka, streamed):
    kafka.send(TOPIC, [b"{", b"}"])
    streamed.on_bad_rows = OnBadRows.quarantine
    run_watch(streamed)
    assert len(dead_letters(streamed)) == 2 and offsets(streamed) == [2, 0]
    frame = grow.events({1: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    run_watch(streamed)
    expect(streamed, grow, tmp_path, frame)


def test_an_invalid_message_ends_the_watch_and_nothing_is_written(grow, kafka, streamed):
    frame = grow.events({1: 2, 2: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    kafka.send(TOPIC, [b"{", b"}"])
    streamed.once = False  # it would run forever
    with pytest.raises(
        DataError, match=r"topic shop\.events, partition 0, offset 2: .* is not JSON.*\(invalid messages: 2"
    ):
        run_watch(streamed)
    assert EventLog.open(streamed.data).last_segment == 1
    streamed.on_bad_rows, streamed.once = OnBadRows.quarantine, True
    run_watch(streamed)
    assert EventLog.open(streamed.data).num_events == 18 and len(dead_letters(streamed)) == 2


def test_two_producers_with_skewed_clocks(tmp_path, grow, kafka, streamed, caplog):
    """Late and early events end in the order of their times. A clock in the future is reported once."""
    now = int(time.time() * 1000)
    slow = grow.events({1: 6, 2: 6}, now - 300 * grow.hour, seed=1, spread=200 * grow.hour)
    fast = grow.events({1: 6, 3: 6}, now + grow.hour, seed=2, spread=grow.hour)
    watching = Watch(streamed)
    for half in (slice(0, None, 2), slice(1, None, 2)):
        for partition, frame in ((0, fast), (1, slow)):
            kafka.send(TOPIC, [line for _, line in lines(frame)][half], partition)
        watching.look()
    watching.close()
    expect(streamed, grow, tmp_path, fast, slow)
    log = EventLog.open(streamed.data)
    history = log.gather(log.users.rows([1]))
    assert history.lengths.tolist() == [19] and (np.diff(history.timestamp) >= 0).all()
    assert caplog.text.count("in the future; correct the clock of its producer") == 1


def test_equal_messages_are_different_events(kafka, streamed, grow):
    line = lines(grow.events({1: 1}, grow.start + 500 * grow.hour))[0][1]
    for _ in range(2):
        kafka.send(TOPIC, [line])
        run_watch(streamed)
    assert EventLog.open(streamed.data).num_events == 16


def test_the_command_retries_while_the_broker_is_gone(tmp_path, grow, kafka, streamed, caplog, monkeypatch):
    frame = grow.events({1: 4}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    kafka.set_down()
    streamed.stream.max_s = 2.0
    pauses = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        if len(pauses) == 2:
            raise KeyboardInterrupt
        kafka.set_up()

    streamed.once = False
    monkeypatch.setattr("vista.cli.serving_commands.time", SimpleNamespace(sleep=sleep))
    with caplog.at_level(logging.INFO), pytest.raises(KeyboardInterrupt):
        run_watch(streamed)
    assert pauses == [5.0, 5.0] and "shop.events: cannot be read: " in caplog.text
    assert "4 message(s) (" in caplog.text
    expect(streamed, grow, tmp_path, frame)


def test_the_store_covers_the_log_while_the_broker_is_gone(tmp_path, grow, kafka, streamed, monkeypatch):
    """As after a kill between the segment and the refresh, with the broker down when the watch starts again."""
    frame = grow.events({1: 4}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    with monkeypatch.context() as patch:
        patch.setattr("vista.refresh.watch.refresh_incremental", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            look(streamed)
    kafka.set_down()
    streamed.stream.max_s = 1.0
    with pytest.raises(StreamError, match="cannot be read"):
        look(streamed)
    expect(streamed, grow, tmp_path, frame)
    kafka.set_up()


@pytest.mark.parametrize("kafka", [MockKafka], indirect=True)
def test_deleted_messages_are_reported_with_their_number(tmp_path, grow, kafka, streamed, caplog):
    """The mock cluster keeps 5 MB per partition and deletes the oldest messages."""
    frame = grow.events({1: 3, 2: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    run_watch(streamed)
    for _ in range(30):
        kafka.send(TOPIC, [b" " * 500_000], partition=1)
    streamed.once, streamed.on_bad_rows = False, OnBadRows.quarantine
    with pytest.raises(StreamOffsetError, match=r"[0-9]+ messages were deleted on the server before they were read"):
        run_watch(streamed)
    assert offsets(streamed) == [2, 3]
    report = run_watch(replace(streamed, once=True, stream=StreamConfig(max_s=5.0, reset_offsets=True)))
    assert report.stream is not None and 0 < report.stream.messages < 30 and offsets(streamed) == [2, 33]
    assert "stream.reset_offsets=true: " in caplog.text
    expect(streamed, grow, tmp_path, frame)
    assert look(streamed).is_empty


def test_another_topic_and_another_cluster_are_refused(tmp_path, grow, kafka, streamed):
    frame = grow.events({1: 3, 2: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    run_watch(streamed)
    other = replace(streamed, source=kafka.create("other"))
    with pytest.raises(StreamOffsetError, match=r"holds messages of topic shop\.events, not of topic other"):
        look(other)
    later = grow.events({2: 2}, grow.start + 950 * grow.hour)
    kafka.send_events("other", later)
    both = replace(streamed, source=f"{streamed.source},other")
    run_watch(both)
    expect(streamed, grow, tmp_path, frame, later)
    assert look(other).is_empty and look(streamed).is_empty
    with MockKafka() as copy:
        copied = replace(streamed, source=copy.create(TOPIC))
        with pytest.raises(
            StreamOffsetError, match=rf"from the cluster {kafka.name}.*, but the server belongs to the clus"
        ):
            look(copied)


def test_a_reset_is_stored_although_the_topic_is_empty(tmp_path, grow, kafka, streamed):
    frame = grow.events({1: 3, 2: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    run_watch(streamed)
    later = grow.events({1: 1, 2: 2}, grow.start + 950 * grow.hour)
    with MockKafka() as other:
        moved = replace(streamed, source=other.create(TOPIC))
        reset = replace(moved, stream=StreamConfig(max_s=20.0, reset_offsets=True))
        run_watch(reset)
        assert offsets(streamed) == [0, 0]
        segment = EventLog.open(streamed.data).last_segment
        assert look(moved).is_empty and look(reset).is_empty
        assert EventLog.open(streamed.data).last_segment == segment
        other.send_events(TOPIC, later)
        run_watch(moved)
    expect(streamed, grow, tmp_path, frame, later)


def test_newest_starts_after_the_messages_of_the_first_check(tmp_path, grow, kafka, streamed):
    kafka.send_events(TOPIC, grow.events({1: 3}, grow.start + 500 * grow.hour))
    streamed.stream.start = StreamStart.newest
    assert look(streamed).stream is not None and offsets(streamed) == [0, 3]
    later = grow.events({1: 2, 2: 1}, grow.start + 950 * grow.hour)
    kafka.send_events(TOPIC, later)
    run_watch(streamed)
    expect(streamed, grow, tmp_path, later)


def test_a_second_watch_of_the_same_log_adds_nothing_twice(tmp_path, grow, kafka, streamed, monkeypatch):
    from vista.log.ingest.kafka_reader import KafkaReader

    frame = grow.events({1: 3, 2: 2}, grow.start + 500 * grow.hour)
    kafka.send_events(TOPIC, frame)
    read = KafkaReader.read

    def read_and_wait(reader: KafkaReader, stored: Any) -> Any:
        batch = read(reader, stored)
        with monkeypatch.context() as patch:
            patch.setattr(KafkaReader, "read", read)
            look(streamed)
        return batch

    watching = Watch(streamed)
    with monkeypatch.context() as patch:
        patch.setattr(KafkaReader, "read", read_and_wait)
        with pytest.raises(LogBusyError, match="another process appended messages of kafka://"):
            watching.look()
    watching.look()
    watching.close()
    expect(streamed, grow, tmp_path, frame)


def test_a_compaction_keeps_offsets_and_dead_letters_unless_users_were_erased(kafka, streamed, grow):
    streamed.on_bad_rows = OnBadRows.quarantine
    for turn in (1, 2):
        kafka.send(TOPIC, [b"{"])
        kafka.send_events(TOPIC, grow.events({turn: 2}, grow.start + 500 * turn * grow.hour))
        run_watch(streamed)
    letters, stored = dead_letters(streamed), offsets(streamed)
    identity = EventLog.open(streamed.data).sources_digest(3)
    compact_log(streamed.data)
    assert EventLog.open(streamed.data).sources_digest(3) == identity
    assert dead_letters(streamed) == letters and len(letters) == 2 and offsets(streamed) == stored == [4, 2]
    erase_users(streamed.data, [1])
    assert "which may name erased users" in str(compact_log(streamed.data))
    assert dead_letters(streamed) == [] and offsets(streamed) == stored and look(streamed).stream is not None


class Changed:
    """A client or a message, some of whose methods are replaced."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


@pytest.fixture
def reader(kafka):
    """A reader of a topic with one message in each of two partitions; a test may replace its client."""
    from vista.log.ingest.kafka_reader import KafkaReader

    made = KafkaReader(kafka.create(TOPIC), StreamConfig(max_s=2.0))
    for partition in (0, 1):
        kafka.send(TOPIC, [b"{}"], partition)
    consumer = made._consumer
    yield made
    made._consumer = consumer
    made.close()


def change_messages(reader: Any, **methods: Callable[..., Any]) -> None:
    """Replace methods of the messages of partition 1."""
    consume = reader._consumer.consume

    def consume_changed(*arguments: Any) -> list[Any]:
        return [Changed(each, **methods) if each.partition() else each for each in consume(*arguments)]

    reader._consumer = Changed(reader._consumer, consume=consume_changed)


def test_errors_of_one_partition_are_reported_while_others_continue(reader, caplog):
    from confluent_kafka import KafkaError

    lost = KafkaError(KafkaError.INVALID_MSG, "a corrupt message")
    change_messages(reader, error=lambda: lost)
    batch = reader.read({})
    assert [message[:3] for message in batch.messages] == [(TOPIC, 0, 0)]
    assert batch.behind == {StreamPartition(TOPIC, 0): 0, StreamPartition(TOPIC, 1): 1}
    (warning,) = caplog.messages
    assert f"no message of {TOPIC}, partition 1 arrived" in warning and "(a corrupt message)" in warning


def test_an_error_while_an_error_is_reported_is_typed_too(reader):
    from confluent_kafka import KafkaError, KafkaException

    def fail(reason: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            raise KafkaException(KafkaError(KafkaError._FATAL, reason))

        return call

    reader._consumer = Changed(reader._consumer, list_topics=fail("the first"), consume=fail("the second"))
    with pytest.raises(StreamError, match=r"cannot be read: the first \(the second\)"):
        reader.read({})


def test_messages_without_a_time_have_no_age(reader):
    change_messages(reader, timestamp=lambda: (0, 0))
    batch = reader.read({})
    first, second = batch.messages
    assert second.time_ms is None and batch.oldest_ms == first.time_ms > 1_000_000_000_000
