"""Chunks: packed stretches of users' histories, from which training batches are cut.

Letters: B chunks, T packed events, N impressions, C columns and D dense inputs of features, S seeds, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.config.choices import Decay
from vista.examples.history_counters import HistoryCounters


@dataclass(frozen=True, slots=True)
class ChunkImpressions:
    """Labeled impressions of all chunks, sorted by chunk and position."""

    chunk: Int
    """int64 [N]."""
    position: Int
    """int64 [N] events of the chunk strictly before the impression."""
    item: Int
    """int64 [N] model item rows."""
    gap: Int
    """int64 [N] log buckets of the time since the newest event before the impression."""
    label: NDArray[np.float32]
    """float32 [N, num_tasks]."""
    mask: NDArray[np.bool_]
    """bool [N, num_tasks]: True where a task's label is known."""
    time: Int
    """int64 [N] ms."""
    entry: Int | None = None
    """int64 [N + 1, C] features of their requests; the last row is that of a request without features. None for a model
    that reads none."""
    dense: NDArray[np.float32] | None = None
    """float32 [N + 1, D], like `entry`."""


@dataclass(frozen=True, slots=True)
class ChunkTimeline:
    """The events of each chunk and, as its trail, those after it that training may see. Only anchors read it.

    The trail holds labels only: it is never part of a chunk's own events.
    """

    item: Int
    """int64 [N] model item rows; 0 is the unknown item."""
    time: Int
    """int64 [N] ms, or positions in a log without times."""
    offsets: Int
    """int64 [B+1]."""


@dataclass(frozen=True, slots=True)
class ChunkCounters:
    """The whole histories of the chunks' users, which counters cover, and where the chunks lie in them."""

    histories: HistoryCounters
    history: Int
    """int64 [B] the history of each chunk."""
    start: Int
    """int64 [B] events of the history before the chunk's first event."""
    covered: Int | None
    """int64 [B] events of the history that a stored record covers; None if records end where summaries are cut."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """Stretches of histories, end to end, oldest event first within a chunk."""

    user: Int
    """int64 [B] user rows of the log."""
    item: Int
    """int64 [T] model item rows; 0 is the unknown item."""
    action: Int
    """int64 [T]."""
    rating: NDArray[np.float32] | None
    """float32 [T]."""
    gap: Int
    """int64 [T] log buckets of the time since the event before."""
    clock: Int
    """int64 [T] from `decay_clock`."""
    offsets: Int
    """int64 [B+1]."""
    impressions: ChunkImpressions
    timeline: ChunkTimeline | None = None
    """What anchors ask about; None draws no anchors."""
    lead: Int | None = None
    """int64 [B]: with stored summaries, the first events of each chunk that serve as context only."""
    summary: NDArray[np.float32] | None = None
    """float32 [B, S, M] stored summaries; None computes them from the batch's own events."""
    counters: ChunkCounters | None = None
    """Counters of the chunks' users; None without counters."""
    entry: Int | None = None
    """int64 [T, C] features of the events, as in `BatchEvents`; None for a model that reads none."""
    dense: NDArray[np.float32] | None = None
    """float32 [T, D], like `entry`."""
    user_entry: Int | None = None
    """int64 [B + 1, C] features of the users; the last row is that of an unknown user. None for a model that reads
    none."""
    user_dense: NDArray[np.float32] | None = None
    """float32 [B + 1, D], like `user_entry`."""

    @property
    def num_context(self) -> Int:
        """int64 [B] first events of each chunk that serve as context only."""
        return np.zeros(len(self.offsets) - 1, np.int64) if self.lead is None else self.lead


def decay_clock(decay: Decay, timestamp: Int) -> Int:
    """int64 [T] that decay is measured by: milliseconds or packed positions. Only differences within a chunk count."""
    return np.arange(len(timestamp), dtype=np.int64) if decay is Decay.position else timestamp
