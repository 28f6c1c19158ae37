"""What the reader does with errors and messages that the mock cluster does not produce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.refresh.mock_kafka import MockKafka
from tests.refresh.streams import TOPIC
from vista.config.stream_config import StreamConfig
from vista.errors import StreamError
from vista.log.stream_offsets import StreamPartition


class Changed:
    """A client or a message, some of whose methods are replaced."""

    def __init__(self, inner: Any, **methods: Callable[..., Any]) -> None:
        self._inner, self._methods = inner, methods

    def __getattr__(self, name: str) -> Any:
        return self._methods.get(name) or getattr(self._inner, name)


def reader_of(kafka: MockKafka) -> Any:
    """A reader of a topic with one message in each of two partitions."""
    from vista.log.ingest.kafka.kafka_reader import KafkaReader

    reader = KafkaReader(kafka.create(TOPIC), StreamConfig(max_s=20.0))
    for partition in (0, 1):
        kafka.send(TOPIC, [b"{}"], partition)
    return reader


def test_errors_of_one_partition_are_reported_while_others_continue(
    kafka: MockKafka, caplog: pytest.LogCaptureFixture
) -> None:
    from confluent_kafka import KafkaError

    reader = reader_of(kafka)
    consumer = reader._consumer
    lost = KafkaError(KafkaError.INVALID_MSG, "a corrupt message")

    def consume(*arguments: Any) -> list[Any]:
        found = consumer.consume(*arguments)
        return [Changed(message, error=lambda: lost) if message.partition() else message for message in found]

    reader._consumer = Changed(consumer, consume=consume)
    batch = reader.read({})
    assert [message[:3] for message in batch.messages] == [(TOPIC, 0, 0)]
    assert batch.behind == {StreamPartition(TOPIC, 0): 0, StreamPartition(TOPIC, 1): 1}
    (warning,) = caplog.messages
    assert f"no message of {TOPIC}, partition 1 arrived" in warning and "(a corrupt message)" in warning
    reader._consumer = consumer
    reader.close()


def test_an_error_while_an_error_is_reported_is_typed_too(kafka: MockKafka) -> None:
    from confluent_kafka import KafkaError, KafkaException

    reader = reader_of(kafka)
    consumer = reader._consumer

    def fail(reason: str) -> Callable[..., Any]:
        def call(*arguments: Any, **settings: Any) -> Any:
            raise KafkaException(KafkaError(KafkaError._FATAL, reason))

        return call

    reader._consumer = Changed(consumer, list_topics=fail("the first"), consume=fail("the second"))
    with pytest.raises(StreamError, match=r"cannot be read: the first \(the second\)"):
        reader.read({})
    reader._consumer = consumer
    reader.close()


def test_messages_without_a_time_have_no_age(kafka: MockKafka) -> None:
    reader = reader_of(kafka)
    consumer = reader._consumer

    def consume(*arguments: Any) -> list[Any]:
        found = consumer.consume(*arguments)
        return [Changed(message, timestamp=lambda: (0, 0)) if message.partition() else message for message in found]

    reader._consumer = Changed(consumer, consume=consume)
    batch = reader.read({})
    first, second = batch.messages
    assert second.time_ms is None and batch.oldest_ms == first.time_ms > 1_000_000_000_000
    reader._consumer = consumer
    reader.close()
