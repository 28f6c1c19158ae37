"""Windows: the label positions of chunks, divided into runs that share one summary and one tail.

A chunk's label positions p = 0..P-1 (p events of the chunk seen) are divided into windows [b, e] of at most W of them.
Letters: B chunks, NW windows, W positions per window, n requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.examples.chunks import ChunkCounters, Chunks
from vista.examples.history_counters import CounterRequests
from vista.log.histories import ranges


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


def divide_chunks(chunks: Chunks, label_spacing: int, phase: Int, *, cut_last: bool) -> ChunkWindows:
    """All windows. They begin at 0, phase, phase + W, … after a chunk's lead, and end before the next one.

    The last one ends at the chunk's last position if `cut_last`. Otherwise it ends where it would if the chunk were
    longer, so its tail begins as far before its boundary as the tails of other windows.
    """
    W, lead = label_spacing, chunks.num_context
    # A position after the last event has no next item, but impressions may lie there.
    num_positions = np.diff(chunks.offsets) - lead + (1 if len(chunks.impressions.chunk) else 0)
    num_windows = np.where(num_positions > 0, 1 + np.maximum(0, -(-(num_positions - phase) // W)), 0)
    chunk = np.repeat(np.arange(len(phase)), num_windows)
    index = ranges(0, num_windows)
    begin = np.where(index == 0, 0, phase[chunk] + (index - 1) * W)
    end = np.where(index == 0, phase[chunk] - 1, begin + W - 1)
    if cut_last:
        end = np.minimum(end, num_positions[chunk] - 1)
    return ChunkWindows(chunk, index, begin + lead[chunk], end + lead[chunk])


def windows_at(chunks: Chunks, label_spacing: int, phase: Int, windows: ChunkWindows, owner: Int, position: Int) -> Int:
    """int64 [N]: the window, of all windows, that holds each of N positions int64 [N] of the chunks `owner`."""
    second = (chunks.num_context + phase)[owner]  # where the chunk's second window begins
    index = np.where(position < second, 0, 1 + (position - second) // label_spacing)
    return np.searchsorted(windows.chunk, owner) + index


def window_requests(
    counters: ChunkCounters,
    windows: ChunkWindows,
    covered: Int | None,
    tail_len: int,
    window: Int,
    position: Int,
    time: Int,
    is_timed: NDArray[np.bool_],
) -> CounterRequests:
    """n requests for counters at positions of windows.

    Args:
        counters: of the chunks.
        windows: NW windows.
        covered: int64 [NW] events of its history that each window's record counts; None if requests count all events
            before them.
        tail_len: events of a window's tail.
        window: int64 [n].
        position: int64 [n] events of the chunk before the request.
        time: int64 [n] ms.
        is_timed: bool [n]: False where the scorer would not get the time of the request.
    """
    chunk = windows.chunk[window]
    start = counters.start[chunk]
    seen = start + position
    tail_start = start + np.maximum(windows.end[window] - tail_len, 0)
    return CounterRequests(
        counters.history[chunk], seen if covered is None else covered[window], tail_start, seen, time, is_timed
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


def add_anchored(keep: Int, anchor_window: Int, impression_window: Int, *, keeps_others: bool) -> Int:
    """Sorted indices of the kept windows and of those with anchors, except windows with nothing to train.

    Args:
        keep: int64 sorted, from `draw_windows`.
        keeps_others: whether next items are trained, so that every window has something to train.
    """
    return np.union1d(keep if keeps_others else np.intersect1d(keep, impression_window), anchor_window)
