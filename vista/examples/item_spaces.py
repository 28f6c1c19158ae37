"""Item spaces and pooled vectors: what a user's whole history is about, as sums of fixed item vectors.

An item space has a vector of length 1 for each item, from a truncated SVD of the stretches x items matrix W of distinct
items, where a stretch is STRETCH_EVENTS events of a user: a whole history may contain nearly all items. An entry of W
is 1 / (n_s^(1/2) n_i^(1/4)), with n_s the number of items of stretch s and n_i the number of stretches with item i, so
that popular items do not dominate. Items with fewer than MIN_USERS users take no part, and have no vector (all 0).

Where labels alone are trained, and the actions of events tell them (`LabelResiduals`), W has labels instead: what the
rates of the item and of the user leave of them. An event then has the weight of what its action tells of the label,
minus the item's rate. So sums tell for which items the user's labels are higher than those of other users.

A request has the pooled vectors `Pooled`: sums of its user's item vectors, scaled to length 1. Scores read their inner
products with the vector of a candidate, which are cosines. Vectors, times their weights, are multiples of GRID, so that
float64 sums of them are exact, and have the same bits in any order.

A training question would find its own user's events in the space, labels included, and would learn to trust cosines too
much. So users are divided into FOLDS, and a question reads a space of the users of the other folds, for its events and
for its candidates. The model gets that of all users. Only inner products within one space are read, so the spaces need
no alignment.

Letters: V1 model rows, N users, E pairs of a stretch or a user and an item, r dimensions of a space, J = len(Pooled), B
requests, L tail length, T events of H histories, n requests on them, F spaces of a table, A actions.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Float32s, Floats, Int, offsets_of
from vista.examples.item_statistics import BLOCK_EVENTS, OVERSAMPLING, POWER_ITERATIONS, CounterRequests, WholeHistories
from vista.log.splits import random_users_counts, visible_blocks

if TYPE_CHECKING:
    from vista.log.event_log import EventLog

FOLDS = 4
MIN_USERS = 3
"""Items with fewer users have no vector, because it would only identify those users."""
ENOUGH_EVENTS, MOST_EVENTS = 1 << 20, 1 << 23
"""Events that a space is fitted to, if there are more: those of random users."""
ENOUGH_USERS = 1 << 11
"""The events of so many users are read even if they have more than ENOUGH_EVENTS, up to MOST_EVENTS."""
STRETCH_EVENTS = 200
"""Events of a row of W."""
NUM_POOLED = 32
"""Newest events of the tail that `Pooled.recent` sums over, at most."""
RATE_PRIOR = 20.0
"""Impressions with the mean rate that are added to those of each item."""
UNKNOWN = 0
GRID = 2.0**-24
"""Sums of up to 2^29 events are exact in float64."""
COARSE = 2.0**-12
"""Likewise of vectors and weights that are multiplied: products are multiples of GRID, and exact in float32."""
USER_PRIOR = 5.0
"""Labels as expected that are added to those of each user."""


class Pooled(IntEnum):
    """The pooled vectors, in their order."""

    all = 0
    """Of all events that the record covers, and of the newer ones in the tail."""
    recent = 1
    """Of the newest NUM_POOLED events of the tail."""


def fold_of(user: Int) -> Int:
    """int64 [n] the fold of users int64 [n] (rows of the log), by a multiplicative hash (Knuth). Every other user may
    have something in common, so a fold must not be every other user."""
    product = user.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    fold: Int = (product >> np.uint64(40)).astype(np.int64) % FOLDS
    return fold


class LabelResiduals(NamedTuple):
    """The N known labels of a task in the training part of a log, and what actions tell of them."""

    user: Int
    """int64 [N] rows of the log."""
    row: Int
    """int64 [N] model rows."""
    label: Floats
    """float64 [N]."""
    of_action: Floats
    """float64 [A] the mean label of impressions that lead to an event with each action; NaN without one."""

    def space(self, kept: NDArray[np.bool_], num_rows: int, dim: int, seed: int) -> tuple[Float32s, Float32s]:
        """That of some labels, bool [N]: vectors float32 [num_rows, dim], and weights of events [num_rows, A]."""
        user, row, label = self.user[kept], self.row[kept], self.label[kept]
        mean = label.mean() if len(label) else 0.0
        shown = np.bincount(row, minlength=num_rows) + RATE_PRIOR
        rate = (np.bincount(row, label, num_rows) + RATE_PRIOR * mean) / shown
        _, owner, count = np.unique(user, return_inverse=True, return_counts=True)
        residual = label - rate[row]
        residual -= (np.bincount(owner, residual) / (count + USER_PRIOR))[owner]
        pair, place = np.unique(user * num_rows + row, return_inverse=True)
        value: Floats = np.bincount(place, residual / np.sqrt(shown[row])).astype(np.float64)
        space = _factors(pair // num_rows, pair % num_rows, value, num_rows, dim, seed, COARSE)
        weights = np.nan_to_num(np.round((self.of_action - rate[:, None]) / COARSE) * COARSE)
        return space, weights.astype(np.float32)


class ItemSpaces:
    """The item spaces of the training part of a log: without the users of each fold, and of all users."""

    def __init__(
        self,
        log: EventLog,
        item_rows: Int,
        counts: Int,
        dim: int,
        *,
        seed: int,
        num_rows: int | None = None,
        residuals: LabelResiduals | None = None,
    ) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [num_users], visible events per user. Nothing after them is read.
            dim: r.
            num_rows: V1, above all rows; None takes the least.
            seed: of the SVD, and of the choice of users of a large log.
            residuals: what the spaces are fitted to; None takes the events.
        """
        num_rows = int(item_rows.max(initial=0)) + 1 if num_rows is None else num_rows
        self.weights: Float32s | None = None
        """float32 [FOLDS + 1, V1, A] of events, by their action; None weighs all events the same."""
        if residuals is not None:
            fold = fold_of(residuals.user)
            made = [residuals.space(fold != left_out, num_rows, dim, seed) for left_out in range(FOLDS + 1)]
            spaces = [space for space, _ in made]
            self.weights = np.stack([weights for _, weights in made])
        else:
            user, stretch, row = _distinct_items(log, item_rows, counts, num_rows, seed)
            parts = (fold_of(user) != left_out for left_out in range(FOLDS + 1))
            spaces = [_space(user[kept], stretch[kept], row[kept], num_rows, dim, seed) for kept in parts]
        self.of_each: Float32s = np.stack(spaces)
        """float32 [FOLDS + 1, V1, r]: those without the users of each fold, and that of all users."""

    def of_all(self, num_rows: int) -> Float32s:
        """That of all users, float32 [num_rows, r]."""
        return _padded(self.of_each[-1], num_rows)

    def weights_of_all(self, num_rows: int) -> Float32s:
        """The weights of events for it, float32 [num_rows, A]."""
        assert self.weights is not None
        return _padded(self.weights[-1], num_rows)

    def of_histories(self, histories: WholeHistories) -> PooledHistories:
        """Pooled vectors of some users of the log, each in the space that does not know the user."""
        fold, weight = fold_of(histories.user), None
        if self.weights is not None:
            weight = self.weights[np.repeat(fold, np.diff(histories.offsets)), histories.item, histories.action]
        return PooledHistories(self.of_each[:FOLDS], fold, histories.item, histories.offsets, weight)

    def of_rows(self, rows: Int) -> Float32s:
        """What questions of all folds read of model rows int64 [R]: float32 [R, FOLDS * r]."""
        return np.concatenate(list(self.of_each[:FOLDS, rows]), axis=1)


class PooledHistories:
    """Pooled vectors of H histories, at any place."""

    def __init__(self, spaces: Float32s, fold: Int, item: Int, offsets: Int, weight: Float32s | None = None) -> None:
        """
        Args:
            spaces: float32 [F, V1, r].
            fold: int64 [H] which of the spaces each history reads.
            item: int64 [T] model rows, from each history's first event on.
            offsets: int64 [H + 1].
            weight: float32 [T] of events; None weighs all the same.
        """
        self._spaces, self._fold, self._offsets = spaces, fold, offsets
        vectors = weighted(spaces[np.repeat(fold, np.diff(offsets)), item], weight)
        self._sums = np.concatenate([np.zeros((1, spaces.shape[2])), vectors])
        np.cumsum(self._sums, axis=0, out=self._sums)  # twice as fast in place

    def at(self, requests: CounterRequests, tail_len: int) -> Float32s:
        """The pooled vectors of requests, float32 [n, J, F * r]: in the columns of the space that is read; 0 in others.
        `tail_len`: events of a tail. Those of a training window may be fewer, but its older events are read too."""
        num_spaces, _, dim = self._spaces.shape
        out = np.zeros((len(requests.seen), len(Pooled), num_spaces, dim), np.float32)
        out[np.arange(len(out)), :, self._fold[requests.history]] = self._vectors(requests, tail_len)
        return out.reshape(len(out), len(Pooled), num_spaces * dim)

    def of_items(self, requests: CounterRequests, tail_len: int, item: Int) -> Float32s:
        """Cosines float32 [n, J] of the pooled vectors of `at` and one item int64 [n] (model rows) per request."""
        vectors = self._spaces[self._fold[requests.history], item]
        cosines: Float32s = np.einsum("njr,nr->nj", self._vectors(requests, tail_len), vectors, dtype=np.float64)
        return cosines.astype(np.float32)

    def _vectors(self, requests: CounterRequests, tail_len: int) -> Float32s:
        """float32 [n, J, r], in the space that each request reads."""
        begin, seen = self._offsets[requests.history], requests.seen
        places = (requests.covered, requests.first, seen, np.maximum(seen - min(tail_len, NUM_POOLED), 0))
        covered, first, end, recent = (self._sums[begin + place] for place in places)
        every = covered - self._sums[begin] + (end - first)
        return unit(np.stack([every, end - recent], 1))


class ItemRates:
    """How often items have each label: log-odds relative to those of all impressions. As with spaces, a training
    question reads the rates of the users of the other folds, and the model those of all."""

    def __init__(
        self,
        item: Int,
        label: Float32s,
        mask: NDArray[np.bool_],
        user: Int,
        num_rows: int,
        examined: Float32s | None = None,
    ) -> None:
        """
        Args:
            item: int64 [N] model rows of impressions.
            label: float32 [N, num_tasks]; mask: bool [N, num_tasks], True where a label is known.
            user: int64 [N] rows of the log.
            num_rows: V1.
            examined: float32 [N, num_tasks] probabilities that users looked at the items, which an impression counts
                as; None counts each as 1.
        """
        looks = mask if examined is None else mask * examined
        cell, size = fold_of(user) * num_rows + item, FOLDS * num_rows
        counts = np.zeros((2, FOLDS, num_rows, label.shape[1]))
        """Of labels that are known, and of those that are 1."""
        for task in range(label.shape[1]):
            for kind, weight in enumerate((looks[:, task], label[:, task] * mask[:, task])):
                counts[kind, ..., task] = np.bincount(cell, weight, size).reshape(FOLDS, num_rows)
        counts[:, :, UNKNOWN] = 0
        every = counts.sum(1, keepdims=True)
        scale = FOLDS / (FOLDS - 1)
        shown, true = np.concatenate([(every - counts) * scale, every], 1)
        mean = (true.sum(1, keepdims=True) + 1) / (shown.sum(1, keepdims=True) + 2)
        true, false = true + RATE_PRIOR * mean, np.maximum(shown - true, 0) + RATE_PRIOR * (1 - mean)
        odds = np.log(true / false) - np.log(mean / (1 - mean))
        odds[:, UNKNOWN] = 0
        self.of_each: Float32s = odds.astype(np.float32)
        """float32 [FOLDS + 1, V1, num_tasks]: those without the users of each fold, and those of all users."""

    def of_all(self, num_rows: int) -> Float32s:
        """Those of all users, float32 [num_rows, num_tasks]."""
        return _padded(self.of_each[-1], num_rows)

    def of_items(self, user: Int, item: Int) -> Float32s:
        """float32 [n, num_tasks] of items int64 [n] for questions of users int64 [n]."""
        return self.of_each[fold_of(user), item]


def _padded(rows: Float32s, num_rows: int) -> Float32s:
    return np.pad(rows, ((0, num_rows - len(rows)), (0, 0)))


def weighted(vectors: Float32s, weight: Float32s | None) -> Float32s:
    """Vectors float32 [..., r] times weights [...] of their events, if there are any."""
    return vectors if weight is None else vectors * weight[..., None]


def pooled_vectors(space: Float32s, sums: Floats, recent: Int, weight: Float32s | None = None) -> Float32s:
    """The pooled vectors of requests, float32 [B, J, r], each of length 1, or 0 without events.

    Args:
        space: float32 [V1, r].
        sums: float64 [B, r] of the vectors of the events that the record covers, and of the newer ones in the tail.
        recent: int64 [B, L] model rows of the tail, right-aligned; 0 pads.
        weight: float32 [B, L] of the events; None weighs all the same.
    """
    both = np.empty((len(sums), 2, space.shape[1]))
    both[:, 0] = sums
    newest = weighted(space[recent[:, -NUM_POOLED:]], None if weight is None else weight[:, -NUM_POOLED:])
    newest.sum(1, dtype=np.float64, out=both[:, 1])
    return unit(both)


def unit(sums: Floats) -> Float32s:
    """float64 [..., r] -> float32 [..., r] of length 1; 0 stays 0."""
    length = np.sqrt(np.square(sums).sum(-1, keepdims=True))
    return (sums / np.where(length == 0, 1, length)).astype(np.float32)


def _distinct_items(log: EventLog, item_rows: Int, counts: Int, num_rows: int, seed: int) -> tuple[Int, Int, Int]:
    """The known items of stretches of users, each once, sorted: users, stretches, and model rows."""
    most = min(MOST_EVENTS, max(ENOUGH_EVENTS, round(ENOUGH_USERS * counts[counts > 0].mean()) if counts.any() else 0))
    counts = random_users_counts(counts, most, np.random.default_rng(seed), "items are factorized by")
    num_stretches = -(-counts // STRETCH_EVENTS)
    first, keys, begin = offsets_of(num_stretches), [np.zeros(0, np.int64)], 0
    for histories in visible_blocks(log, counts, BLOCK_EVENTS):
        item, owner = item_rows[histories.item], histories.owner
        stretch = first[begin + owner] + (np.arange(len(owner)) - histories.offsets[owner]) // STRETCH_EVENTS
        keys.append(np.unique((stretch * num_rows + item)[item > 0]))
        begin += histories.num_users
    stretch, row = np.divmod(np.concatenate(keys), num_rows)
    return np.repeat(np.arange(len(counts)), num_stretches)[stretch], stretch, row


def _space(user: Int, stretch: Int, row: Int, num_rows: int, dim: int, seed: int) -> Float32s:
    """float32 [num_rows, dim] from users, their stretches, and distinct items, int64 [E], sorted."""
    num_users = np.bincount(np.unique(user * num_rows + row) % num_rows, minlength=num_rows)
    kept = num_users[row] >= MIN_USERS
    count, row = np.bincount(row, minlength=num_rows), row[kept]
    _, stretch, length = np.unique(stretch[kept], return_inverse=True, return_counts=True)
    weight = length[stretch] ** -0.5 * count[row] ** -0.25
    return _factors(stretch, row, weight, num_rows, dim, seed, GRID)


def _factors(owner: Int, row: Int, value: Floats, num_rows: int, dim: int, seed: int, grid: float) -> Float32s:
    """Vectors of length 1 of the columns of a matrix, float32 [num_rows, dim], rounded to multiples of `grid`. Its
    entries are [E], sorted by owner (a user or a stretch) and row."""
    kept = np.bincount(row, minlength=num_rows)[row] >= MIN_USERS
    kept[row == UNKNOWN] = False
    row, value = row[kept], value[kept]
    out = np.zeros((num_rows, dim), np.float32)
    if not len(row):
        return out
    import torch  # Only fitting a space needs it.

    rows, column = np.unique(row, return_inverse=True)  # most items of a large catalog have too few users
    shape = int(owner.max()) + 1, len(rows)
    index, entries = torch.from_numpy(np.stack([owner[kept], column])), torch.from_numpy(value.astype(np.float32))
    matrix = torch.sparse_coo_tensor(index, entries, shape, is_coalesced=True, check_invariants=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, scale, _ = torch.svd_lowrank(matrix, q=min(dim + OVERSAMPLING, *shape), niter=POWER_ITERATIONS)
    of_users = torch.where(scale > 1e-6 * scale.max(), left / scale, 0)[:, :dim]
    vectors = (matrix.t() @ of_users).double().numpy()
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Where an item has no part in these dimensions, only rounding errors remain.
    vectors = np.where(size > 1e-5 * size.max(), vectors / np.maximum(size, 1e-30), 0)
    out[rows, : vectors.shape[1]] = np.round(vectors / grid) * grid
    return out
