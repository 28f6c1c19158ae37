"""Training examples cut from histories: many labels from one pass over the events, and no label in its own context.

A chunk is a stretch of one user's history. Its label positions p = 0..P-1 (p events of the chunk seen, label = event
p) are divided into windows [b, e] of at most W positions. A window reads

- a summary whose cut (number of events covered) is at most b, and
- a tail, the events e-L .. e-1, of which position p sees those before p.

So neither holds the label of any position of the window. With tail_in_summary=false, the cut is at most e-L, where the
tail begins, so no window reads an event twice. With stored summaries, labels begin after the events that the record
covers. Such a chunk starts with a lead, events that serve as context only, and all its windows read the one record.
Letters: B chunks, T packed events, N impressions, NC cuts, NW windows, W positions per window, L tail length, I
impressions per window.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int, offsets_of
from vista.config.choices import Mixing
from vista.counters.counter_table import UserCounters
from vista.examples.anchors import ChunkAnchors, draw_anchors
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
    BatchUsers,
    BatchWindows,
)
from vista.examples.chunks import ChunkImpressions, Chunks
from vista.examples.cut_plan import CutPlan
from vista.examples.windows import ChunkWindows, add_anchored, divide_chunks, draw_windows, window_requests, windows_at
from vista.log.histories import ranges


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
    all_windows = divide_chunks(chunks, plan.label_spacing, phase, cut_last=plan.summary_lag == 0)
    impression_window = _windows_of(chunks.impressions, chunks, plan, phase, all_windows)
    keep = draw_windows(plan.windows_per_chunk, rng, all_windows, impression_window)
    anchors, anchor_window = None, np.zeros(0, np.int64)
    if plan.anchors is not None:
        anchors = draw_anchors(chunks, plan.anchors, rng.spawn(1)[0])
        anchor_window = _windows_of(anchors, chunks, plan, phase, all_windows)
        keep = add_anchored(keep, anchor_window, impression_window, keeps_others=plan.anchors.keeps_other_windows)
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
    covered, counted = _covered(chunks, plan, windows, cuts, window_cut), None
    anchor_window = np.searchsorted(keep, anchor_window)
    if anchors is not None and chunks.counters is not None:
        requests = window_requests(
            chunks.counters,
            windows,
            covered,
            plan.tail_len,
            anchor_window,
            anchors.position,
            anchors.time,
            anchors.is_timed,
        )
        counted = chunks.counters.histories.at(requests)
    named = [
        chunks.item,
        negatives,
        impressed.ravel(),
        *asked,
        np.zeros(0, np.int64) if counted is None else counted.codes.key,
    ]
    rows, index = np.unique(np.concatenate(named), return_inverse=True)
    item, negative, candidate, label, next_item, slot = np.split(index, np.cumsum([len(part) for part in named[:-1]]))
    of_anchors = None
    if anchors is not None:
        slots = None if counted is None else _anchor_counters(counted, slot)
        of_anchors = _anchors(plan, windows, anchors, anchor_window, label, next_item, slots)
    return Batch(
        user=_tensor(chunks.user),
        rows=_tensor(rows),
        events=_events(chunks, item, hidden),
        cuts=cuts,
        windows=BatchWindows(_tensor(windows.chunk), _tensor(window_cut), _tail_index(chunks, plan, windows)),
        labels=_labels(chunks, plan, windows, item, is_timeless),
        negatives=BatchNegatives(_tensor(negative), _tensor(negative_log_weight)),
        impressions=_impressions(
            chunks,
            plan,
            windows,
            covered,
            impression,
            candidate.reshape(impression.shape),
            is_timeless,
            is_featureless,
        ),
        reconstruction=reconstruction,
        anchors=of_anchors,
        user_features=_user_features(chunks, is_unknown),
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
        boundary: int64 [NW] of the kept windows: the window at whose boundary, or `cut_distance` before it, the summary
            is cut.
    """
    W, distance = plan.label_spacing, plan.cut_distance
    first = (phase - 1 - distance) % W + 1  # the first cut after each chunk's first event
    segment_offsets, chunk_offsets = _segments(chunks.offsets, first, W)
    used, window_cut = np.unique(boundary, return_inverse=True)
    chunk = windows.chunk[used]
    start = chunks.offsets[:-1][chunk]
    place = np.maximum(windows.begin[used] - distance, 0)
    stop = start + np.minimum(place, np.diff(chunks.offsets)[chunk])
    segment = np.where(place == 0, -1, chunk_offsets[:-1][chunk] + (place - first[chunk]) // W)
    return BatchCuts(*map(_tensor, (segment_offsets, chunk_offsets, segment, start, stop))), window_cut


def _no_cuts(chunks: Chunks) -> BatchCuts:
    none = np.zeros(0, np.int64)
    return BatchCuts(*map(_tensor, (np.zeros(1, np.int64), np.zeros_like(chunks.offsets), none, none, none)))


def _segments(offsets: Int, phase: Int, W: int) -> tuple[Int, Int]:
    """Packed events between boundaries: offsets of the segments, and the segments' offsets by chunk.

    Segments end at the boundaries inside (0, length), and at the chunk's length.
    """
    lengths = np.diff(offsets)
    num_segments = np.maximum(1, -(-(lengths - phase) // W) + 1)
    num_segments[lengths == 0] = 0
    chunk = np.repeat(np.arange(len(lengths)), num_segments)
    end = np.minimum(phase[chunk] + ranges(0, num_segments) * W, lengths[chunk]) + offsets[:-1][chunk]
    return np.concatenate([[0], end]), offsets_of(num_segments)


def _draw_reconstruction(plan: CutPlan, rng: np.random.Generator, cuts: BatchCuts) -> BatchReconstruction:
    """One cut per chunk, among those that cover events, and a stretch of the events that it covers."""
    start, stop = cuts.start.numpy(), cuts.stop.numpy()
    candidates = np.flatnonzero(stop > start)
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
        entry=None if chunks.entry is None else _tensor(chunks.entry),
        dense=None if chunks.dense is None else _tensor(chunks.dense),
    )


def _tail_index(chunks: Chunks, plan: CutPlan, windows: ChunkWindows) -> Tensor:
    place = (windows.end - plan.tail_len)[:, None] + np.arange(plan.tail_len)
    is_event = (place >= 0) & (place < np.diff(chunks.offsets)[windows.chunk][:, None])
    return _tensor(np.where(is_event, chunks.offsets[:-1][windows.chunk][:, None] + place, -1))


def _labels(
    chunks: Chunks, plan: CutPlan, windows: ChunkWindows, item: Int, is_timeless: NDArray[np.bool_]
) -> BatchLabels:
    """item: int64 [T] indices into the batch's rows; is_timeless: bool [NW]."""
    chunk = windows.chunk
    position = (windows.end - plan.label_spacing + 1)[:, None] + np.arange(plan.label_spacing)
    is_label = (position >= windows.begin[:, None]) & (position < np.diff(chunks.offsets)[chunk][:, None])
    event = np.where(is_label, chunks.offsets[:-1][chunk][:, None] + position, 0)
    is_known = _take(chunks.item, event) > 0  # an item that the model's vocabulary lacks cannot be a label
    # The first event that a window sees has an unknown gap, and so does a label without events before it.
    has_gap = is_label & (position > 0) & ~is_timeless[:, None]
    return BatchLabels(
        item=_tensor(np.where(is_label & is_known, _take(item, event), -1)),
        gap=_tensor(np.where(has_gap, _take(chunks.gap, event), 0)),
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
    codes = None
    if (counters := chunks.counters) is not None:
        window, own = np.nonzero(is_shown)[0], impression[is_shown]
        requests = window_requests(
            counters,
            windows,
            covered,
            plan.tail_len,
            window,
            shown.position[own],
            shown.time[own],
            ~is_timeless[window],
        )
        found = counters.histories.of_items(requests, shown.item[own])
        codes = np.zeros((*impression.shape, found.shape[1]), np.uint8)
        codes[is_shown] = found
    described = np.where(is_featureless[:, None], -1, impression)  # -1 reads the last row: no features
    entry, dense = (None if part is None else _tensor(part[described]) for part in (shown.entry, shown.dense))
    return BatchImpressions(
        item=_tensor(item),
        position=_tensor(np.where(is_shown, position, 0)),
        gap=_tensor(np.where(is_shown & ~is_timeless[:, None], shown.gap[impression], 0)),
        label=_tensor(np.where(is_shown[..., None], shown.label[impression], np.float32(0))),
        mask=_tensor(shown.mask[impression] & is_shown[..., None]),
        codes=None if codes is None else _tensor(codes),
        entry=entry,
        dense=dense,
    )


def _user_features(chunks: Chunks, is_unknown: NDArray[np.bool_]) -> BatchUsers | None:
    """is_unknown: bool [B] chunks without features of their users."""
    if chunks.user_entry is None or chunks.user_dense is None:
        return None
    row = np.where(is_unknown, -1, np.arange(len(is_unknown)))  # -1 reads the last row: no features
    return BatchUsers(_tensor(chunks.user_entry[row]), _tensor(chunks.user_dense[row]))


def _covered(chunks: Chunks, plan: CutPlan, windows: ChunkWindows, cuts: BatchCuts, window_cut: Int) -> Int | None:
    """int64 [NW]: events of its history that each window's record counts; None if requests count all events before them
    (or without counters). window_cut: int64 [NW] the cut that each window reads."""
    counters, chunk = chunks.counters, windows.chunk
    if counters is None or plan.exact_counters:
        return None
    if counters.covered is not None:
        return counters.covered[chunk]
    stop = cuts.stop.numpy()[window_cut] - chunks.offsets[:-1][chunk]
    # A record also counts the events that its summary leaves to the tail, but here none after the window's boundary.
    covered: Int = counters.start[chunk] + np.minimum(stop + plan.summary_lag, windows.begin)
    return covered


def _anchor_counters(counters: UserCounters, slot: Int) -> BatchCounters:
    """counters: as of the anchors; slot: int64 [E] indices into the batch's rows of the counted items."""
    item, codes = replace(counters.codes, key=slot.astype(np.int32), codes=counters.of_counted_items()).padded()
    if item.shape[1] == 0:  # no anchor has a counted item; tensors still need a slot
        item = np.full((len(item), 1), -1)
        codes = np.zeros((len(item), 1, codes.shape[2]), np.uint8)
    return BatchCounters(_tensor(item), _tensor(codes), _tensor(counters.num_events))


def _windows_of(
    shown: ChunkImpressions | ChunkAnchors, chunks: Chunks, plan: CutPlan, phase: Int, windows: ChunkWindows
) -> Int:
    """int64 [N]: the window, of all windows, that each impression or anchor lies in."""
    return windows_at(chunks, plan.label_spacing, phase, windows, shown.chunk, shown.position)


def _anchors(
    plan: CutPlan,
    windows: ChunkWindows,
    anchors: ChunkAnchors,
    window: Int,
    label: Int,
    next_item: Int,
    counters: BatchCounters | None,
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
        counters=counters,
        mean_labels=plan.anchors.mean_labels,
    )


def _take(values: Int, index: Int) -> Int:
    return values[index] if len(values) else np.zeros_like(index)


def _tensor(values: NDArray[np.generic]) -> Tensor:
    # Views of the log are read-only, which torch does not accept. Those few are copied.
    return torch.from_numpy(np.require(values, requirements=["C", "W"]))
