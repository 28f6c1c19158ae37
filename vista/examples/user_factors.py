"""Item vectors without a model: a factorization of which users had which items.

A truncated SVD of the users x items matrix W of distinct items. An entry is 1 / (n_u^(1/2) n_i^(1/4)), with n_u the
number of items of user u and n_i the number of users of item i, so that neither users with long histories nor popular
items dominate. With W ≈ U S Vᵀ, an item's vector is the sum of its users' vectors, v_i = sum_u W_ui U_u / S. Leaving
some users out of the sum gives approximately the vector that the item would have without them.

It is an approximation because U, S, and the counts n are still those of all users: the vectors U / S have turned toward
the items of each user. Suppose that users draw items by popularity alone, so that there is nothing to learn. Then the
items of one half of a user's history still have a larger cosine to the other half than items of the same popularity.
Leaving the user out of the sum removes 69 to 88 % of this excess in simulations of 300 to 800 users (research log). A
factorization for each fold of users would remove the rest.

Training leaves a user out of the vectors of all items, also those of the history. Serving does not: there, the vectors
of items that a user had include the user, and those of items that are new to the user do not. So the mean of a history
and the scores of returning items are on a larger scale in serving than in training.

Letters: N users, V1 model rows, E entries of W, M model dim, R rows.
"""

from __future__ import annotations

import numpy as np
import torch

from vista.arrays import Float32s, Int
from vista.examples.item_factors import MOST_EVENTS, OVERSAMPLING, POWER_ITERATIONS, START_RMS
from vista.examples.pair_counts import BLOCK_EVENTS
from vista.log.event_log import EventLog
from vista.log.histories import ranges
from vista.log.splits import random_users_counts, visible_blocks

MIN_USERS = 3
"""Items with fewer users have no vector, because it would only identify those users.

Users that are left out still count. If they did not, an item with MIN_USERS users would lose its vector in each batch
with one of them, and only there, so that a missing vector would identify the items of the batch's users."""
MOST_FACTORS = 32
"""Columns that are not 0, at most. On the validation part of complete-journey, 32 are as good as 16 and 64 (research
log)."""


class UserFactors:
    """Vectors of the items that enough users had, with or without some of these users."""

    def __init__(self, log: EventLog, item_rows: Int, counts: Int, dim: int, *, seed: int) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [N], visible events per user. Nothing after them is read.
            dim: number of columns M.
            seed: of the sketch, and of the choice of users if all have more than MOST_EVENTS events.
        """
        num_rows = int(item_rows.max(initial=0)) + 1
        user, row = _distinct_items(log, item_rows, counts, num_rows, seed)
        num_users = np.bincount(row, minlength=num_rows)
        self.has_vector = num_users >= MIN_USERS
        """bool [V1]."""
        length = np.bincount(user, minlength=log.num_users)
        kept = self.has_vector[row]
        user, self._row = user[kept], row[kept]
        self._value = (length[user] ** -0.5 * num_users[self._row] ** -0.25).astype(np.float32)
        self._offsets = np.searchsorted(user, np.arange(log.num_users + 1))
        index, shape = torch.from_numpy(np.stack([user, self._row])), (log.num_users, num_rows)
        value = torch.from_numpy(self._value)
        matrix = torch.sparse_coo_tensor(index, value, shape, is_coalesced=True, check_invariants=False)
        size = min(dim, MOST_FACTORS)
        columns = min(size + OVERSAMPLING, *shape)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            left, scale, _ = torch.svd_lowrank(matrix, q=columns, niter=POWER_ITERATIONS)
        of_users = torch.where(scale > 1e-6 * scale.max(), left / scale, 0)[:, :size]
        self._users, self._items, self._dim = of_users.numpy(), (matrix.t() @ of_users).numpy(), dim
        self._size = self._rms(self._items)

    def vectors(self, rows: Int, without: Int | None = None) -> Float32s:
        """Vectors float32 [R, M] of sorted, distinct model rows int64 [R], each with the root mean square START_RMS.

        Rows without a vector, and items that only the users `without` had, are 0.

        Args:
            without: distinct users whose histories take no part; None for all users.
        """
        found = self._items[rows]
        if without is not None and len(rows):
            begin = self._offsets[without]
            count = self._offsets[without + 1] - begin
            entry = ranges(begin, count)
            place = np.minimum(np.searchsorted(rows, self._row[entry]), len(rows) - 1)
            inside = np.flatnonzero(rows[place] == self._row[entry])
            owner = np.repeat(without, count)[inside]
            np.subtract.at(found, place[inside], self._value[entry[inside], None] * self._users[owner])
        size = self._rms(found)
        # If all users of an item are left out, only rounding errors remain.
        scaled = np.where(size > 1e-4 * self._size[rows], found * (START_RMS / np.maximum(size, 1e-30)), 0)
        return np.pad(scaled.astype(np.float32), ((0, 0), (0, self._dim - scaled.shape[1])))

    def _rms(self, vectors: Float32s) -> Float32s:
        """Root mean square of each row, [R, 1], over all M columns: those that are not kept are 0."""
        size: Float32s = np.sqrt(np.sum(vectors**2, axis=1, keepdims=True) / np.float32(self._dim))
        return size


def _distinct_items(log: EventLog, item_rows: Int, counts: Int, num_rows: int, seed: int) -> tuple[Int, Int]:
    """Pairs of a user and a known model row of one of the user's items, each once, sorted."""
    counts = random_users_counts(counts, MOST_EVENTS, np.random.default_rng(seed), "items are factorized by")
    keys, begin = [np.zeros(0, np.int64)], 0
    for histories in visible_blocks(log, counts, BLOCK_EVENTS):
        item = item_rows[histories.item]
        keys.append(np.unique(((begin + histories.owner) * num_rows + item)[item > 0]))
        begin += histories.num_users
    return np.divmod(np.concatenate(keys), num_rows)
