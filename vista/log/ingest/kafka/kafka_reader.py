"""Reads the messages of topics from the offsets in a log. The offsets of Kafka's consumer groups are not read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from typing import Any

from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from vista.config.choices import StreamStart
from vista.config.log_config import StreamConfig
from vista.errors import ConfigError, StreamError
from vista.log.ingest.kafka.client_settings import read_client_file, without_secrets
from vista.log.ingest.kafka.kafka_address import KafkaAddress
from vista.log.ingest.kafka.message_batch import MessageBatch, StreamMessage
from vista.log.ingest.kafka.starting_offsets import OffsetRange, starting_offsets
from vista.log.stream_offsets import StreamOffset, StreamPartition

logger = logging.getLogger(__name__)
_GROUP = "vista"
"""The group whose offsets show in Kafka tools how far the log is, unless the client file names another group."""
_CHUNK = 10_000
"""Messages that are taken from the client at once."""
_WAIT_S = 0.2
_OF_CONSUMERS = ("group.id", "group.instance.id", "isolation.level", "fetch.", "queued.", "max.partition.fetch.bytes")
"""Beginnings of the names of settings that other clients do not have."""


class KafkaReader:
    """Reads batches of messages. Close it at the end.

    Raises:
        ConfigError: the address or the client's settings are wrong.
        MissingDependencyError: the extra `kafka` is not installed.
    """

    def __init__(self, source: str, config: StreamConfig) -> None:
        self.address = KafkaAddress.parse(source)
        self._config = config
        self._settings = read_client_file(config.client_file)
        self._problems: dict[str, None] = {}
        """What the client reported during this check, in order, each text once."""
        self._cannot_commit = False
        """Whether a warning was logged."""
        own: dict[str, Any] = {
            "bootstrap.servers": self.address.servers,
            "error_cb": self._note,
            "log_level": 0,  # problems become errors of the checks
            **self._settings,
        }
        consumers = {
            "group.id": _GROUP,
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "auto.offset.reset": "error",
            "enable.partition.eof": True,
            "on_commit": self._warn_of_commit,
        }
        of_all = {name: value for name, value in own.items() if not name.startswith(_OF_CONSUMERS)}
        try:
            self._consumer = Consumer(consumers | own)
            self._admin = AdminClient(of_all)
        except (KafkaException, ValueError, TypeError) as error:
            reason = error.args[0].str() if isinstance(error, KafkaException) else error
            raise ConfigError(
                f"stream.client_file: {config.client_file}: {without_secrets(str(reason), self._settings)}; correct "
                "it: the settings are those of librdkafka"
            ) from None
        self._positions: dict[StreamPartition, int] | None = None
        """Where the client continues by itself; None if unknown."""

    def read(self, stored: Mapping[StreamPartition, StreamOffset]) -> MessageBatch:
        """Read what follows the log's offsets, up to the topics' present ends or the limits of the configuration.

        Args:
            stored: the log's offsets.

        Raises:
            StreamError: the server cannot be reached, refuses the client, or sends none of the waiting messages.
            StreamOffsetError: see `starting_offsets`.
        """
        config, continues_at = self._config, self._positions
        self._problems.clear()
        self._positions = None  # until this check has succeeded
        with self._typed_errors():
            cluster, partitions = self._partitions()
            ranges = self._ranges(partitions)
            begin = starting_offsets(stored, ranges, cluster, start=config.start, reset=config.reset_offsets)
            if begin != continues_at:
                self._consumer.assign([TopicPartition(*partition, offset) for partition, offset in begin.items()])
            messages, positions = self._consume(begin, ranges)
        self._positions = positions
        own = {partition: offset for partition, offset in stored.items() if partition.topic in self.address.topics}
        begins = {partition: StreamOffset(cluster, offset) for partition, offset in begin.items()}
        return MessageBatch(
            source=str(self.address),
            messages=sorted(messages, key=lambda message: message[:3]),
            stored=dict(stored),
            offsets={partition: StreamOffset(cluster, offset) for partition, offset in positions.items()},
            behind={partition: max(0, ranges[partition].end - offset) for partition, offset in positions.items()},
            is_start=(config.start is StreamStart.newest or config.reset_offsets) and begins != own,
        )

    def commit(self, batch: MessageBatch) -> None:
        """Tell the server how far the log is, for monitoring only: a failure is logged and changes nothing."""
        offsets = [TopicPartition(*partition, offset.next) for partition, offset in batch.offsets.items()]
        try:
            self._consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            self._warn_of_commit(error.args[0], offsets)

    def close(self) -> None:
        """Close the connections after pending commits."""
        self._consumer.close()

    def _partitions(self) -> tuple[str, list[StreamPartition]]:
        """The id of the cluster, and all partitions of the topics."""
        partitions, cluster = [], ""
        for topic in self.address.topics:
            metadata = self._consumer.list_topics(topic, timeout=self._config.max_s)
            found = metadata.topics[topic]
            if found.error is not None:
                raise StreamError(
                    f"{self.address}: topic {topic}: {found.error.str()}; create the topic, or correct source"
                )
            cluster = metadata.cluster_id or ""
            partitions += [StreamPartition(topic, number) for number in sorted(found.partitions)]
        return cluster, partitions

    def _ranges(self, partitions: Sequence[StreamPartition]) -> dict[StreamPartition, OffsetRange]:
        """The offsets that the server has of each partition."""
        timeout_s = self._config.max_s
        bounds = []
        for spec in (OffsetSpec.earliest(), OffsetSpec.latest()):
            wanted = {TopicPartition(*partition): spec for partition in partitions}
            futures = self._admin.list_offsets(
                wanted, isolation_level=IsolationLevel.READ_COMMITTED, request_timeout=timeout_s
            )
            bounds.append({(place.topic, place.partition): future for place, future in futures.items()})
        oldest, end = bounds
        return {
            partition: OffsetRange(oldest[partition].result(timeout_s).offset, end[partition].result(timeout_s).offset)
            for partition in partitions
        }

    def _consume(
        self, begin: Mapping[StreamPartition, int], ranges: Mapping[StreamPartition, OffsetRange]
    ) -> tuple[list[StreamMessage], dict[StreamPartition, int]]:
        """Messages from `begin` on, and the offsets after them.

        Offsets without a message, such as those of transactions, are skipped when the client reports the end.
        """
        config, positions = self._config, dict(begin)
        messages: list[StreamMessage] = []
        num_bytes, deadline = 0, time.monotonic() + config.max_s
        while len(messages) < config.max_messages and num_bytes < config.max_bytes:
            missing = sum(max(0, ranges[partition].end - offset) for partition, offset in positions.items())
            left_s = deadline - time.monotonic()
            if not missing or left_s <= 0:
                break
            wanted = min(_CHUNK, missing, config.max_messages - len(messages))
            for message in self._consumer.consume(wanted, min(left_s, _WAIT_S)):
                error, place = message.error(), StreamPartition(message.topic() or "", message.partition() or 0)
                if error is None:
                    value, offset = message.value(), message.offset()
                    if offset < positions[place]:
                        continue  # fetched before the client was sent back; the log or this batch has it
                    kind, time_ms = message.timestamp()
                    at_ms = None if kind == TIMESTAMP_NOT_AVAILABLE else time_ms
                    messages.append(StreamMessage(*place, offset, value, at_ms))
                    num_bytes += len(value or b"")
                    positions[place] = offset + 1
                elif error.code() == KafkaError._PARTITION_EOF:
                    positions[place] = max(positions[place], message.offset())
                else:
                    self._note(error)
        stuck = [
            partition for partition, offset in positions.items() if offset == begin[partition] < ranges[partition].end
        ]
        if stuck and (positions == begin or self._problems):
            problem = (
                f"{self.address}: no message of {stuck[0]} arrived within {config.max_s:g} s, although some "
                f"are waiting{self._noted()}; check the server, or raise stream.max_s"
            )
            if positions == begin:
                raise StreamError(problem)
            logger.warning("%s; other partitions continue", problem)
        return messages, positions

    def _note(self, error: KafkaError) -> None:
        self._problems[without_secrets(error.str(), self._settings)] = None

    def _warn_of_commit(self, error: KafkaError | None, offsets: Sequence[TopicPartition]) -> None:
        failed = error or next((place.error for place in offsets if place.error is not None), None)
        if failed is not None and not self._cannot_commit:
            self._cannot_commit = True
            logger.warning(
                "offsets of the group cannot be committed (%s); only monitoring depends on them", failed.str()
            )

    def _noted(self) -> str:
        return f" ({'; '.join(list(self._problems)[-3:])})" if self._problems else ""

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        """Turn the client's errors into a StreamError with what the client reported before."""
        try:
            yield
        except (KafkaException, FutureTimeoutError) as error:
            try:
                self._consumer.consume(_CHUNK, _WAIT_S)  # calls error_cb; the next check starts from the log's offsets
            except KafkaException as another:
                self._note(another.args[0])
            if isinstance(error, KafkaException):
                reason = without_secrets(error.args[0].str(), self._settings)
            else:
                reason = f"no answer within {self._config.max_s:g} s"
            raise StreamError(
                f"{self.address}: cannot be read: {reason}{self._noted()}; check source, the network, and the user, "
                "the password, and the security.protocol in stream.client_file"
            ) from None
