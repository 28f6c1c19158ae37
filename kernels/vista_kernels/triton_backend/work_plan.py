"""Shares the tokens of a packed batch out to the programs of a grid, on the host.

An *item* is what one program does for one head: either a run of whole segments, or one chunk of a long segment. So many
short users share a program, and one long user still fills the device. All kernels walk an item in the same way::

    for segment in [first_segment, last_segment):
        tokens max(start, first_token) to min(start + length, last_token)

where whole segments have no token limits. A chunk has a *slot* of the workspace for its partial state (-1: none), and
another kernel adds the partial states of a segment in order. So no result depends on which program ends first: on one
kind of device, equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vista_kernels.segments import IntArray, Segments
from vista_kernels.triton_backend.item_sizes import ITEM_SIZES, ItemSizes

SEGMENT_COST = 32
"""Reading or writing the state of a segment costs its program as much as this many tokens."""
NO_LIMIT = 2**62


@dataclass(frozen=True)
class WorkPlan:
    """The items of a batch, and which partial states make up which segment."""

    segments: Segments
    items: IntArray
    """[I, 5] first segment, last segment (excluded), first token, last token (excluded), slot or -1."""
    sums: IntArray
    """[L, 3] of each segment in chunks: the segment, its first slot, its number of slots."""
    num_slots: int

    @cached_property
    def mean_length(self) -> float:
        """Mean number of tokens of the segments that have any."""
        lengths = self.segments.lengths
        filled = int(np.count_nonzero(lengths))
        return float(lengths.sum()) / filled if filled else 0.0

    @property
    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """What kernels read: starts, lengths, items and sums."""
        return self.segments.starts, self.segments.lengths, self.items, self.sums


def plan_work(segments: Segments, *, num_heads: int, num_processors: int, sizes: ItemSizes = ITEM_SIZES) -> WorkPlan:
    """Cut segments [B] into items."""
    costs = segments.lengths + SEGMENT_COST
    size = int(costs.sum()) * num_heads // (sizes.programs_per_processor * num_processors)
    size = max(sizes.min_item, min(size, sizes.max_item))
    chunk = max(size, sizes.min_chunk)
    long = segments.lengths > chunk + chunk // 2
    chunks, sums = _chunks(segments, np.flatnonzero(long), chunk, sizes.alignment)
    items = np.concatenate([chunks, _runs(costs, np.flatnonzero(~long), size)])
    return WorkPlan(segments, items, sums, len(chunks))


def _cut_evenly(lengths: IntArray, size: int, alignment: int) -> tuple[IntArray, IntArray]:
    """Return each segment's number of chunks of about `size` tokens, and their size. The last one may be shorter."""
    counts = np.maximum(-(-lengths // size), 1)
    sizes = (lengths + counts * alignment - 1) // (counts * alignment) * alignment
    return -(-lengths // np.maximum(sizes, 1)), sizes


def _chunks(segments: Segments, long: IntArray, size: int, alignment: int) -> tuple[IntArray, IntArray]:
    """Return the items and the sums of the long segments."""
    starts, lengths = segments.starts, segments.lengths
    counts, sizes = _cut_evenly(lengths[long], size, alignment)
    first_slots = np.cumsum(counts) - counts
    slots = np.arange(counts.sum())
    segment = np.repeat(long, counts)
    first = starts[segment] + (slots - np.repeat(first_slots, counts)) * np.repeat(sizes, counts)
    last = np.minimum(first + np.repeat(sizes, counts), starts[segment] + lengths[segment])
    return np.stack([segment, segment + 1, first, last, slots], 1), np.stack([long, first_slots, counts], 1)


def _runs(costs: IntArray, segments: IntArray, size: int) -> IntArray:
    """Return the items of the other segments: a new one wherever `size` is full or a long segment lies between."""
    ends = np.cumsum(costs[segments])
    share = (ends - costs[segments]) // size
    is_first = np.ones(len(segments), dtype=bool)
    is_first[1:] = (share[1:] != share[:-1]) | (segments[1:] != segments[:-1] + 1)
    first = segments[is_first]
    last = segments[np.append(is_first[1:], True)] + 1 if len(segments) else first
    limits = np.broadcast_to(np.array([0, NO_LIMIT, -1]), (len(first), 3))
    return np.concatenate([first[:, None], last[:, None], limits], 1)
