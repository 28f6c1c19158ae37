"""Item spaces and pooled vectors: what a user's whole history is about, as sums of fixed item vectors.

An item space has a vector of length 1 for each item, from a truncated SVD of the users x items matrix W of distinct
items. An entry of W is 1 / (n_u^(1/2) n_i^(1/4)), with n_u the number of items of user u and n_i the number of users of
item i, so that neither users with long histories nor popular items dominate. Items with fewer than MIN_USERS users have
no vector (all 0).

A request has the pooled vectors `Pooled`: sums of its user's item vectors, scaled to length 1. Scores read their inner
products with the vector of a candidate, which are cosines. Vectors are rounded to multiples of ROUNDING, so that
float64 sums of them are exact, and have the same bits in any order.

A training question would find its own user's events in the space, labels included, and would learn to trust cosines too
much. So users are divided into FOLDS, and a question reads a space of the users of the other folds, for its events and
for its candidates. The model gets that of all users. Only inner products within one space are read, so the spaces need
no alignment.

Letters: V1 model rows, N users, E pairs of a user and an item, r dimensions of a space, J = len(Pooled), B requests,
L tail length.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch
from torch import Tensor

from vista.arrays import Float32s, Int
from vista.examples.item_statistics import MIN_USERS, OVERSAMPLING, POWER_ITERATIONS, _distinct_items
from vista.log.event_log import EventLog

FOLDS = 2
NUM_POOLED = 32
"""Newest events of the tail that `Pooled.recent` sums over, at most."""
ROUNDING = 2.0**-24
"""Sums of up to 2^29 events are exact in float64."""


class Pooled(IntEnum):
    """The pooled vectors, in their order."""

    all = 0
    """Of all events that the record covers, and of the newer ones in the tail."""
    recent = 1
    """Of the newest NUM_POOLED events of the tail."""


class ItemSpaces:
    """The item spaces of the training part of a log: without the users of each fold, and of all users."""

    def __init__(self, log: EventLog, item_rows: Int, counts: Int, dim: int, *, seed: int) -> None:
        """
        Args:
            item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
            counts: int64 [num_users], visible events per user. Nothing after them is read.
            dim: r.
            seed: of the SVD, and of the choice of users if all have more than MOST_EVENTS events.
        """
        num_rows = int(item_rows.max(initial=0)) + 1
        user, row = _distinct_items(log, item_rows, counts, num_rows, seed)
        others = [np.flatnonzero(user % FOLDS != fold) for fold in range(FOLDS)]
        spaces = [_space(user[kept], row[kept], num_rows, dim, seed) for kept in (*others, slice(None))]
        self.of_each: Float32s = np.stack(spaces)
        """float32 [FOLDS + 1, V1, r]: those without the users of each fold, and that of all users."""

    def of_all(self, num_rows: int) -> Tensor:
        """That of all users, float32 [num_rows, r]."""
        space = self.of_each[-1]
        return torch.from_numpy(np.pad(space, ((0, num_rows - len(space)), (0, 0))))


def pooled_vectors(space: Tensor, sums: Tensor, recent: Int) -> Tensor:
    """The pooled vectors of requests, float32 [B, J, r], each of length 1, or 0 without events.

    Args:
        space: float32 [V1, r].
        sums: float64 [B, r] of the vectors of the events that the record covers, and of the newer ones in the tail.
        recent: int64 [B, L] model rows of the tail, right-aligned; 0 pads.
    """
    rows = torch.from_numpy(recent[:, -NUM_POOLED:]).to(space.device)
    of_recent = space[rows].double().sum(1)
    return unit(torch.stack([sums.to(space.device), of_recent], 1))


def unit(sums: Tensor) -> Tensor:
    """float64 [..., r] -> float32 [..., r] of length 1; 0 stays 0."""
    length = sums.square().sum(-1, keepdim=True).sqrt()
    return (sums / length.masked_fill(length == 0, 1)).float()


def _space(user: Int, row: Int, num_rows: int, dim: int, seed: int) -> Float32s:
    """float32 [num_rows, dim] from distinct pairs of a user and a model row, int64 [E], sorted."""
    num_users = np.bincount(row, minlength=num_rows)
    _, user, length = np.unique(user, return_inverse=True, return_counts=True)
    kept = num_users[row] >= MIN_USERS
    user, row, weight = user[kept], row[kept], length[user[kept]] ** -0.5 * num_users[row[kept]] ** -0.25
    out = np.zeros((num_rows, dim), np.float32)
    if not len(row):
        return out
    shape = len(length), num_rows
    index, value = torch.from_numpy(np.stack([user, row])), torch.from_numpy(weight.astype(np.float32))
    matrix = torch.sparse_coo_tensor(index, value, shape, is_coalesced=True, check_invariants=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        left, scale, _ = torch.svd_lowrank(matrix, q=min(dim + OVERSAMPLING, *shape), niter=POWER_ITERATIONS)
    of_users = torch.where(scale > 1e-6 * scale.max(), left / scale, 0)[:, :dim]
    vectors = (matrix.t() @ of_users).double().numpy()
    size = np.linalg.norm(vectors, axis=1, keepdims=True)
    # Where an item has no part in these dimensions, only rounding errors remain.
    vectors = np.where(size > 1e-5 * size.max(), vectors / np.maximum(size, 1e-30), 0)
    out[:, : vectors.shape[1]] = np.round(vectors / ROUNDING) * ROUNDING
    return out
