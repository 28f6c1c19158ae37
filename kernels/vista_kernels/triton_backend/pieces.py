"""Shares the tokens of a packed batch out to the programs of a grid, on the host.

An *item* is what one program does for one head: either a run of whole segments, or one piece of a long segment. So many
short users cost one program together, and one long user still fills the device. All kernels walk an item in one way::

    for segment in [first_segment, last_segment):
        tokens max(start, first_token) to min(start + length, last_token)

where whole segments have no token limits. A piece has a *slot* of the workspace for its partial state (-1: none), and
the partial states of a segment are added by another kernel, in order. So no result depends on which program ends first:
on one kind of device equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vista_kernels.arguments import IntArray

PROGRAMS_PER_PROCESSOR = 8
"""Programs that a batch is to be cut into, if it is large enough: they hide each other's waiting, and even out."""
MIN_ITEM, MAX_ITEM = 64, 4096
"""Bounds of the tokens of an item. Within them it is as small as fills the device."""
MIN_PIECE = 512
"""A piece of a long segment holds at least this many tokens (half as many after rounding), as each writes a state."""
ALIGNMENT = 64
"""Pieces are multiples of this, so that all their blocks but the last are full."""
SEGMENT_COST = 32
"""A segment costs its program as much as its tokens and this many more: its state is read or written."""
NO_LIMIT = 2**62


@dataclass(frozen=True)
class Plan:
    """The items of a batch, and which partial states make up which segment."""

    starts: IntArray
    lengths: IntArray
    items: IntArray
    """[I, 5] first segment, last segment (excluded), first token, last token (excluded), slot or -1."""
    sums: IntArray
    """[L, 3] of each segment in pieces: the segment, its first slot, its number of slots."""
    num_slots: int

    @cached_property
    def mean_length(self) -> float:
        """Mean tokens of the segments that have some."""
        filled = int(np.count_nonzero(self.lengths))
        return float(self.lengths.sum()) / filled if filled else 0.0

    @property
    def arrays(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """What kernels read."""
        return self.starts, self.lengths, self.items, self.sums


def plan(
    starts: IntArray, lengths: IntArray, *, num_heads: int, num_processors: int, max_item: int | None = None
) -> Plan:
    """Cut segments [B] into items of up to about `max_item` tokens (MAX_ITEM unless given).

    `starts` rise, and a segment may end before the next one starts.
    """
    costs = lengths + SEGMENT_COST
    size = int(costs.sum()) * num_heads // (PROGRAMS_PER_PROCESSOR * num_processors)
    size = max(MIN_ITEM, min(size, MAX_ITEM if max_item is None else max_item))
    piece = max(size, MIN_PIECE)
    is_long = lengths > piece + piece // 2
    pieces, sums = _pieces(starts, lengths, np.flatnonzero(is_long), piece)
    items = np.concatenate([pieces, _runs(costs, np.flatnonzero(~is_long), size)])
    return Plan(starts, lengths, items, sums, len(pieces))


def cut_evenly(lengths: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Return each segment's number of pieces of about `size` tokens, and their size; the last one may be shorter."""
    counts = np.maximum(-(-lengths // size), 1)
    sizes = (lengths + counts * ALIGNMENT - 1) // (counts * ALIGNMENT) * ALIGNMENT
    return -(-lengths // np.maximum(sizes, 1)), sizes


def _pieces(starts: IntArray, lengths: IntArray, segments: IntArray, size: int) -> tuple[IntArray, IntArray]:
    """Return the items and the sums of the long segments."""
    counts, sizes = cut_evenly(lengths[segments], size)
    first_slots = np.cumsum(counts) - counts
    slots = np.arange(counts.sum())
    segment = np.repeat(segments, counts)
    first = starts[segment] + (slots - np.repeat(first_slots, counts)) * np.repeat(sizes, counts)
    last = np.minimum(first + np.repeat(sizes, counts), starts[segment] + lengths[segment])
    return np.stack([segment, segment + 1, first, last, slots], 1), np.stack([segments, first_slots, counts], 1)


def _runs(costs: IntArray, segments: IntArray, size: int) -> IntArray:
    """Return the items of the other segments: a new one where `size` is full, or a long segment lies between."""
    ends = np.cumsum(costs[segments])
    share = (ends - costs[segments]) // size
    is_first = np.ones(len(segments), dtype=bool)
    is_first[1:] = (share[1:] != share[:-1]) | (segments[1:] != segments[:-1] + 1)
    first = segments[is_first]
    last = segments[np.append(is_first[1:], True)] + 1 if len(segments) else first
    limits = np.broadcast_to(np.array([0, NO_LIMIT, -1]), (len(first), 3))
    return np.concatenate([first[:, None], last[:, None], limits], 1)
