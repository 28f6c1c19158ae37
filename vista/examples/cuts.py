"""Training examples cut from histories: many labels from one pass over the events, and no label in its own context.

A chunk is a stretch of one user's history. Its label positions p = 0..P-1 (p events of the chunk seen, label = event
p) are split into windows [b, e] of at most W positions. A window reads

- a summary whose cut (number of events seen) is at most b, and
- a tail: the events e-L .. e-1, of which position p sees those before p.

So neither holds the label of any position of the window. Where a store gives the summaries, labels begin after what its
record has seen, and a chunk is led by the events that tails need; its windows all read the one record. Letters: B
chunks, T packed events, NS segments between cuts, NC cuts, NW windows, W positions a window, L tail length, I
impressions a window, R distinct item rows, S seeds, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config.choices import Decay, Mixing
from vista.log.histories import ranges

Int = NDArray[np.int64]
TIMELESS_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Chunks:
    """Packed stretches of histories, as the cutter reads them.

    item: int64 [T] model item rows, 0 is the unknown item; clock: int64 [T] what decay is measured by; gap: int64 [T]
    buckets; offsets: int64 [B+1]; impression_*: sorted by chunk and position, `impression_position` in events of the
    chunk seen. Where a store gives the summaries: summary: float32 [B, S, M]; lead: int64 [B] events at the start of
    each chunk that are context alone.
    """

    user: Int
    item: Int
    action: Int
    rating: NDArray[np.float32] | None
    gap: Int
    clock: Int
    offsets: Int
    impression_chunk: Int
    impression_position: Int
    impression_item: Int
    impression_gap: Int
    impression_label: NDArray[np.float32]
    impression_mask: NDArray[np.bool_]
    lead: Int | None = None
    summary: NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One training batch. All item fields index `rows`."""

    user: Tensor
    """int64 [B] user rows of the log, for error messages."""
    rows: Tensor
    """int64 [R] distinct model item rows of the batch, sorted."""
    item: Tensor
    """int64 [T]."""
    action: Tensor
    """int64 [T]."""
    rating: Tensor | None
    """float32 [T]."""
    gap: Tensor
    """int64 [T]."""
    clock: Tensor
    """int64 [T]."""
    offsets: Tensor
    """int64 [B+1]."""
    segment_offsets: Tensor
    """int64 [NS+1]: the packed events between consecutive cuts."""
    segment_user_offsets: Tensor
    """int64 [B+1], into segments."""
    cut_segment: Tensor
    """int64 [NC]: segment that ends at the cut; -1 is the cut before the first event."""
    cut_start: Tensor
    """int64 [NC]: packed index of the cut's first event."""
    cut_stop: Tensor
    """int64 [NC]: packed index after the cut's last event."""
    window_cut: Tensor
    """int64 [NW]."""
    tail_index: Tensor
    """int64 [NW, L] packed events, oldest first, right-aligned; -1 where the chunk had not begun."""
    label: Tensor
    """int64 [NW, W] next items; -1 where a position carries no label."""
    label_gap: Tensor
    """int64 [NW, W] time from the last tail event to the label."""
    negatives: Tensor
    """int64 [J] shared negatives."""
    negative_log_weight: Tensor
    """float32 [J]: log of (times drawn / (draws * probability)), the logQ correction."""
    candidate: Tensor
    """int64 [NW, I] impressed items; 0 where there is none (its mask is empty)."""
    candidate_position: Tensor
    """int64 [NW, I] in 0..W-1."""
    candidate_gap: Tensor
    """int64 [NW, I]."""
    candidate_label: Tensor
    """float32 [NW, I, num_tasks]."""
    candidate_mask: Tensor
    """bool [NW, I, num_tasks]."""
    reconstruction_cut: Tensor
    """int64 [NR]: cuts whose summaries the decoder reads."""
    reconstruction_start: Tensor
    """int64 [NR]: packed index of the first event to reconstruct."""
    reconstruction_len: Tensor
    """int64 [NR]."""
    logit_adjustment: Tensor | None = None
    """float32 [R] added to an item's logits in training alone, as a label and as a negative (optim.logq_strength)."""
    hidden: Tensor | None = None
    """bool [T]: where training shows an event's item as the unknown one (`data.unknown_share`); None: nowhere."""
    stored_summary: Tensor | None = None
    """float32 [B, S, M] of the chunks, from a store: then `window_cut` indexes these, and there are no cuts."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}

    def to(self, device: torch.device | str) -> Batch:
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})


@dataclass(frozen=True, slots=True)
class CutPlan:
    """How chunks are cut; the fields are those of `DataConfig` and `ModelConfig` of the same names."""

    mixing: Mixing
    tail_len: int
    label_spacing: int
    windows_per_chunk: int
    num_cuts: int
    staleness_events: float
    staleness_share: float
    unknown_share: float
    reconstruction_len: int
    num_tasks: int


def decay_clock(decay: Decay, timestamp: Int) -> Int:
    """What decay is measured by: milliseconds, or the position in the packed history (only differences count)."""
    return np.arange(len(timestamp), dtype=np.int64) if decay is Decay.position else timestamp


def cut_batch(
    chunks: Chunks, plan: CutPlan, rng: np.random.Generator, negatives: Int, negative_log_weight: NDArray[np.float32]
) -> Batch:
    """Cut packed chunks into one batch; the same generator state gives the same batch.

    Args:
        chunks: the packed histories and their impressions.
        plan: sizes and shares.
        rng: draws the phase of the cuts, stale windows, what is reconstructed, and what is shown as unknown.
        negatives: int64 [J] model item rows, shared by the batch; negative_log_weight: float32 [J].
    """
    W, L = plan.label_spacing, plan.tail_len
    lengths = np.diff(chunks.offsets)
    num_chunks = len(lengths)
    lead = np.zeros(num_chunks, np.int64) if chunks.lead is None else chunks.lead
    # A position after the last event carries no next item, but impressions may lie there.
    num_positions = lengths - lead + (1 if len(chunks.impression_chunk) else 0)

    # Boundaries of a chunk, after its lead: 0, phase, phase + W, …; a window covers the positions up to the next.
    phase = rng.integers(1, W + 1, num_chunks)
    num_windows = np.where(num_positions > 0, 1 + np.maximum(0, -(-(num_positions - phase) // W)), 0)
    window_offsets = np.concatenate([[0], np.cumsum(num_windows)])
    chunk = np.repeat(np.arange(num_chunks), num_windows)
    index = ranges(0, num_windows)
    begin = np.where(index == 0, 0, phase[chunk] + (index - 1) * W)
    end = np.minimum(np.where(index == 0, phase[chunk] - 1, begin + W - 1), num_positions[chunk] - 1)
    begin, end = begin + lead[chunk], end + lead[chunk]

    impression_window = _windows_of_impressions(chunks, lead + phase, window_offsets, W)
    keep = _drawn_windows(plan, rng, chunk, num_windows, impression_window)
    if chunks.summary is None:
        source = _summary_boundary(plan, rng, chunk, index, num_windows)
        segments = _segments(chunks.offsets, phase, W)
        # Cuts that some kept window reads, in order of chunk and boundary.
        boundary_key = window_offsets[:-1][chunk] + source
        used, window_cut = np.unique(boundary_key[keep], return_inverse=True)
        cut_chunk, cut_index = chunk[used], index[used]
        cut_segment = np.where(cut_index == 0, -1, segments["segment_user_offsets"][:-1][cut_chunk] + cut_index - 1)
        cut_start = chunks.offsets[:-1][cut_chunk]
        cut_stop = cut_start + np.minimum(begin[used], lengths[cut_chunk])
    else:
        segments = {"segment_offsets": np.zeros(1, np.int64), "segment_user_offsets": chunks.offsets * 0}
        window_cut = chunk[keep]
        cut_chunk = cut_segment = cut_start = cut_stop = np.zeros(0, np.int64)

    chunk, begin, end = chunk[keep], begin[keep], end[keep]
    start = chunks.offsets[:-1][chunk]
    tail = (end - L)[:, None] + np.arange(L)
    tail_index = np.where(tail >= 0, start[:, None] + tail, -1)
    position = (end - W + 1)[:, None] + np.arange(W)
    is_label = (position >= begin[:, None]) & (position < lengths[chunk][:, None])
    label_index = np.where(is_label, start[:, None] + position, 0)
    is_known = _take(chunks.item, label_index) > 0  # an item that the model's vocabulary lacks is no answer
    # The first event that a window sees has an unknown gap; so has a label with nothing before it.
    label_gap = np.where(is_label & (position > 0), _take(chunks.gap, label_index), 0)

    candidates = _place_impressions(chunks, plan, impression_window, keep, end)
    # Requests without a clock exist too: a share of the windows does not know the time of its request.
    timeless = rng.random(len(keep)) < TIMELESS_SHARE
    label_gap[timeless] = 0
    candidates["gap"][timeless] = 0
    reconstruction = _draw_reconstruction(plan, rng, cut_chunk, cut_start, cut_stop)

    items = np.concatenate([chunks.item, negatives, candidates["item"].ravel()])
    rows, inverse = np.unique(items, return_inverse=True)
    T, J = len(chunks.item), len(negatives)
    item = inverse[:T]
    tensors: dict[str, NDArray[np.generic]] = {
        "user": chunks.user,
        "rows": rows,
        "item": item,
        "action": chunks.action,
        "gap": chunks.gap,
        "clock": chunks.clock,
        "offsets": chunks.offsets,
        **segments,
        "cut_segment": cut_segment,
        "cut_start": cut_start,
        "cut_stop": cut_stop,
        "window_cut": window_cut,
        "tail_index": tail_index,
        "label": np.where(is_label & is_known, _take(item, label_index), -1),
        "label_gap": label_gap,
        "negatives": inverse[T : T + J],
        "negative_log_weight": negative_log_weight,
        "candidate": inverse[T + J :].reshape(candidates["item"].shape),
        "candidate_position": candidates["position"],
        "candidate_gap": candidates["gap"],
        "candidate_label": candidates["label"],
        "candidate_mask": candidates["mask"],
        **reconstruction,
    }
    rating = None if chunks.rating is None else torch.from_numpy(chunks.rating)
    stored = None if chunks.summary is None else torch.from_numpy(chunks.summary)
    # Views of the log cannot be written, which torch objects to: those few are copied.
    writable = {name: np.require(values, requirements=["C", "W"]) for name, values in tensors.items()}
    made = {name: torch.from_numpy(values) for name, values in writable.items()}
    hidden = torch.from_numpy(rng.random(T) < plan.unknown_share) if plan.unknown_share > 0 else None
    return Batch(rating=rating, hidden=hidden, stored_summary=stored, **made)


def _take(values: Int, index: Int) -> Int:
    return values[index] if len(values) else np.zeros_like(index)


def _segments(offsets: Int, phase: Int, W: int) -> dict[str, Int]:
    """Packed events between the boundaries of chunks: they end at those inside (0, length), and at the length."""
    lengths = np.diff(offsets)
    num_segments = np.maximum(1, -(-(lengths - phase) // W) + 1)
    num_segments[lengths == 0] = 0
    chunk = np.repeat(np.arange(len(lengths)), num_segments)
    end = np.minimum(phase[chunk] + ranges(0, num_segments) * W, lengths[chunk]) + offsets[:-1][chunk]
    return {
        "segment_offsets": np.concatenate([[0], end]),
        "segment_user_offsets": np.concatenate([[0], np.cumsum(num_segments)]),
    }


def _windows_of_impressions(chunks: Chunks, second: Int, window_offsets: Int, W: int) -> Int:
    """int64 [number of impressions]: the window (before any is left out) that an impression's position lies in.

    second: int64 [B], the position at which each chunk's second window begins.
    """
    owner = chunks.impression_chunk
    position = chunks.impression_position
    inside = np.where(position < second[owner], 0, 1 + (position - second[owner]) // W)
    return window_offsets[:-1][owner] + inside


def _drawn_windows(
    plan: CutPlan, rng: np.random.Generator, chunk: Int, num_windows: Int, impression_window: Int
) -> Int:
    """Sorted indices of the windows of this pass: all, or `windows_per_chunk` drawn, those with impressions first."""
    if plan.windows_per_chunk == 0 or len(chunk) == 0 or num_windows.max() <= plan.windows_per_chunk:
        return np.arange(len(chunk))
    priority = rng.random(len(chunk))
    priority[impression_window] -= 1.0
    order = np.lexsort((priority, chunk))
    rank = ranges(0, num_windows)
    return np.sort(order[rank < plan.windows_per_chunk])


def _summary_boundary(plan: CutPlan, rng: np.random.Generator, chunk: Int, index: Int, num_windows: Int) -> Int:
    """int64 [windows]: the boundary whose summary a window reads: its own or, stale, an earlier one."""
    extra = np.ceil(rng.exponential(max(plan.staleness_events, 1e-9), len(chunk)) / plan.label_spacing)
    stale = rng.random(len(chunk)) < plan.staleness_share
    source = np.maximum(index - np.where(stale, extra, 0).astype(np.int64), 0)
    if plan.mixing is Mixing.bidirectional:
        # A cut costs its whole prefix, so a chunk has few: a window reads the newest of them that is not after it.
        drawn = np.zeros(len(chunk), bool)
        picks = (rng.random((len(num_windows), plan.num_cuts)) * num_windows[:, None]).astype(np.int64)
        starts = np.cumsum(num_windows) - num_windows
        nonempty = num_windows > 0
        drawn[(starts[:, None] + picks)[nonempty].ravel()] = True
        newest = np.maximum.accumulate(np.where(drawn | (index == 0), np.arange(len(chunk)), 0))
        source = newest - starts[chunk]
    return source


def _place_impressions(
    chunks: Chunks, plan: CutPlan, impression_window: Int, keep: Int, end: Int
) -> dict[str, NDArray[np.generic]]:
    """Impressions of the kept windows, padded to the fullest window."""
    NW = len(keep)
    slot = np.searchsorted(keep, impression_window)
    kept = (slot < NW) & (keep[np.minimum(slot, NW - 1)] == impression_window) if NW else np.zeros(len(slot), bool)
    window = slot[kept]
    counts = np.bincount(window, minlength=NW)
    column = ranges(0, counts)
    width = int(counts.max()) if NW else 0
    item = np.zeros((NW, width), np.int64)
    position = np.zeros((NW, width), np.int64)
    gap = np.zeros((NW, width), np.int64)
    label = np.zeros((NW, width, plan.num_tasks), np.float32)
    mask = np.zeros((NW, width, plan.num_tasks), np.bool_)
    item[window, column] = chunks.impression_item[kept]
    position[window, column] = chunks.impression_position[kept] - end[window] + plan.label_spacing - 1
    gap[window, column] = chunks.impression_gap[kept]
    label[window, column] = chunks.impression_label[kept]
    mask[window, column] = chunks.impression_mask[kept]
    return {"item": item, "position": position, "gap": gap, "label": label, "mask": mask}


def _draw_reconstruction(
    plan: CutPlan, rng: np.random.Generator, cut_chunk: Int, cut_start: Int, cut_stop: Int
) -> dict[str, NDArray[np.generic]]:
    """One cut a chunk among those with events, and a stretch of events before it."""
    candidates = np.flatnonzero(cut_stop > cut_start)
    order = candidates[np.lexsort((rng.random(len(candidates)), cut_chunk[candidates]))]
    _, first = np.unique(cut_chunk[order], return_index=True)
    cut = order[first]
    length = np.minimum(cut_stop[cut] - cut_start[cut], plan.reconstruction_len)
    room = cut_stop[cut] - cut_start[cut] - length
    start = cut_start[cut] + (rng.random(len(cut)) * (room + 1)).astype(np.int64)
    return {"reconstruction_cut": cut, "reconstruction_start": start, "reconstruction_len": length}
