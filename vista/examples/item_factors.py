"""Item vectors without a model: a factorization of which items lie close together in the training histories.

Positive pointwise mutual information with a smoothed context distribution (Levy, Goldberg, and Dagan, TACL 2015),
factorized by a randomized SVD (Halko, Martinsson, and Tropp, SIAM Review 2011). Letters: R items with pairs, M model
dim, P pairs of items, S columns of the sketch.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.examples.pair_counts import pair_counts
from vista.log.event_log import EventLog

SMOOTHING = 0.75
"""Exponent of the context counts. Below 1, rare contexts weigh less."""
MOST_EVENTS = 1 << 20
"""Events whose pairs are counted: those of random users if there are more. It bounds the memory: about 1 GB."""
OVERSAMPLING = 16
"""Columns of the sketch beyond M."""
POWER_ITERATIONS = 4
START_RMS = 0.05
"""Root mean square of each row's values."""


def item_factors(log: EventLog, item_rows: Int, counts: Int, dim: int, *, seed: int) -> tuple[Int, NDArray[np.float32]]:
    """Factorize the co-occurrences of items among the visible events.

    Items whose pairs are all rarer than chance have no vector, like those without pairs.

    Args:
        item_rows: int64 [log.num_items], the model row of each of the log's items; 0 is the unknown item.
        counts: int64 [num_users], visible events per user. Nothing after them is read.
        dim: number of columns M.
        seed: of the sketch, and of the choice of users.

    Returns:
        Sorted model rows int64 [R], and their vectors float32 [R, M], each with the same root mean square.
    """
    rng = np.random.default_rng(seed)
    low, high, times = pair_counts(log, item_rows, counts, most_events=MOST_EVENTS, rng=rng)
    rows, index = np.unique(np.concatenate([low, high]), return_inverse=True)
    if not len(rows):
        return rows, np.zeros((0, dim), np.float32)
    first, second = index[: len(low)], index[len(low) :]
    # Both orders of a pair, sorted as a coalesced tensor needs them.
    left, right, twice = np.concatenate([first, second]), np.concatenate([second, first]), np.tile(times, 2)
    order = np.lexsort((right, left))
    value = _ppmi(left, right, twice, len(rows))
    vectors = _factorized(left[order], right[order], value[order], len(rows), dim, seed)
    length = np.sqrt(np.mean(vectors**2, axis=1))
    kept = length > 1e-6 * length.max()
    return rows[kept], (vectors[kept] * (START_RMS / length[kept, None])).astype(np.float32)


def _ppmi(left: Int, right: Int, count: Int, size: int) -> NDArray[np.float32]:
    """max(0, log(N_ij * sum_k n_k^s / (n_i * n_j^s))) of each ordered pair, where s is SMOOTHING."""
    total = np.bincount(left, count, size)
    context = total**SMOOTHING
    ratio = count * context.sum() / (total[left] * context[right])
    value: NDArray[np.float32] = np.maximum(np.log(ratio), 0).astype(np.float32)
    return value


def _factorized(
    left: Int, right: Int, value: NDArray[np.float32], size: int, dim: int, seed: int
) -> NDArray[np.float64]:
    """U sqrt(S) [size, dim] of the truncated SVD of a sparse matrix whose entries are sorted by row and column."""
    index, values = torch.from_numpy(np.stack([left, right])), torch.from_numpy(value)
    matrix = torch.sparse_coo_tensor(index, values, (size, size), is_coalesced=True, check_invariants=False)
    turned = matrix.t().coalesce()
    sketch = min(dim + OVERSAMPLING, size)
    basis = torch.randn(size, sketch, generator=torch.Generator().manual_seed(seed))
    basis = _orthonormal(torch.sparse.mm(matrix, basis))
    for _ in range(POWER_ITERATIONS):
        basis = _orthonormal(torch.sparse.mm(turned, basis))
        basis = _orthonormal(torch.sparse.mm(matrix, basis))
    small = torch.sparse.mm(turned, basis)  # [size, S], the transposed projection
    _, scale, rotation = torch.linalg.svd(small, full_matrices=False)
    found = (basis @ rotation.t() * scale.sqrt())[:, :dim].double().numpy()
    return np.pad(found, ((0, 0), (0, dim - found.shape[1])))


def _orthonormal(matrix: Tensor) -> Tensor:
    basis: Tensor = torch.linalg.qr(matrix).Q
    return basis
