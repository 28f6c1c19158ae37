"""The messages that one check of a watch reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vista.log.stream_offsets import StreamOffset, StreamPartition


class StreamMessage(NamedTuple):
    """A message: value None for one without a value (a tombstone); the server's time in ms since 1970, or None."""

    topic: str
    partition: int
    offset: int
    value: bytes | None
    time_ms: int | None

    @property
    def place(self) -> str:
        """Where the message is, for error messages."""
        return f"topic {self.topic}, partition {self.partition}, offset {self.offset}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageBatch:
    """Consecutive messages of all partitions of some topics, in the order of topics, partitions, and offsets.

    source: address of the topics; stored: the log's offsets when it was read; offsets: what the log stores with these
    messages, for every partition of the topics; behind: messages per partition that were not read yet; is_start:
    whether the log must store the offsets even without messages, so that a restart continues from the same place.
    """

    source: str
    messages: Sequence[StreamMessage]
    stored: Mapping[StreamPartition, StreamOffset]
    offsets: Mapping[StreamPartition, StreamOffset]
    behind: Mapping[StreamPartition, int]
    is_start: bool

    @property
    def num_bytes(self) -> int:
        """Bytes of the messages' values."""
        return sum(len(message.value) for message in self.messages if message.value is not None)

    @property
    def oldest_ms(self) -> int | None:
        """Time of the oldest message in ms; None if no message has a time."""
        return min((message.time_ms for message in self.messages if message.time_ms is not None), default=None)

    def continues(self, offsets: Mapping[StreamPartition, StreamOffset]) -> bool:
        """Whether a log with these offsets still ends where the batch begins."""
        topics = {partition.topic for partition in self.offsets}

        def of_topics(all_: Mapping[StreamPartition, StreamOffset]) -> dict[StreamPartition, StreamOffset]:
            return {partition: offset for partition, offset in all_.items() if partition.topic in topics}

        return of_topics(offsets) == of_topics(self.stored)
