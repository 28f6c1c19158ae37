"""Where reading begins in each partition, from the offsets in the log and those that the server has."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import NamedTuple

from vista.config.choices import StreamStart
from vista.errors import StreamOffsetError
from vista.log.stream_offsets import StreamOffset, StreamPartition

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
