"""Training examples cut from histories: many labels from one pass over the events, and no label in its own context.

A chunk is a stretch of one user's history. Its label positions p = 0..P-1 (p events of the chunk seen, label = event
p) are divided into windows [b, e] of at most W positions. A window reads

- a summary whose cut (number of events covered) is at most b, and
- a tail, the events e-L .. e-1, of which position p sees those before p.

So neither holds the label of any position of the window. With stored summaries, labels begin after the events that the
record covers. Such a chunk starts with a lead, events that serve as context only, and all its windows read the one
record. Letters: B chunks, T packed events, N impressions, NC cuts, NW windows, W positions per window, L tail length, I
impressions per window.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Float32s, Int, offsets_of
from vista.config import TrainConfig
from vista.config.checks import Architecture, Mixing, Split
from vista.counters.keys import UserCounters
from vista.examples.batch import (
    Batch,
    BatchAnchors,
    BatchCounters,
    BatchCuts,
    BatchEvents,
    BatchImpressions,
    BatchLabels,
    BatchNegatives,
    BatchReconstruction,
    BatchWindows,
    ChunkHistories,
    ChunkImpressions,
    Chunks,
    ChunkTimeline,
)
from vista.examples.item_spaces import Pooled
from vista.examples.item_statistics import CounterRequests
from vista.log.histories import DAY_MS, UNKNOWN_GAP, gap_bucket, ranges

# Anchors: training questions whose labels are all items of the window that follows.
#
# An anchor is a place in a chunk and the time of a request. It sees the events before its place, like a next-item label
# at the same position, and its labels are the distinct items of the events from there on, to the end of the horizon.
# These may lie after the chunk, but never beyond what training may see. Letters: B chunks, NA anchors, N events of the
# horizon, P labels of the anchor with the most.


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
        at_anchors = bool(config.model.counter_keys) and config.ranks_items
        if not config.trains_window and not at_anchors:
            return None
        by_time = config.data.split is Split.time
        return cls(
            spacing=config.data.anchor_spacing,
            horizon_events=config.data.horizon_events,
            horizon_days=config.data.horizon_days,
            by_time=by_time,
            use_time=has_time and config.model.reads("times"),
            # With any other split, evaluation asks without a time, and only requests in production have one.
            timeless_share=0.1 if by_time else 0.5,
            keeps_other_windows=config.next_weight > 0 and (not at_anchors or config.learns_alone),
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
    weight: Float32s | None
    """float32 [NA, P] of the labels `item`; None is 1."""
    next_weight: Float32s | None
    """float32 [NA] of the labels `next_item`; None is 1."""


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
    end = timeline.offsets[1:][chunk]
    event, following = _anchor_labels(timeline, plan, place, end, begin), _places(timeline, place, end, 1)[:, 0]
    item = np.where(event >= 0, _take(timeline.item, event), 0)
    # A request at the time of a chunk's first label may have its place among the events that are context only.
    kept = np.flatnonzero(item.any(1) & (position >= lead[chunk]))
    chunk, position, following, time = chunk[kept], position[kept], following[kept], time[kept]
    weight = next_weight = None
    if timeline.weight is not None:
        weight, next_weight = timeline.weight[event[kept]], timeline.weight[following]
    next_item = np.where(following >= 0, timeline.item[following], 0)
    return ChunkAnchors(chunk, position, gap[kept], item[kept], next_item, time, is_timed[kept], weight, next_weight)


def _places(timeline: ChunkTimeline, place: Int, end: Int, width: int) -> Int:
    """int64 [NA, width]: the places of the first labels at or after places int64 [NA] and before `end`; -1 after the
    last one."""
    if timeline.active is None:
        places = place[:, None] + np.arange(width)
    else:
        rank = np.searchsorted(timeline.active, place)[:, None] + np.arange(width)
        places = np.append(timeline.active, len(timeline.item))[np.minimum(rank, len(timeline.active))]
    return np.where(places < end[:, None], places, -1)


def _first_from(timeline: ChunkTimeline, chunk: Int, time: Int) -> Int:
    """int64 [NA]: the place of the first event of each chunk at or after a time that its events reach."""
    # (chunk, time) as one sorted key.
    origin = timeline.time.min(initial=0)
    width = timeline.time.max(initial=0) - origin + 1
    key = np.repeat(np.arange(len(timeline.offsets) - 1), np.diff(timeline.offsets)) * width + timeline.time - origin
    place: Int = np.searchsorted(key, chunk * width + time - origin)
    return place


def _anchor_labels(timeline: ChunkTimeline, plan: AnchorPlan, place: Int, end: Int, begin: Int) -> Int:
    """int64 [NA, P]: the first event of each known item of the windows that begin at the events `place`, sorted by
    item and right-aligned; -1 pads.

    Args:
        end: int64 [NA] place after the last event that training may see.
        begin: int64 [NA] times (ms) from which days are counted.
    """
    width = min(plan.horizon_events, int((end - place).max(initial=0)))
    event = _places(timeline, place, end, width)
    is_inside = event >= 0
    if plan.horizon_days > 0:
        is_inside &= _take(timeline.time, event) < begin[:, None] + math.ceil(plan.horizon_days * DAY_MS)
    item = np.where(is_inside, _take(timeline.item, event), 0)
    order = item.argsort(1, kind="stable")
    item, event = np.take_along_axis(item, order, 1), np.take_along_axis(event, order, 1)
    repeats = np.pad(item[:, 1:] == item[:, :-1], ((0, 0), (1, 0)))
    is_label = (item > 0) & ~repeats
    event = np.take_along_axis(np.where(is_label, event, -1), is_label.argsort(1, kind="stable"), 1)
    return event[:, event.shape[1] - int(is_label.sum(1).max(initial=0)) :]


NUM_CUTS = 2
RECONSTRUCTION_LEN = 64


@dataclass(frozen=True, slots=True)
class CutPlan:
    """How chunks are cut. Fields have the names and meanings of those of `DataConfig` and `ModelConfig`."""

    mixing: Mixing
    tail_len: int
    label_spacing: int
    windows_per_chunk: int
    num_cuts: int
    """Cuts per chunk in bidirectional mixing. Separable mixing has one every label_spacing events."""
    staleness_events: float
    staleness_share: float
    unknown_share: float
    reconstruction_len: int
    """Number of events before a sampled cut that the decoder reconstructs; 0 draws none."""
    timeless_share: float = 0.1
    """Share of windows whose requests have no time, because callers of the scorer may not pass one."""
    featureless_share: float = 0.1
    """The same for features of requests; and the share of chunks without features of their users, because the scorer
    does not know those of users without a record."""
    anchors: AnchorPlan | None = None
    """None draws no anchors."""
    pools_labels: bool = False
    """Whether next items are trained at all positions of windows, by a model with pooled vectors."""
    exact_counters: bool = False
    """Count up to each request, as baselines do, which read the whole history. False counts up to a window's cut, and
    adds the events of its tail, as the scorer does."""

    @classmethod
    def of(cls, config: TrainConfig, *, has_time: bool) -> CutPlan:
        """The plan of a training run on a log with or without times."""
        data, model = config.data, config.model
        return cls(
            mixing=model.mixing,
            tail_len=model.tail_len,
            label_spacing=data.label_spacing,
            windows_per_chunk=data.windows_per_chunk,
            num_cuts=NUM_CUTS,
            staleness_events=data.staleness_events,
            staleness_share=data.staleness_share,
            unknown_share=data.unknown_share,
            reconstruction_len=RECONSTRUCTION_LEN if config.trains_decoder else 0,
            anchors=AnchorPlan.of(config, has_time=has_time),
            pools_labels=model.space_dim > 0
            and config.ranks_items
            and config.next_weight > 0
            and not model.counter_keys,
            exact_counters=model.architecture is not Architecture.vista,
        )


# Windows: the label positions of chunks, divided into runs that share one summary and one tail.
#
# A chunk's label positions p = 0..P-1 (p events of the chunk seen) are divided into windows [b, e] of at most W of
# them. Letters: B chunks, NW windows, W positions per window, n requests.


@dataclass(frozen=True, slots=True)
class ChunkWindows:
    """Windows, sorted by chunk and position."""

    chunk: Int
    """int64 [NW]."""
    index: Int
    """int64 [NW] number of the window within its chunk."""
    begin: Int
    """int64 [NW] first position, in events of the chunk seen. It is a boundary: a place where a summary may be cut."""
    end: Int
    """int64 [NW] last position. Labels end at the chunk's last position, which may come first."""

    def select(self, rows: Int) -> ChunkWindows:
        return ChunkWindows(self.chunk[rows], self.index[rows], self.begin[rows], self.end[rows])


def divide_chunks(chunks: Chunks, label_spacing: int, phase: Int) -> ChunkWindows:
    """All windows. They begin at 0, phase, phase + W, … after a chunk's lead, and end before the next one, or at the
    chunk's last position."""
    W, lead = label_spacing, chunks.num_context
    # A position after the last event has no next item, but impressions may lie there.
    num_positions = np.diff(chunks.offsets) - lead + (1 if len(chunks.impressions.chunk) else 0)
    num_windows = np.where(num_positions > 0, 1 + np.maximum(0, -(-(num_positions - phase) // W)), 0)
    chunk = np.repeat(np.arange(len(phase)), num_windows)
    index = ranges(0, num_windows)
    begin = np.where(index == 0, 0, phase[chunk] + (index - 1) * W)
    end = np.minimum(np.where(index == 0, phase[chunk] - 1, begin + W - 1), num_positions[chunk] - 1)
    return ChunkWindows(chunk, index, begin + lead[chunk], end + lead[chunk])


def _windows_at(
    shown: ChunkImpressions | ChunkAnchors, chunks: Chunks, plan: CutPlan, phase: Int, windows: ChunkWindows
) -> Int:
    """int64 [N]: the window, of all windows, that each impression or anchor lies in."""
    second = (chunks.num_context + phase)[shown.chunk]  # where the chunk's second window begins
    index = np.where(shown.position < second, 0, 1 + (shown.position - second) // plan.label_spacing)
    return np.searchsorted(windows.chunk, shown.chunk) + index


def _window_requests(
    histories: ChunkHistories,
    windows: ChunkWindows,
    covered: Int | None,
    tail_len: int,
    window: Int,
    position: Int,
    time: Int,
    is_timed: NDArray[np.bool_],
) -> CounterRequests:
    """n requests at `position` int64 [n] (events of the chunk before the request) of windows int64 [n]. covered: from
    `_covered`; time: int64 [n] ms; is_timed: bool [n], False where the scorer would not get the time."""
    chunk = windows.chunk[window]
    start = histories.start[chunk]
    seen = start + position
    tail_start = start + np.maximum(windows.end[window] - tail_len, 0)
    return CounterRequests(
        histories.history[chunk], seen if covered is None else covered[window], tail_start, seen, time, is_timed
    )


def draw_windows(
    windows_per_chunk: int, rng: np.random.Generator, windows: ChunkWindows, impression_window: Int
) -> Int:
    """Sorted indices of the windows to keep: all, or `windows_per_chunk` drawn ones, those with impressions first."""
    num_windows = len(windows.chunk)
    if windows_per_chunk == 0 or num_windows == 0 or windows.index.max() < windows_per_chunk:
        return np.arange(num_windows)
    priority = rng.random(num_windows)
    priority[impression_window] -= 1.0
    order = np.lexsort((priority, windows.chunk))
    return np.sort(order[windows.index < windows_per_chunk])


def cut_batch(
    chunks: Chunks, plan: CutPlan, rng: np.random.Generator, negatives: Int, negative_log_weight: NDArray[np.float32]
) -> Batch:
    """Cut packed chunks into one batch. The same generator state gives the same batch.

    Args:
        chunks: packed histories and their impressions.
        plan: sizes and shares.
        rng: draws where windows begin, the windows to keep, staleness, requests without a time, the events to
            reconstruct, the items shown as unknown, and requests without features. Anchors are drawn from a child of
            it, and change no other draw.
        negatives: int64 [J] model item rows, shared by the batch; negative_log_weight: float32 [J].
    """
    phase = rng.integers(1, plan.label_spacing + 1, len(chunks.offsets) - 1)
    all_windows = divide_chunks(chunks, plan.label_spacing, phase)
    impression_window = _windows_at(chunks.impressions, chunks, plan, phase, all_windows)
    keep = draw_windows(plan.windows_per_chunk, rng, all_windows, impression_window)
    anchors, anchor_window = None, np.zeros(0, np.int64)
    if plan.anchors is not None:
        anchors = draw_anchors(chunks, plan.anchors, rng.spawn(1)[0])
        anchor_window = _windows_at(anchors, chunks, plan, phase, all_windows)
        if not plan.anchors.keeps_other_windows:  # they have nothing to train
            keep = np.intersect1d(keep, impression_window)
        keep = np.union1d(keep, anchor_window)
    windows = all_windows.select(keep)
    if chunks.summary is None:
        boundary = _draw_boundaries(plan, rng, all_windows, num_chunks=len(phase))
        cuts, window_cut = _place_cuts(chunks, plan, phase, all_windows, boundary[keep])
    else:
        cuts, window_cut = _no_cuts(chunks), windows.chunk
    is_timeless = rng.random(len(keep)) < plan.timeless_share
    reconstruction = _draw_reconstruction(plan, rng, cuts)
    hidden = rng.random(len(chunks.item)) < plan.unknown_share if plan.unknown_share > 0 else None
    is_featureless = rng.random(len(keep)) < plan.featureless_share
    # The last draws, so that they change no other.
    is_unknown = rng.random(len(chunks.user)) < plan.featureless_share

    impression = _impressions_by_window(keep, impression_window, len(all_windows.chunk))
    impressed = np.where(impression >= 0, chunks.impressions.item[impression], 0)
    asked = [np.zeros(0, np.int64)] * 2 if anchors is None else [anchors.item.ravel(), anchors.next_item]
    covered, counted, pooled = _covered(chunks, plan, windows, cuts, window_cut), None, None
    anchor_window = np.searchsorted(keep, anchor_window)
    if anchors is not None and (histories := chunks.histories) is not None:
        requests = _window_requests(
            histories, windows, covered, plan.tail_len, anchor_window, anchors.position, anchors.time, anchors.is_timed
        )
        counted = None if histories.counters is None else histories.counters.at(requests)
        pooled = None if histories.pooled is None else _tensor(histories.pooled.at(requests, plan.tail_len))
    named = [
        chunks.item,
        negatives,
        impressed.ravel(),
        *asked,
        np.zeros(0, np.int64) if counted is None else counted.codes.key,
    ]
    rows, index = np.unique(np.concatenate(named), return_inverse=True)
    item, negative, candidate, label, next_item, slot = np.split(index, np.cumsum([len(part) for part in named[:-1]]))
    users = chunks.user_features
    if users is not None:  # -1 reads the last row: no features
        users = users.select(np.where(is_unknown, -1, np.arange(len(is_unknown)))).apply(_tensor)
    of_anchors = None
    if anchors is not None:
        slots = None if counted is None else _anchor_counters(counted, slot)
        of_anchors = _anchors(plan, windows, anchors, anchor_window, label, next_item, slots, pooled)
    return Batch(
        user=_tensor(chunks.user),
        rows=_tensor(rows),
        events=_events(chunks, item, hidden),
        cuts=cuts,
        windows=BatchWindows(_tensor(windows.chunk), _tensor(window_cut), _tail_index(chunks, plan, windows)),
        labels=_labels(chunks, plan, windows, covered, item, is_timeless),
        negatives=BatchNegatives(_tensor(negative), _tensor(negative_log_weight)),
        impressions=_impressions(
            chunks, plan, windows, covered, impression, candidate.reshape(impression.shape), is_timeless, is_featureless
        ),
        reconstruction=reconstruction,
        anchors=of_anchors,
        user_features=users,
        stored_summary=None if chunks.summary is None else _tensor(chunks.summary),
    )


def _draw_boundaries(plan: CutPlan, rng: np.random.Generator, windows: ChunkWindows, num_chunks: int) -> Int:
    """int64 [NW]: the window at whose boundary each window's summary is cut, the same window or an earlier one."""
    num_windows = len(windows.chunk)
    extra = np.ceil(rng.exponential(max(plan.staleness_events, 1e-9), num_windows) / plan.label_spacing)
    is_stale = rng.random(num_windows) < plan.staleness_share
    row = np.arange(num_windows)
    if plan.mixing is Mixing.separable:
        return row - np.minimum(windows.index, np.where(is_stale, extra, 0).astype(np.int64))
    # A cut costs a pass over all events before it, so a chunk has few. Each window reads the newest one it may read.
    per_chunk = np.bincount(windows.chunk, minlength=num_chunks)
    picks = (rng.random((num_chunks, plan.num_cuts)) * per_chunk[:, None]).astype(np.int64)
    first = np.cumsum(per_chunk) - per_chunk
    is_cut = windows.index == 0
    is_cut[(first[:, None] + picks)[per_chunk > 0].ravel()] = True
    return np.maximum.accumulate(np.where(is_cut, row, 0))


def _place_cuts(
    chunks: Chunks, plan: CutPlan, phase: Int, windows: ChunkWindows, boundary: Int
) -> tuple[BatchCuts, Int]:
    """The cuts that kept windows read, sorted by chunk and position; and int64 [NW], the cut that each one reads.

    Args:
        windows: all of them.
        boundary: int64 [NW] of the kept windows: the window at whose boundary the summary is cut.
    """
    segment_offsets, chunk_offsets = _segments(chunks.offsets, phase, plan.label_spacing)
    used, window_cut = np.unique(boundary, return_inverse=True)
    chunk = windows.chunk[used]
    start = chunks.offsets[:-1][chunk]
    place = windows.begin[used]
    stop = start + place
    segment = np.where(place == 0, -1, chunk_offsets[:-1][chunk] + (place - phase[chunk]) // plan.label_spacing)
    return BatchCuts(*map(_tensor, (segment_offsets, chunk_offsets, segment, start, stop))), window_cut


def _no_cuts(chunks: Chunks) -> BatchCuts:
    none = np.zeros(0, np.int64)
    return BatchCuts(*map(_tensor, (np.zeros(1, np.int64), np.zeros_like(chunks.offsets), none, none, none)))


def _segments(offsets: Int, phase: Int, W: int) -> tuple[Int, Int]:
    """Packed events between boundaries: offsets of the segments, and the segments' offsets by chunk. Segments end at
    the boundaries inside (0, length), and at the chunk's length."""
    lengths = np.diff(offsets)
    num_segments = np.maximum(1, -(-(lengths - phase) // W) + 1)
    num_segments[lengths == 0] = 0
    chunk = np.repeat(np.arange(len(lengths)), num_segments)
    end = np.minimum(phase[chunk] + ranges(0, num_segments) * W, lengths[chunk]) + offsets[:-1][chunk]
    return np.concatenate([[0], end]), offsets_of(num_segments)


def _draw_reconstruction(plan: CutPlan, rng: np.random.Generator, cuts: BatchCuts) -> BatchReconstruction:
    """One cut per chunk, among those that cover events, and a stretch of the events that it covers."""
    start, stop = cuts.start.numpy(), cuts.stop.numpy()
    candidates = np.flatnonzero(stop > start) if plan.reconstruction_len else np.zeros(0, np.int64)
    # Chunks without events have no candidates, so a chunk is named by its first event.
    order = candidates[np.lexsort((rng.random(len(candidates)), start[candidates]))]
    _, first = np.unique(start[order], return_index=True)
    cut = order[first]
    length = np.minimum(stop[cut] - start[cut], plan.reconstruction_len)
    room = stop[cut] - start[cut] - length
    offset = (rng.random(len(cut)) * (room + 1)).astype(np.int64)
    return BatchReconstruction(_tensor(cut), _tensor(start[cut] + offset), _tensor(length))


def _events(chunks: Chunks, item: Int, hidden: NDArray[np.bool_] | None) -> BatchEvents:
    return BatchEvents(
        item=_tensor(item),
        action=_tensor(chunks.action),
        rating=None if chunks.rating is None else _tensor(chunks.rating),
        gap=_tensor(chunks.gap),
        clock=_tensor(chunks.clock),
        offsets=_tensor(chunks.offsets),
        hidden=None if hidden is None else _tensor(hidden),
        features=None if chunks.features is None else chunks.features.apply(_tensor),
    )


def _tail_index(chunks: Chunks, plan: CutPlan, windows: ChunkWindows) -> Tensor:
    place = (windows.end - plan.tail_len)[:, None] + np.arange(plan.tail_len)
    is_event = (place >= 0) & (place < np.diff(chunks.offsets)[windows.chunk][:, None])
    return _tensor(np.where(is_event, chunks.offsets[:-1][windows.chunk][:, None] + place, -1))


def _labels(
    chunks: Chunks, plan: CutPlan, windows: ChunkWindows, covered: Int | None, item: Int, is_timeless: NDArray[np.bool_]
) -> BatchLabels:
    """covered: from `_covered`; item: int64 [T] indices into the batch's rows; is_timeless: bool [NW]."""
    chunk = windows.chunk
    position = (windows.end - plan.label_spacing + 1)[:, None] + np.arange(plan.label_spacing)
    is_label = (position >= windows.begin[:, None]) & (position < np.diff(chunks.offsets)[chunk][:, None])
    event = np.where(is_label, chunks.offsets[:-1][chunk][:, None] + position, 0)
    is_known = _take(chunks.item, event) > 0  # an item that the model's vocabulary lacks cannot be a label
    if chunks.is_active is not None:
        is_known &= _take(chunks.is_active, event)
    # The first event that a window sees has an unknown gap, and so does a label without events before it.
    has_gap = is_label & (position > 0) & ~is_timeless[:, None]
    pooled = None
    if plan.pools_labels and (histories := chunks.histories) is not None and histories.pooled is not None:
        place = np.where(is_label, position, windows.begin[:, None]).ravel()
        window = np.repeat(np.arange(len(chunk)), plan.label_spacing)
        untimed = np.zeros_like(place), np.zeros(len(place), np.bool_)
        requests = _window_requests(histories, windows, covered, plan.tail_len, window, place, *untimed)
        pooled = histories.pooled.at(requests, plan.tail_len).reshape(*position.shape, len(Pooled), -1)
    return BatchLabels(
        item=_tensor(np.where(is_label & is_known, _take(item, event), -1)),
        gap=_tensor(np.where(has_gap, _take(chunks.gap, event), 0)),
        pooled=None if pooled is None else _tensor(pooled),
        weight=None
        if chunks.weight is None
        else _tensor(np.where(is_label, _take(chunks.weight, event), np.float32(0))),
    )


def _impressions_by_window(keep: Int, impression_window: Int, num_windows: int) -> Int:
    """int64 [NW, I]: the impressions of each kept window, padded with -1 to the window with the most."""
    kept_row = np.full(num_windows, -1)
    kept_row[keep] = np.arange(len(keep))
    row = kept_row[impression_window]
    impression = np.flatnonzero(row >= 0)
    count = np.bincount(row[impression], minlength=len(keep))
    by_window = np.full((len(keep), count.max(initial=0)), -1)
    by_window[row[impression], ranges(0, count)] = impression
    return by_window


def _impressions(
    chunks: Chunks,
    plan: CutPlan,
    windows: ChunkWindows,
    covered: Int | None,
    impression: Int,
    item: Int,
    is_timeless: NDArray[np.bool_],
    is_featureless: NDArray[np.bool_],
) -> BatchImpressions:
    """covered: from `_covered`; impression: int64 [NW, I], -1 pads; item: int64 [NW, I] indices into the batch's rows;
    is_timeless and is_featureless: bool [NW]."""
    shown, is_shown = chunks.impressions, impression >= 0
    position = shown.position[impression] - windows.end[:, None] + plan.label_spacing - 1
    codes = inputs = None
    if (histories := chunks.histories) is not None:
        window, own = np.nonzero(is_shown)[0], impression[is_shown]
        requests = _window_requests(
            histories,
            windows,
            covered,
            plan.tail_len,
            window,
            shown.position[own],
            shown.time[own],
            ~is_timeless[window],
        )
        if histories.counters is not None:
            codes = _scattered(is_shown, histories.counters.of_items(requests, shown.item[own]))
        if histories.pooled is not None and shown.measured is not None:
            cosines = histories.pooled.of_items(requests, plan.tail_len, shown.item[own])
            inputs = _scattered(is_shown, np.concatenate([cosines, shown.measured[own]], 1))
    described = np.where(is_featureless[:, None], -1, impression)  # -1 reads the last row: no features
    return BatchImpressions(
        item=_tensor(item),
        position=_tensor(np.where(is_shown, position, 0)),
        gap=_tensor(np.where(is_shown & ~is_timeless[:, None], shown.gap[impression], 0)),
        label=_tensor(np.where(is_shown[..., None], shown.label[impression], np.float32(0))),
        mask=_tensor(shown.mask[impression] & is_shown[..., None]),
        codes=codes,
        inputs=inputs,
        features=None if shown.features is None else shown.features.select(described).apply(_tensor),
        examined=None if shown.examined is None else _tensor(shown.examined[impression]),
    )


def _scattered(is_shown: NDArray[np.bool_], values: NDArray[np.generic]) -> Tensor:
    """[NW, I, C] with rows [N, C] of values where bool [NW, I] is True, and 0 elsewhere."""
    out = np.zeros((*is_shown.shape, values.shape[1]), values.dtype)
    out[is_shown] = values
    return _tensor(out)


def _covered(chunks: Chunks, plan: CutPlan, windows: ChunkWindows, cuts: BatchCuts, window_cut: Int) -> Int | None:
    """int64 [NW]: events of its history that each window's record counts; None if requests count all events before them
    (or without `Chunks.histories`). window_cut: int64 [NW] the cut that each window reads."""
    histories, chunk = chunks.histories, windows.chunk
    if histories is None or plan.exact_counters:
        return None
    if histories.covered is not None:
        return histories.covered[chunk]
    stop = cuts.stop.numpy()[window_cut] - chunks.offsets[:-1][chunk]
    covered: Int = histories.start[chunk] + stop
    return covered


def _anchor_counters(counters: UserCounters, slot: Int) -> BatchCounters:
    """counters: as of the anchors; slot: int64 [E] indices into the batch's rows of the counted items."""
    item, codes = replace(counters.codes, key=slot.astype(np.int32), codes=counters.of_counted_items()).padded()
    if item.shape[1] == 0:  # no anchor has a counted item; tensors still need a slot
        item = np.full((len(item), 1), -1)
        codes = np.zeros((len(item), 1, codes.shape[2]), np.uint8)
    return BatchCounters(_tensor(item), _tensor(codes), _tensor(counters.num_events))


def _anchors(
    plan: CutPlan,
    windows: ChunkWindows,
    anchors: ChunkAnchors,
    window: Int,
    label: Int,
    next_item: Int,
    counters: BatchCounters | None,
    pooled: Tensor | None,
) -> BatchAnchors:
    """window: int64 [NA] of the kept windows; label: int64 [NA * P] and next_item: int64 [NA] indices into the batch's
    rows."""
    assert plan.anchors is not None
    return BatchAnchors(
        window=_tensor(window),
        position=_tensor(anchors.position - windows.end[window] + plan.label_spacing - 1),
        gap=_tensor(anchors.gap),
        item=_tensor(np.where(anchors.item > 0, label.reshape(anchors.item.shape), -1)),
        next_item=_tensor(np.where(anchors.next_item > 0, next_item, -1)),
        time=_tensor(anchors.time),
        counters=counters,
        pooled=pooled,
        mean_labels=plan.anchors.mean_labels,
        weight=None if anchors.weight is None else _tensor(anchors.weight),
        next_weight=None if anchors.next_weight is None else _tensor(anchors.next_weight),
    )


def _take(values: NDArray[Any], index: Int) -> NDArray[Any]:
    return values[index] if len(values) else np.zeros(index.shape, values.dtype)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    # Views of the log are read-only, which torch does not accept. Those few are copied.
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
