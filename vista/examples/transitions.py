"""Transitions: how often each item came right after another. Scores read sums over a user's newest items.

A table names the N most frequent followers of each item. If m events came right after item i, and n of them were item
j, then j has the weight

    log(1 + SCALE n / (m + SHRINKAGE))

At a request there are NUM_SUMS sums of weights for each candidate: as a follower of the newest event, and of the events
before it, weighted by RECENT_DECAY. They are inputs of the retrieval head and of the head of counted items. For an item
that is not among the followers, they are 0.

The model has the counts of the training part. A training question must not find its labels in them, so after p events
of a user, n and m are counted without this user's transitions to the p-th event (from 0) and later ones. As in serving,
the user's own past and all events of others count, so weights that training fits hold for requests. What still leaks is
which N followers the table names: they were chosen with the events that the counts leave out.

Letters: V1 model rows, N followers per item, B requests, J newest events, P transitions or pairs of items, C
candidates, K = NUM_SUMS, NA anchors, Q events that anchors read, R item rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.examples.item_statistics import NUM_RECENT, RECENT_DECAY, distinct_counts
from vista.log.event_log import EventLog
from vista.log.histories import token_groups
from vista.log.splits import EVENTS_PER_BLOCK

if TYPE_CHECKING:
    from vista.examples.batch import Batch

SCALE, SHRINKAGE = 100.0, 10.0
NUM_SUMS = 2
COMPARED_AT_ONCE = 1 << 22
"""Pairs of a transition and a follower that are compared at once (those of one history at least): about 40 MB."""


class TransitionSum(IntEnum):
    """The sums, in their order."""

    newest = 0
    earlier = 1


@dataclass(frozen=True, slots=True)
class TransitionTable:
    """The followers of all items, most frequent first. Row 0, of the unknown item, has none."""

    item: Tensor
    """int32 [V1, N] model rows; 0 pads."""
    weight: Tensor
    """float32 [V1, N]; 0 in the padding."""

    def copy_(self, other: TransitionTable) -> None:
        """Take another table of the same shape."""
        self.item.copy_(other.item)
        self.weight.copy_(other.weight)

    def check(self) -> None:
        """Check a table that was read from a file. Raises RuntimeError if it names rows that it does not have."""
        low, high = (int(bound) for bound in self.item.aminmax()) if self.item.numel() else (0, 0)
        if self.item.dtype is not torch.int32 or low < 0 or high >= len(self.item):
            raise RuntimeError(f"transitions must be rows below {len(self.item)}, as int32")


class TransitionCounts:
    """Transitions between known items in the training part of a log, with counts for the followers in the table."""

    def __init__(self, log: EventLog, item_rows: Int, counts: Int, size: int) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [num_users], visible events per user. Nothing after them is read.
            size: N.
        """
        self._log, self._item_rows, self._counts = log, item_rows, counts
        num_rows = int(item_rows.max(initial=0)) + 1
        self._item, self._count = np.zeros((num_rows, size), np.int32), np.zeros((num_rows, size), np.int32)
        blocks = self._transitions(np.arange(log.num_users), np.zeros_like(counts), EVENTS_PER_BLOCK)
        pair, times = distinct_counts(left * num_rows + right for _, left, right, _ in blocks)
        left, right = np.divmod(pair, num_rows)
        self._total = np.bincount(left, times, num_rows).astype(np.int64)
        order = np.lexsort((-times, left))  # of equal counts, the smaller row comes first
        rank = np.arange(len(order)) - np.searchsorted(left, left)
        best = rank < size
        order, place = order[best], (left[best], rank[best])
        self._item[place], self._count[place] = right[order], times[order]

    def table(self, num_rows: int) -> TransitionTable:
        """The table of `num_rows` rows that a model reads."""
        missing = num_rows - len(self._item)
        weight = _weights(torch.from_numpy(self._count), torch.from_numpy(self._total))
        return TransitionTable(*(F.pad(part, (0, 0, 0, missing)) for part in (torch.from_numpy(self._item), weight)))

    def anchor_sums(self, batch: Batch, first: Int, num_known: int) -> Tensor:
        """float32 [NA, K, R]: the sums of a batch's items for its anchors, without what their users did afterwards.

        Args:
            batch: with anchors.
            first: int64 [B] events of the user before each chunk.
            num_known: items that histories know (`ModelReads`).
        """
        recent, newest, chunk = (part.numpy() for part in anchor_events(batch, num_known))
        seen = first[chunk] + newest + 1 - batch.events.offsets.numpy()[chunk]
        count, total = map(torch.from_numpy, self._counts_as_of(batch.user.numpy()[chunk], seen, recent))
        return _sums(torch.from_numpy(self._item[recent]), _weights(count, total), batch.rows)

    def _counts_as_of(self, user: Int, seen: Int, recent: Int) -> tuple[NDArray[np.int32], Int]:
        """n [NA, J, N] and m int64 [NA, J] of the followers of items int64 [NA, J], where 0 pads.

        Args:
            user: int64 [NA] rows of the log.
            seen: int64 [NA] events of the user that each anchor may know.
        """
        count, total = self._count[recent], self._total[recent]
        num_rows, size = self._item.shape
        anchor, place = np.nonzero(recent)
        since = seen[anchor]
        users, owner = np.unique(user[anchor], return_inverse=True)
        earliest = self._counts[users]
        np.minimum.at(earliest, owner, since)
        # A source is an item of a user with an anchor that reads its followers.
        sources, source = np.unique(owner * num_rows + recent[anchor, place], return_inverse=True)
        own = [
            np.zeros((3, 0), np.int64)
        ]  # transitions of these users: the source, the follower's column, the position
        for of_user, left, right, position in self._transitions(users, earliest, COMPARED_AT_ONCE // size):
            key = of_user * num_rows + left
            start = np.searchsorted(sources, key)
            read = np.flatnonzero(np.append(sources, -1)[start] == key)
            is_follower = self._item[left[read]] == right[read, None].astype(np.int32)
            column = np.where(is_follower.any(1), is_follower.argmax(1), size)
            own.append(np.stack([start[read], column, position[read]]))
        start, column, position = np.concatenate(own, 1)
        total[anchor, place] -= _num_since(start, position, source, since)
        named = np.flatnonzero(column < size)
        pair = start[named] * size + column[named]
        has_own = np.zeros((len(sources), size), np.bool_)
        has_own.ravel()[pair] = True
        event, column = np.nonzero(has_own[source])
        later = _num_since(pair, position[named], source[event] * size + column, since[event])
        count[anchor[event], place[event], column] -= later.astype(np.int32)
        return count, total

    def _transitions(self, users: Int, first: Int, at_once: int) -> Iterator[tuple[Int, Int, Int, Int]]:
        """Transitions between known items, int64 [P] each: places in `users`, items, followers, positions of followers.

        Args:
            users: int64 [B] rows of the log.
            first: int64 [B] least positions in the histories.
            at_once: events per block; a longer history is a block by itself.
        """
        begin, stop = np.maximum(first - 1, 0), self._counts[users]
        for part in token_groups(stop - begin, max(at_once, 1)):
            events = self._log.gather_ranges(users[part], begin[part], stop[part], features=False)
            row, owner = self._item_rows[events.item], events.owner
            kept = np.flatnonzero((owner[:-1] == owner[1:]) & (row[:-1] > 0) & (row[1:] > 0))
            position = np.arange(len(row)) + (begin[part] - events.offsets[:-1])[owner]
            yield part.start + owner[kept], row[kept], row[kept + 1], position[kept + 1]


def _num_since(key: Int, position: Int, asked: Int, since: Int) -> Int:
    """How many events int64 [P] have an asked key, int64 [Q], and a position of at least `since`: int64 [Q]."""
    width = max(int(position.max(initial=0)), int(since.max(initial=0))) + 1
    ordered = np.sort(key * width + position)
    return np.searchsorted(ordered, (asked + 1) * width) - np.searchsorted(ordered, asked * width + since)


def _weights(count: Tensor, total: Tensor) -> Tensor:
    """float32 [..., N] of n int32 [..., N] and m int64 [...]."""
    return torch.log1p(SCALE * count / (total.unsqueeze(-1) + SHRINKAGE))


def anchor_events(batch: Batch, num_known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Newest events of anchors: their model rows int64 [NA, J], the newest first, where 0 pads; the packed newest event
    int64 [NA], -1 for none; and the anchors' chunks int64 [NA].

    Args:
        batch: with anchors.
        num_known: items that histories know (`ModelReads`).
    """
    anchors, windows = batch.anchors, batch.windows
    assert anchors is not None
    chunk, tail_len = windows.chunk[anchors.window], windows.tail_index.shape[1]
    # The tail's last W columns are the newest events before each position of its window. At an early position, it has
    # fewer events than in serving, so the events before it are taken from the chunk.
    newest = windows.tail_index[anchors.window, tail_len - batch.labels.item.shape[1] + anchors.position]
    event = newest.unsqueeze(1) - torch.arange(min(NUM_RECENT, tail_len))
    inside = (event >= batch.events.offsets[chunk].unsqueeze(1)) & (newest >= 0).unsqueeze(1)
    recent = torch.zeros_like(event)
    recent[inside] = batch.rows[batch.events.item[event[inside]]]
    return recent.masked_fill_(recent > num_known, 0), newest, chunk


# The sums that a request reads.


def transition_sums(table: TransitionTable, recent: Tensor, wanted: Tensor | range) -> Tensor:
    """The sums of candidates, float32 [B, K, C]. Their bits do not depend on other requests and candidates.

    Args:
        recent: int64 [B, J] model rows of the newest events, the newest first; 0 pads.
        wanted: model rows of the candidates: int64 [C] (the same for every request) or [B, C]; or a range of rows.
    """
    shape = *recent.shape, table.item.shape[1]
    item, weight = (part.index_select(0, recent.flatten()).view(shape) for part in (table.item, table.weight))
    return _sums(item, weight, wanted)


def _sums(item: Tensor, weight: Tensor, wanted: Tensor | range) -> Tensor:
    """Sums [B, K, C] of followers int32 [B, J, N] with weights float32 [B, J, N]."""
    num_requests, num_recent, size = item.shape
    back = torch.arange(num_recent, device=item.device)
    weight = weight * (RECENT_DECAY**back).to(weight.dtype).unsqueeze(1)
    column, count, place = _columns(item.flatten(1), wanted)
    column = column.add_(((back > 0).long() * (count + 1)).repeat_interleave(size))  # TransitionSum
    sums = weight.new_zeros(num_requests, NUM_SUMS * (count + 1))
    sums = sums.scatter_add_(1, column, weight.flatten(1)).view(num_requests, NUM_SUMS, count + 1)
    return sums[..., :count] if place is None else of_candidates(sums, place)


def of_candidates(sums: Tensor, place: Tensor) -> Tensor:
    """Columns int64 [C] or [B, C] of sums [B, K, n]: [B, K, C]."""
    if place.ndim == 1:
        return sums.index_select(2, place)
    return sums.gather(2, place.unsqueeze(1).expand(-1, sums.shape[1], -1))


def _columns(item: Tensor, wanted: Tensor | range) -> tuple[Tensor, int, Tensor | None]:
    """Where to add up items int32 [B, n]: columns int64 [B, n] among `count` ones, which is that of unwanted items;
    and the column of each candidate, None if they are the columns."""
    if isinstance(wanted, range):
        column = item.long() - wanted.start
        outside = (column < 0) | (column >= len(wanted))
        return column.masked_fill(outside, len(wanted)), len(wanted), None
    count, wanted = wanted.shape[-1], wanted.to(item.device)
    if not count:
        return torch.zeros_like(item, dtype=torch.int64), 0, None
    if wanted.ndim == 1 and item.numel() > (most := int(item.max())):  # a lookup takes a tenth of the time of a search
        table = torch.full((max(most, int(wanted.max())) + 1,), count, device=item.device)
        table[wanted] = torch.arange(count, device=item.device)
        is_ascending = bool((wanted.diff() > 0).all())
        column = table.index_select(0, item.flatten()).view(item.shape)
        return column, count, None if is_ascending else table[wanted]
    ascending = wanted.sort(-1).values
    column = torch.searchsorted(ascending, item.to(ascending.dtype))
    found = column.clamp(max=count - 1)
    found = ascending[found] if ascending.ndim == 1 else ascending.gather(1, found)
    return column.masked_fill_(found != item, count), count, torch.searchsorted(ascending, wanted)
