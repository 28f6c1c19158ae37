"""Where a stream begins in each partition, and which logs it refuses."""

from __future__ import annotations

import pytest

from vista.config.checks import StreamStart
from vista.errors import StreamOffsetError
from vista.log.ingest.kafka_reader import OffsetRange, starting_offsets
from vista.log.segment_files import StreamOffset, StreamPartition, offset_entries, stream_offsets

Ranges = dict[tuple[str, int], tuple[int, int]]


def begin(stored: dict[tuple[str, int], int], ranges: Ranges, start: str = "oldest", reset: bool = False) -> list[int]:
    """Where each partition begins; all stored offsets are of cluster "a", as the server is."""
    found = starting_offsets(
        {StreamPartition(*partition): StreamOffset("a", offset) for partition, offset in stored.items()},
        {StreamPartition(*partition): OffsetRange(*bounds) for partition, bounds in ranges.items()},
        "a",
        start=StreamStart(start),
        reset=reset,
    )
    return list(found.values())


def test_a_new_topic_begins_where_start_says() -> None:
    ranges = {("t", 0): (5, 9), ("t", 1): (0, 0)}
    assert begin({}, ranges) == [5, 0] and begin({}, ranges, "newest") == [9, 0]


def test_a_known_topic_continues_and_added_partitions_begin_with_their_first_message() -> None:
    ranges = {("t", 0): (5, 9), ("t", 1): (0, 4)}
    assert begin({("t", 0): 7}, ranges, "newest") == [7, 0]
    assert begin({("t", 0): 9}, ranges) == [9, 0] and begin({("t", 0): 5}, ranges) == [5, 0]


def test_an_added_topic_begins_where_start_says() -> None:
    assert begin({("t", 0): 7}, {("t", 0): (5, 9), ("u", 0): (2, 3)}, "newest") == [7, 3]


@pytest.mark.parametrize(
    ("stored", "ranges", "message", "after_reset"),
    [
        ({("t", 0): 2}, {("t", 0): (5, 9)}, "up to 3 messages were deleted .*t, partition 0: 2 to 4", [5]),
        ({("t", 0): 7}, {("t", 0): (5, 9), ("t", 1): (4, 6)}, "4 messages .*offsets of t, partition 1: 0 to 3", [7, 4]),
        (
            {("t", number): 0 for number in range(5)},
            {("t", number): (1_000, 1_000) for number in range(5)},
            "5,000 messages were deleted .*; t, partition 2: 0 to 999; and 2 more",
            [1_000] * 5,
        ),
        ({("t", 0): 10}, {("t", 0): (5, 9)}, "up to offset 10, but it ends at offset 9: the topic was ", [5]),
        ({("t", 0): 1, ("t", 1): 3}, {("t", 0): (0, 9)}, "t, partition 1: the log .* but it no longer exists", [0]),
        ({("u", 0): 1}, {("t", 0): (0, 9)}, "the log holds messages of topic u, not of topic t", [0]),
    ],
)  # fmt: skip
def test_offsets_that_do_not_fit(
    stored: dict[tuple[str, int], int],
    ranges: Ranges,
    message: str,
    after_reset: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(StreamOffsetError, match=message) as error:
        begin(stored, ranges)
    assert "stream.reset_offsets=true" in str(error.value)
    assert begin(stored, ranges, reset=True) == after_reset
    assert str(error.value) in caplog.text


def test_another_cluster_is_refused_and_after_a_reset_read_from_the_start() -> None:
    stored = {StreamPartition("t", 0): StreamOffset("b", 3)}
    ranges = {StreamPartition("t", 0): OffsetRange(1, 9)}
    with pytest.raises(StreamOffsetError, match=r"of topic t from the cluster b, but the server belongs to .* a"):
        starting_offsets(stored, ranges, "a", start=StreamStart.newest, reset=False)
    assert list(starting_offsets(stored, ranges, "a", start=StreamStart.newest, reset=True).values()) == [1]


def test_the_newest_segment_with_a_topic_counts() -> None:
    first = {StreamPartition("t", 0): StreamOffset("a", 3), StreamPartition("u", 0): StreamOffset("a", 1)}
    second = {StreamPartition("t", 1): StreamOffset("b", 5), StreamPartition("t", 0): StreamOffset("b", 0)}
    manifests = [{"offsets": offset_entries(offsets)} for offsets in (first, {}, second)]
    assert stream_offsets(manifests) == {StreamPartition("u", 0): StreamOffset("a", 1)} | second
    assert manifests[2]["offsets"][0] == {"cluster": "b", "topic": "t", "partition": 0, "next": 0}
