"""Anchors: training questions whose labels are all items of the window that follows.

An anchor is a place in a chunk and the time of a request. It sees the events before its place, like a next-item label
at the same position, and its labels are the distinct items of the events from there on, to the end of the horizon.
These may lie after the chunk, but never beyond what training may see. Letters: B chunks, NA anchors, N events of the
horizon, P labels of the anchor with the most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config import TrainConfig
from vista.config.choices import Split
from vista.examples.chunks import Chunks, ChunkTimeline
from vista.log.gaps import DAY_MS, UNKNOWN_GAP, gap_bucket
from vista.log.histories import ranges


@dataclass(frozen=True, slots=True)
class AnchorPlan:
    """How anchors are drawn. `horizon_events` and `horizon_days` have the meanings of those of `DataConfig`."""

    spacing: int
    """Label positions of a chunk per anchor, so that the number of anchors does not depend on how histories are cut."""
    horizon_events: int
    horizon_days: float
    by_time: bool
    """Draw times uniformly from the time that a chunk spans, because evaluation asks at a given time: long gaps are hit
    more often than short ones. False draws positions uniformly."""
    use_time: bool
    """Whether requests have a time."""
    timeless_share: float
    """Share of anchors whose requests have no time, because callers of the scorer may not pass one."""
    keeps_other_windows: bool
    """Whether windows without anchors are trained too, because next items are trained at every position."""
    mean_labels: float = 1.0
    """Mean number of labels per anchor, by which the loss is divided."""

    @classmethod
    def of(cls, config: TrainConfig, *, has_time: bool) -> AnchorPlan | None:
        """The plan of a training run on a log with or without times; None if the run has neither the window loss nor
        counters, with which next items are trained at anchors too."""
        at_anchors = config.model.counters and config.ranks_items
        if not config.trains_window and not at_anchors:
            return None
        by_time = config.data.split is Split.time
        return cls(
            spacing=config.data.anchor_spacing,
            horizon_events=config.data.horizon_events,
            horizon_days=config.data.horizon_days,
            by_time=by_time,
            use_time=has_time and config.model.use_time,
            # With any other split, evaluation asks without a time, and only requests in production have one.
            timeless_share=0.1 if by_time else 0.5,
            keeps_other_windows=config.next_weight > 0 and not at_anchors,
        )


@dataclass(frozen=True, slots=True)
class ChunkAnchors:
    """Anchors with at least one label, sorted by chunk and position."""

    chunk: Int
    """int64 [NA]."""
    position: Int
    """int64 [NA] events of the chunk before the anchor."""
    gap: Int
    """int64 [NA] log buckets of the time from the newest of these events to the request."""
    item: Int
    """int64 [NA, P] distinct model item rows; 0 pads."""
    next_item: Int
    """int64 [NA] model item rows of the first event after the request; 0 is the unknown item."""
    time: Int
    """int64 [NA] of the requests, ms."""
    is_timed: NDArray[np.bool_]
    """bool [NA]: False where the caller of the scorer passes no time."""


def draw_anchors(chunks: Chunks, plan: AnchorPlan, rng: np.random.Generator) -> ChunkAnchors:
    """Draw one anchor per `spacing` label positions of each chunk, rounded up.

    Args:
        chunks: with a timeline.
        rng: draws times or positions, and which requests have no time.
    """
    timeline = chunks.timeline
    assert timeline is not None
    lead, length = chunks.num_context, np.diff(chunks.offsets)
    count = -(-(length - lead) // plan.spacing)
    chunk = np.repeat(np.arange(len(count)), count)
    first, room = (timeline.offsets[:-1] + lead)[chunk], (length - lead)[chunk]
    # One anchor per equal part, so that a chunk's anchors spread out.
    share = (ranges(0, count) + rng.random(len(chunk))) / count[chunk]
    if plan.by_time:
        begin, end = timeline.time[first], timeline.time[first + room - 1]
        time = begin + (share * (end - begin + 1)).astype(np.int64)
        place = _first_from(timeline, chunk, time)
    else:
        place = first + (share * room).astype(np.int64)
        time = timeline.time[place]
    position = place - timeline.offsets[:-1][chunk]
    is_timed = rng.random(len(chunk)) >= plan.timeless_share
    has_gap = (position > 0) & is_timed & plan.use_time
    gap = np.where(has_gap, gap_bucket(time - timeline.time[np.maximum(place - 1, 0)]), UNKNOWN_GAP)
    # As in evaluation, a window begins at the request if that has a time, else at the newest event before it.
    begin = time if plan.by_time else timeline.time[np.where(position > 0, place - 1, place)]
    item = _labels(timeline, plan, place, timeline.offsets[1:][chunk], begin)
    # A request at the time of a chunk's first label may have its place among the events that are context only.
    kept = np.flatnonzero(item.any(1) & (position >= lead[chunk]))
    chunk, position, place, time = chunk[kept], position[kept], place[kept], time[kept]
    return ChunkAnchors(chunk, position, gap[kept], item[kept], timeline.item[place], time, is_timed[kept])


def _first_from(timeline: ChunkTimeline, chunk: Int, time: Int) -> Int:
    """int64 [NA]: the place of the first event of each chunk at or after a time that its events reach."""
    # (chunk, time) as one sorted key.
    origin = timeline.time.min(initial=0)
    width = timeline.time.max(initial=0) - origin + 1
    key = np.repeat(np.arange(len(timeline.offsets) - 1), np.diff(timeline.offsets)) * width + timeline.time - origin
    place: Int = np.searchsorted(key, chunk * width + time - origin)
    return place


def _labels(timeline: ChunkTimeline, plan: AnchorPlan, place: Int, end: Int, begin: Int) -> Int:
    """int64 [NA, P] distinct known items of the windows that begin at the events `place`, right-aligned; 0 pads.

    Args:
        end: int64 [NA] place after the last event that training may see.
        begin: int64 [NA] times (ms) from which days are counted.
    """
    width = min(plan.horizon_events, int((end - place).max(initial=0)))
    event = place[:, None] + np.arange(width)
    is_inside = event < end[:, None]
    event = np.where(is_inside, event, 0)
    if plan.horizon_days > 0:
        is_inside &= timeline.time[event] < begin[:, None] + math.ceil(plan.horizon_days * DAY_MS)
    item = np.sort(np.where(is_inside, timeline.item[event], 0), axis=1)
    repeats = np.pad(item[:, 1:] == item[:, :-1], ((0, 0), (1, 0)))
    item = np.sort(np.where(repeats, 0, item), axis=1)
    return item[:, item.shape[1] - int((item > 0).sum(1).max(initial=0)) :]
