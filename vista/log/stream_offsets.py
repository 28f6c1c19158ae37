"""Offsets of Kafka topics in the manifests of a log: where the next read of each partition continues.

A segment made from messages stores the offsets after its messages, so both are published by the same rename. Each
message is then in the log exactly once, whenever a process is killed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple


class StreamPartition(NamedTuple):
    """A partition of a topic."""

    topic: str
    number: int

    def __str__(self) -> str:
        return f"{self.topic}, partition {self.number}"


class StreamOffset(NamedTuple):
    """The offset of the next message of a partition, and the id of the cluster that numbered its messages."""

    cluster: str
    next: int


def stream_offsets(manifests: Iterable[Mapping[str, Any]]) -> dict[StreamPartition, StreamOffset]:
    """The offsets after all messages of a log. The newest segment with a topic replaces all offsets of that topic.

    Args:
        manifests: of the log's segments, oldest first.
    """
    offsets: dict[StreamPartition, StreamOffset] = {}
    for manifest in manifests:
        topics = {entry["topic"] for entry in manifest["offsets"]}
        offsets = {partition: offset for partition, offset in offsets.items() if partition.topic not in topics}
        for entry in manifest["offsets"]:
            partition = StreamPartition(entry["topic"], entry["partition"])
            offsets[partition] = StreamOffset(entry["cluster"], entry["next"])
    return offsets


def offset_entries(offsets: Mapping[StreamPartition, StreamOffset]) -> list[dict[str, Any]]:
    """A manifest's entries for these offsets, in the order of topics and partitions."""
    return [
        {"cluster": offset.cluster, "topic": partition.topic, "partition": partition.number, "next": offset.next}
        for partition, offset in sorted(offsets.items())
    ]
