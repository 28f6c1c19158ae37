"""Neighbors of items: which items the same users have, and which come next. Scores read sums over a user's items.

Two tables name the strongest neighbors of each item, with weights:

- *similar*: c / (sqrt(n_i n_j) + SHRINKAGE), with n_i the users who had item i, and c those who had both. Only the
  newest MOST_EVENTS events of each user count, and neighbors with fewer than MIN_USERS users in common are left out.
- *following*: log(1 + FOLLOWING_SCALE n / (m + FOLLOWING_SHRINKAGE)): m events came right after item i, and n of them
  were item j.

At a request there are NUM_SUMS sums for each candidate: over all items that the user's counters hold, of *similar*; and
of *following* for the newest event, and for the events before it, weighted by RECENT_DECAY. The first one becomes
log(1 + SIMILAR_SCALE p), where p is the candidate's share of the sums of all items: the sums themselves grow with the
history and the log, so what is learned by questions in the middle of histories would not hold at their ends. The sums
are inputs of the retrieval head and of the head of counted items. For an item that is not a neighbor, they are 0.

A training question would find its own user's events in the tables, labels included, and would learn to trust them too
much. So users are divided into FOLDS, and a question reads tables of the users of the other folds, whose counts are
scaled up to all users. The model gets those of all users.

Letters: V1 model rows, N neighbors per item, B requests, S counted items, E pairs of a user and an item, P pairs of
items, C candidates, K = NUM_SUMS, T tables, NA anchors, R item rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Floats, Int, offsets_of
from vista.examples.item_statistics import distinct_counts
from vista.log.event_log import EventLog
from vista.log.histories import ranges, token_groups
from vista.log.splits import EVENTS_PER_BLOCK

if TYPE_CHECKING:
    from vista.examples.batch import Batch

SHRINKAGE = 50.0
SIMILAR_SCALE, SIMILAR_PRIOR = 1000.0, 0.5
"""The prior is added to the sums of all items, so that a share says little while the user has few items."""
FOLLOWING_SCALE, FOLLOWING_SHRINKAGE = 100.0, 10.0
MIN_USERS = 2
MOST_EVENTS = 512
"""Newest events of a user that are compared with each other. It bounds the time: at most so many pairs per event."""
FOLDS = 2
NUM_RECENT = 8
"""Newest events that *following* sums over."""
RECENT_DECAY = 0.7
"""Weight of an event relative to the one after it, among those before the newest."""
NUM_SUMS = 3
PAIRS_AT_ONCE = 1 << 22
"""Pairs of items that are counted at once (those of one item at least): about 200 MB."""


class NeighborKind(IntEnum):
    """The tables, in the order in which a model has them."""

    similar = 0
    following = 1


class NeighborSum(IntEnum):
    """The sums, in their order."""

    similar = 0
    following_newest = 1
    following_earlier = 2


@dataclass(frozen=True, slots=True)
class Neighbors:
    """The neighbors of all items, of each kind, strongest first. Row 0, of the unknown item, has none."""

    item: Tensor
    """int32 [2, V1, N] model rows; 0 pads."""
    weight: Tensor
    """float32 [2, V1, N]; 0 in the padding."""

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.item, self.weight

    def copy_(self, other: Neighbors) -> None:
        """Take the tables of others, of the same shape."""
        self.item.copy_(other.item)
        self.weight.copy_(other.weight)

    def check(self) -> None:
        """Check tables that were read from a file.

        Raises:
            RuntimeError: they name rows that are not in them.
        """
        low, high = (int(bound) for bound in self.item.aminmax()) if self.item.numel() else (0, 0)
        if self.item.dtype is not torch.int32 or low < 0 or high >= self.item.shape[1]:
            raise RuntimeError(f"neighbors must be rows below {self.item.shape[1]}, as int32")


class FoldedNeighbors:
    """`Neighbors` of the training part of a log: of all users, and without those of each fold."""

    def __init__(
        self, log: EventLog, item_rows: Int, counts: Int, size: int, *, pairs_at_once: int = PAIRS_AT_ONCE
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [num_users], visible events per user. Nothing after them is read.
            size: N.
            pairs_at_once: bounds the memory.
        """
        self._num_rows = int(item_rows.max(initial=0)) + 1
        shape = len(NeighborKind), (FOLDS + 1) * self._num_rows, size
        self._item, self._weight = np.zeros(shape, np.int32), np.zeros(shape, np.float32)
        self.of_each = Neighbors(torch.from_numpy(self._item), torch.from_numpy(self._weight))
        """One after another, with V1 rows each: those without the users of each fold, and those of all users."""
        self._fit_similar(*self._distinct_items(log, item_rows, counts), pairs_at_once)
        self._fit_following(*self._transitions(log, item_rows, counts))

    def of_all(self, num_rows: int) -> Neighbors:
        """Those of all users, with `num_rows` rows."""
        missing = num_rows - self._num_rows
        return Neighbors(
            *(F.pad(table[:, FOLDS * self._num_rows :], (0, 0, 0, missing)) for table in self.of_each.tables)
        )

    def first_rows(self, user: Tensor) -> Tensor:
        """int64 [B]: where in `of_each` the tables begin that do not know users int64 [B] (rows of the log)."""
        return user % FOLDS * self._num_rows

    def _distinct_items(self, log: EventLog, item_rows: Int, counts: Int) -> tuple[Int, Int]:
        """The known items of each user's newest events, each once: users int64 [E], ascending, and model rows."""
        keys, width = [np.zeros(0, np.int64)], self._num_rows
        first = np.maximum(counts - MOST_EVENTS, 0)
        for part in token_groups(counts - first, EVENTS_PER_BLOCK):
            users = np.arange(part.start, part.stop)
            events = log.gather_ranges(users, first[part], counts[part], features=False)
            row = item_rows[events.item]
            keys.append(np.unique((users[events.owner] * width + row)[row > 0]))
        return np.divmod(np.concatenate(keys), width)

    def _transitions(self, log: EventLog, item_rows: Int, counts: Int) -> tuple[Int, Int, Int]:
        """Pairs of known items that follow each other, int64 [P] each, sorted, and how often per fold, [P, FOLDS]."""

        def keys(part: slice) -> Int:
            users = np.arange(part.start, part.stop)
            events = log.gather(users, counts[part], features=False)
            row, owner = item_rows[events.item], events.owner
            left, right = row[:-1], row[1:]
            kept = np.flatnonzero((owner[:-1] == owner[1:]) & (left > 0) & (right > 0))
            found: Int = (left[kept] * self._num_rows + right[kept]) * FOLDS + users[owner[kept]] % FOLDS
            return found

        pair, times = _by_fold(keys(part) for part in token_groups(counts, EVENTS_PER_BLOCK))
        return *np.divmod(pair, self._num_rows), times

    def _fit_similar(self, user: Int, row: Int, pairs_at_once: int) -> None:
        """user: int64 [E], ascending; row: int64 [E] distinct model rows of each."""
        width = self._num_rows
        fold_users = np.bincount(row * FOLDS + user % FOLDS, minlength=width * FOLDS).reshape(width, FOLDS)
        # Items in a pair that counts have at least MIN_USERS users each.
        kept = np.flatnonzero(fold_users.sum(1)[row] >= MIN_USERS)
        user, row = user[kept], row[kept]
        length = np.bincount(user)
        begin = offsets_of(length)[:-1]
        by_row = np.argsort(row, kind="stable")
        of_row, owner = row[by_row], user[by_row]
        first = np.searchsorted(of_row, np.arange(width + 1))
        num_pairs = np.bincount(of_row, length[owner], width).astype(np.int64)
        for part in token_groups(num_pairs, pairs_at_once):
            some = slice(first[part.start], first[part.stop])
            lengths = length[owner[some]]
            key = np.repeat(of_row[some] * width * FOLDS + owner[some] % FOLDS, lengths)
            key += row[ranges(begin[owner[some]], lengths)] * FOLDS
            pair, times = _by_fold([key])
            left, right = np.divmod(pair, width)
            shared = np.flatnonzero((times.sum(1) >= MIN_USERS) & (left != right))
            left, right, times = left[shared], right[shared], times[shared]
            for table, scale, (c, a, b) in _tables(times, fold_users[left], fold_users[right]):
                weight = scale * c / (scale * np.sqrt(a * b) + SHRINKAGE)
                self._write(NeighborKind.similar, table, left, right, weight, c >= MIN_USERS)

    def _fit_following(self, left: Int, right: Int, times: Int) -> None:
        """Arguments are what `_transitions` returns."""
        for table, scale, (count,) in _tables(times):
            leaving = np.bincount(left, count, self._num_rows)[left]
            weight = np.log1p(FOLLOWING_SCALE * scale * count / (scale * leaving + FOLLOWING_SHRINKAGE))
            self._write(NeighborKind.following, table, left, right, weight, count > 0)

    def _write(
        self, kind: NeighborKind, table: int, left: Int, right: Int, weight: Floats, kept: NDArray[np.bool_]
    ) -> None:
        """Write the strongest neighbors of some rows. Of equal ones, the smaller row comes first.

        Args:
            left, right: int64 [P], sorted: items and their neighbors; weight: float64 [P].
            kept: bool [P]: False for pairs that do not count.
        """
        left, right, weight = left[kept], right[kept], weight[kept].astype(np.float32)
        order = np.lexsort((-weight, left))
        rank = np.arange(len(order)) - np.searchsorted(left, left)
        best = rank < self._item.shape[-1]
        order, place = order[best], (kind, table * self._num_rows + left[best], rank[best])
        self._item[place], self._weight[place] = right[order], weight[order]


def _by_fold(blocks_of_keys: Iterable[Int]) -> tuple[Int, Int]:
    """The pairs int64 [P], ascending, and how often each occurs in each fold, int64 [P, FOLDS].

    Args:
        blocks_of_keys: pair * FOLDS + fold, int64 [n] each.
    """
    key, times = distinct_counts(blocks_of_keys)
    pair, fold = np.divmod(key, FOLDS)
    is_first = np.diff(pair, prepend=-1) > 0
    counts = np.zeros((int(is_first.sum()), FOLDS), np.int64)
    counts[np.cumsum(is_first) - 1, fold] = times
    return pair[is_first], counts


def _tables(*counts: Int) -> Iterator[tuple[int, float, list[Int]]]:
    """Each table's number, what scales its counts up to all users, and its counts int64 [P], from those by fold, int64
    [P, FOLDS]. The last table has all users."""
    whole = [each.sum(1) for each in counts]
    for fold in range(FOLDS):
        yield fold, FOLDS / (FOLDS - 1), [total - each[:, fold] for total, each in zip(whole, counts, strict=True)]
    yield FOLDS, 1.0, whole


# The sums that a request reads.


@dataclass(frozen=True, slots=True)
class NeighborSources:
    """Whose neighbors the sums of B requests are made of: rows of `Neighbors`; 0 pads."""

    counted: Tensor
    """int64 [B, S] items that the user's counters hold, each once."""
    recent: Tensor
    """int64 [B, at most NUM_RECENT] items of the newest events, the newest first."""

    @classmethod
    def of(cls, counted: Int, tail: Int, device: torch.device) -> NeighborSources:
        """Those of requests.

        Args:
            counted: int64 [B, S] model rows; padding is 0 or less.
            tail: int64 [B, L] model rows of the newest events, right-aligned; 0 pads.
        """
        recent = tail[:, ::-1][:, :NUM_RECENT].copy()
        return cls(torch.from_numpy(np.maximum(counted, 0)).to(device), torch.from_numpy(recent).to(device))

    def select(self, requests: slice) -> NeighborSources:
        """Those of some requests."""
        return NeighborSources(self.counted[requests], self.recent[requests])


def neighbor_sums(neighbors: Neighbors, sources: NeighborSources, wanted: Tensor | range) -> Tensor:
    """The sums of candidates, float32 [B, K, C]. Their bits do not depend on other requests and candidates.

    Args:
        wanted: model rows of the candidates: int64 [C] (the same for every request) or [B, C]; or a range of rows.
    """
    size, num_counted, num_recent = neighbors.item.shape[-1], sources.counted.shape[1], sources.recent.shape[1]
    device = sources.recent.device
    # Both tables as one, so that a request takes one pass.
    rows = torch.cat([sources.counted, sources.recent + neighbors.item.shape[1]], 1)
    num_requests, num_rows = rows.shape
    item = neighbors.item.flatten(0, 1).index_select(0, rows.flatten()).view(num_requests, num_rows * size)
    weight = neighbors.weight.flatten(0, 1).index_select(0, rows.flatten()).view(num_requests, num_rows, size)
    decay = RECENT_DECAY ** torch.arange(num_recent, device=device)
    factor = torch.cat([weight.new_ones(num_counted), decay.to(weight.dtype)])
    of_recent = 1 + (torch.arange(num_recent, device=device) > 0).long()  # NeighborSum
    of_sum = torch.cat([torch.zeros(num_counted, dtype=torch.int64, device=device), of_recent])
    column, count, place = _columns(item, wanted)
    column = column.add_((of_sum * (count + 1)).repeat_interleave(size))
    sums = weight.new_zeros(num_requests, NUM_SUMS * (count + 1))
    sums.scatter_add_(1, column, (weight * factor.unsqueeze(1)).flatten(1))
    sums = sums.view(num_requests, NUM_SUMS, count + 1)
    # In float64, so that the bits do not depend on the padding of other requests.
    total = weight[:, :num_counted].double().sum((1, 2)) + SIMILAR_PRIOR
    sums[:, 0].mul_((SIMILAR_SCALE / total).float().unsqueeze(1)).log1p_()
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


def anchor_sums(batch: Batch, neighbors: Neighbors, first_row: Tensor, num_known: int) -> Tensor:
    """float32 [NA, K, R]: the sums of a batch's items for its anchors.

    Args:
        batch: with anchors and counters.
        first_row: int64 [B] row of `neighbors` where the tables begin that each chunk's user reads.
        num_known: items that histories know (`ModelReads`).
    """
    anchors, windows = batch.anchors, batch.windows
    assert anchors is not None and anchors.counters is not None
    chunk, tail_len = windows.chunk[anchors.window], windows.tail_index.shape[1]
    counted = anchors.counters.item
    counted = torch.where(counted >= 0, batch.rows[counted], 0)
    # The tail's last W columns are the newest events before each position of its window. At an early position, it has
    # fewer events than in serving, so the events before it are taken from the chunk.
    newest = windows.tail_index[anchors.window, tail_len - batch.labels.item.shape[1] + anchors.position]
    event = newest.unsqueeze(1) - torch.arange(min(NUM_RECENT, tail_len))
    inside = (event >= batch.events.offsets[chunk].unsqueeze(1)) & (newest >= 0).unsqueeze(1)
    recent = torch.zeros_like(event)
    recent[inside] = batch.rows[batch.events.item[event[inside]]]
    recent = recent.masked_fill(recent > num_known, 0)
    first = first_row[chunk].unsqueeze(1)
    sources = NeighborSources(*(torch.where(rows > 0, rows + first, 0) for rows in (counted, recent)))
    return neighbor_sums(neighbors, sources, batch.rows)
