"""Reads the messages of topics from the offsets in a log. The offsets of Kafka's consumer groups are not read."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from confluent_kafka import (
    TIMESTAMP_NOT_AVAILABLE,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from vista.config.checks import StreamStart
from vista.config.log_config import StreamConfig
from vista.errors import ConfigError, StreamError, StreamOffsetError, shown
from vista.files import read_limited
from vista.log.ingest.kafka_messages import MessageBatch, StreamMessage
from vista.log.segment_files import StreamOffset, StreamPartition

_MOST_BYTES = 1 << 20
_SECRET = ("password", "secret", "token", "key.pem", "oauthbearer.config")
"""Parts of the names of settings whose values are never shown."""
_OWN = {
    "bootstrap.servers": "name servers in source",
    "enable.auto.commit": "the log holds the offsets",
    "enable.auto.offset.store": "the log holds the offsets",
    "auto.offset.reset": "set stream.start or stream.reset_offsets",
    "enable.partition.eof": "the watch needs it",
}
"""Settings that a file must not change, and why."""


def read_client_file(path: str | None) -> dict[str, str]:
    """Read settings of the Kafka client: one `name=value` per line, with empty lines and # comments.

    Raises:
        ConfigError: the file cannot be read, a line has another form, or a setting belongs elsewhere. The message
            holds no value.
    """
    if path is None:
        return {}
    try:
        lines = read_limited(Path(path), _MOST_BYTES).decode().splitlines()
    except OSError as error:
        raise ConfigError(f"stream.client_file: {path}: cannot be read ({error.strerror}); check the path") from None
    except ValueError:
        raise ConfigError(f"stream.client_file: {path}: is not UTF-8 text; write it again") from None
    settings: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, equals, value = (part.strip() for part in line.partition("="))
        place = f"stream.client_file: {path}: line {number}"
        if not equals or not name:
            raise ConfigError(f"{place}: is not of the form name=value; write it again, as in security.protocol=SSL")
        if name in _OWN:
            raise ConfigError(f"{place}: leave {name} out: {_OWN[name]}")
        if name in settings:
            raise ConfigError(f"{place}: sets {shown(name)} again; keep one of the lines")
        settings[name] = value
    return settings


def without_secrets(text: str, settings: dict[str, str]) -> str:
    """A message of the client without the values of secret settings."""
    for name, value in settings.items():
        if value and any(part in name for part in _SECRET):
            text = text.replace(value, "***")
    return text


SCHEME = "kafka://"
_FORM = "kafka://server:port/topic, with commas between several servers or topics"
_SERVER = re.compile(r"(?:[A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5}")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


@dataclass(frozen=True, slots=True)
class KafkaAddress:
    """Servers to begin with, as the client takes them ("a:9092,b:9092"), and distinct topics."""

    servers: str
    topics: tuple[str, ...]

    @classmethod
    def parse(cls, source: str) -> KafkaAddress:
        """Parse the setting `source`. Raises ConfigError if it has another form, or holds a password, which the message
        does not repeat."""
        if not source.startswith(SCHEME):
            raise ConfigError(f"source: {shown(source)} does not begin with {SCHEME}; write {_FORM}")
        if "@" in source:
            raise ConfigError(
                "source: has a user name or a password; put sasl.username and sasl.password into stream.client_file"
            )
        servers, _, topics = source.removeprefix(SCHEME).partition("/")
        for server in servers.split(","):
            if not _SERVER.fullmatch(server) or int(server.rpartition(":")[2]) > 65_535:
                raise ConfigError(f"source: {shown(server)} is not a server with its port; write {_FORM}")
        names = topics.split(",")
        for topic in names:
            if not _TOPIC.fullmatch(topic):
                raise ConfigError(f"source: {shown(topic)} cannot be the name of a topic; write {_FORM}")
        if len(set(names)) < len(names):
            raise ConfigError("source: names a topic twice; name each topic once")
        return cls(servers, tuple(names))

    def __str__(self) -> str:
        return f"{SCHEME}{self.servers}/{','.join(self.topics)}"


logger = logging.getLogger(__name__)
_NAMED = 3
_RESET = "set stream.reset_offsets=true for one run"


class OffsetRange(NamedTuple):
    """Offsets of the messages that the server has of a partition: [oldest, end)."""

    oldest: int
    end: int


def starting_offsets(
    stored: Mapping[StreamPartition, StreamOffset],
    ranges: Mapping[StreamPartition, OffsetRange],
    cluster: str,
    *,
    start: StreamStart,
    reset: bool,
) -> dict[StreamPartition, int]:
    """Where reading begins in each partition of `ranges`.

    A topic without offsets in the log begins where `start` says. A partition that was added to a known topic begins
    at offset 0, because all of its messages are new.

    Args:
        stored: the log's offsets.
        ranges: all partitions of the topics to read.
        cluster: id of the server's cluster.
        reset: log a warning in place of an error, and begin at the oldest message where the offsets do not fit.

    Raises:
        StreamOffsetError: the log's offsets do not fit: the log was made from other topics, from another cluster, or
            from a topic that was created again, or the server has deleted messages that the log lacks.
    """
    topics, known = {partition.topic for partition in ranges}, {partition.topic for partition in stored}
    if known and not known & topics:
        _refuse(
            f"the log holds messages of {_topics(known)}, not of {_topics(topics)}; correct source, or name the topics "
            f"of both. If the log is meant to hold other topics from now on, {_RESET}",
            reset,
        )
    own = {partition: offset for partition, offset in stored.items() if partition.topic in topics}
    foreign = {partition.topic for partition, offset in own.items() if offset.cluster != cluster}
    if foreign:
        clusters = sorted({offset.cluster for partition, offset in own.items() if partition.topic in foreign})
        _refuse(
            f"the log holds messages of {_topics(foreign)} from the cluster {', '.join(clusters)}, but the server "
            f"belongs to the cluster {cluster}; correct source. If the topic moved, {_RESET}, which reads all of its "
            "messages",
            reset,
        )
    gone = sorted(partition for partition in own if partition not in ranges and partition.topic not in foreign)
    ahead = sorted(
        partition for partition, (_, end) in ranges.items()
        if partition in own and partition.topic not in foreign and own[partition].next > end
    )  # fmt: skip
    if gone or ahead:
        first = (gone or ahead)[0]
        has = "no longer exists" if gone else f"ends at offset {ranges[first].end}"
        _refuse(
            f"{first}: the log holds its messages up to offset {own[first].next}, but it {has}: the topic was created "
            f"again, or lost messages; check source. To read the topic from its oldest message, {_RESET}",
            reset,
        )
    restarted = foreign | {partition.topic for partition in (*gone, *ahead)}
    begin, lost = {}, {}
    for partition, (oldest, end) in ranges.items():
        if partition.topic in restarted:
            begin[partition] = oldest
        elif partition.topic not in known:
            begin[partition] = end if start is StreamStart.newest else oldest
        else:
            wanted = own[partition].next if partition in own else 0
            begin[partition] = max(wanted, oldest)
            if wanted < oldest:
                lost[partition] = (wanted, oldest)
    if lost:
        total = sum(oldest - wanted for wanted, oldest in lost.values())
        named = [f"{partition}: {wanted} to {oldest - 1}" for partition, (wanted, oldest) in sorted(lost.items())]
        shown = "; ".join(named[:_NAMED]) + (f"; and {len(named) - _NAMED} more" if len(named) > _NAMED else "")
        _refuse(
            f"up to {total:,} messages were deleted on the server before they were read (offsets of {shown}; "
            "ends of transactions count too); add these events with `vista prepare append=true` if another copy exists "
            f"and {_RESET} to continue after them. Then raise the topic's retention, or run the watch more often",
            reset,
        )
    return begin


def _refuse(problem: str, reset: bool) -> None:
    if not reset:
        raise StreamOffsetError(problem)
    logger.warning("stream.reset_offsets=true: %s", problem)


def _topics(names: set[str]) -> str:
    return f"topic{'s' if len(names) > 1 else ''} {', '.join(sorted(names))}"


_GROUP = "vista"
"""The group whose offsets show in Kafka tools how far the log is, unless the client file names another group."""
_CHUNK = 10_000
"""Messages that are taken from the client at once."""
_BYTES_PER_MESSAGE = 671
"""A check stops after `max_messages`, or as many times these bytes, which bounds its memory."""
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
        """Messages from `begin` on, and the offsets after them. Offsets without a message, such as those of
        transactions, are skipped when the client reports the end."""
        config, positions = self._config, dict(begin)
        messages: list[StreamMessage] = []
        num_bytes, deadline = 0, time.monotonic() + config.max_s
        most_bytes = config.max_messages * _BYTES_PER_MESSAGE
        while len(messages) < config.max_messages and num_bytes < most_bytes:
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
