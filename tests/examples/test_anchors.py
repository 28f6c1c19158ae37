"""Anchors: where they lie, when they ask, and which items are their labels, each against a loop."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.examples.test_cuts import anchor_plan, coded_chunks
from vista.arrays import Int
from vista.examples.anchors import ChunkAnchors, draw_anchors
from vista.examples.chunks import Chunks, ChunkTimeline
from vista.log.gaps import DAY_MS, gap_bucket


def timed_chunks(times: list[Int], items: list[Int], lengths: list[int], lead: Int | None = None) -> Chunks:
    """Chunks of the first `lengths` events of histories with these times and items; the others are their trail."""
    offsets = np.concatenate([[0], np.cumsum([len(time) for time in times])])
    timeline = ChunkTimeline(np.concatenate(items), np.concatenate(times), offsets)
    return replace(coded_chunks(lengths, []), timeline=timeline, lead=lead)


def random_chunks(seed: int, lead: Int | None = None) -> Chunks:
    """Four histories with equal times, repeated items, and unknown items."""
    rng = np.random.default_rng(seed)
    sizes, lengths = [30, 4, 0, 18], [20, 4, 0, 9]
    times = [np.sort(rng.integers(0, 15, size)) * DAY_MS for size in sizes]
    return timed_chunks(times, [rng.integers(0, 9, size) for size in sizes], lengths, lead)


def draw(chunks: Chunks, seed: int = 0, **changes: Any) -> ChunkAnchors:
    return draw_anchors(chunks, anchor_plan(**changes), np.random.default_rng(seed))


def of_chunk(chunks: Chunks, chunk: int) -> tuple[Int, Int, int]:
    """(times, items) of a chunk and its trail, and the number of events of the chunk."""
    timeline = chunks.timeline
    assert timeline is not None
    part = slice(timeline.offsets[chunk], timeline.offsets[chunk + 1])
    return timeline.time[part], timeline.item[part], int(np.diff(chunks.offsets)[chunk])


@pytest.mark.parametrize("lead", [None, np.array([3, 1, 0, 9])], ids=["whole", "lead"])
@pytest.mark.parametrize("days", [0.0, 2.0])
@pytest.mark.parametrize("by_time", [False, True])
def test_labels_are_the_distinct_known_items_of_the_window(by_time: bool, days: float, lead: Int | None) -> None:
    """Days count from the request, or without a time of request from the newest event before it."""
    checked = 0
    for seed in range(60):
        chunks = random_chunks(seed, lead)
        drawn = draw(chunks, seed, horizon_events=6, horizon_days=days, by_time=by_time)
        assert (np.diff(drawn.chunk) >= 0).all()
        for chunk, position, asked, item in zip(drawn.chunk, drawn.position, drawn.time, drawn.item, strict=True):
            time, items, length = of_chunk(chunks, chunk)
            assert (0 if lead is None else lead[chunk]) <= position < length
            begin = asked if by_time or position == 0 else time[position - 1]
            assert begin <= asked <= time[position]
            window = [items[k] for k in range(position, min(position + 6, len(items)))]
            if days:
                window = [i for k, i in enumerate(window) if time[position + k] < begin + days * DAY_MS]
            np.testing.assert_array_equal(item[item > 0], sorted(set(window) - {0}))
            assert item.any(), "an anchor without a label is left out"
            checked += 1
    assert checked > 150


def test_request_times_are_uniform_and_positions_follow_from_them() -> None:
    """A long gap is hit as often as it is long, and no request divides events of equal times."""
    time = np.array([0, 0, 10, 10, 10, 20, 100, 100]) * DAY_MS
    chunks = timed_chunks([time], [np.arange(8) + 1], [8])
    drawn = [draw(chunks, seed, spacing=2, by_time=True, timeless_share=0.0) for seed in range(1000)]
    position = np.concatenate([each.position for each in drawn])
    assert set(position.tolist()) <= {0, 2, 5, 6}, "events strictly before the request"
    share = np.bincount(position, minlength=7) / len(position)
    np.testing.assert_allclose(share[[2, 5, 6]], [0.1, 0.1, 0.8], atol=0.01)
    gap = np.concatenate([each.gap for each in drawn])
    # From 20 days on, most requests come more than 16 days after the newest event.
    assert (gap[position > 0] > 0).all() and (gap[position == 0] == 0).all()
    late = gap[position == 6]
    assert late.max() == gap_bucket(np.array(80 * DAY_MS)) and np.median(late) > gap_bucket(np.array(16 * DAY_MS))


def test_positions_are_uniform_and_requests_come_with_the_next_event() -> None:
    time = np.array([0, 0, 10, 10, 10, 20, 100, 100]) * DAY_MS
    chunks = timed_chunks([time], [np.arange(8) + 1], [8])
    drawn = [draw(chunks, seed, spacing=8, timeless_share=0.0) for seed in range(2000)]
    position, gap = (np.concatenate([getattr(each, name) for each in drawn]) for name in ("position", "gap"))
    np.testing.assert_allclose(np.bincount(position) / len(position), 1 / 8, atol=0.03)
    expected = gap_bucket(np.diff(time, prepend=0))[position]
    np.testing.assert_array_equal(gap, np.where(position > 0, expected, 0))
    every = draw(chunks, spacing=1)
    assert every.position.tolist() == list(range(8)), "one per label position"


def test_no_request_lies_among_the_events_that_are_context_only() -> None:
    """Event 1 is context, and has the time of the first label."""
    for days, places in (([0, 5, 5, 5], []), ([0, 5, 5, 5, 6], [4])):
        chunks = timed_chunks([np.array(days) * DAY_MS], [np.arange(len(days)) + 1], [len(days)], lead=np.array([2]))
        drawn = [draw(chunks, seed, spacing=1, by_time=True) for seed in range(20)]
        assert {place for each in drawn for place in each.position.tolist()} == set(places)


def test_some_requests_have_no_time() -> None:
    chunks = random_chunks(3)
    share = np.mean([(draw(chunks, seed, timeless_share=0.5).gap[1:] == 0).mean() for seed in range(300)])
    assert 0.45 < share < 0.65  # and anchors before the first event have none
    assert not draw(chunks, use_time=False, timeless_share=0.0).gap.any()
    assert not draw(chunks, timeless_share=1.0).gap.any()


def test_chunks_without_events_have_no_anchors() -> None:
    none = np.zeros(0, np.int64)
    for by_time in (False, True):
        drawn = draw(timed_chunks([none, none], [none, none], [0, 0]), by_time=by_time)
        assert len(drawn.chunk) == len(drawn.position) == len(drawn.gap) == len(drawn.item) == 0
