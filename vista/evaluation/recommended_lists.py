"""What the retrieval head recommends, counted over many users."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.metrics import top_items
from vista.ranks import Ranks


class RecommendedLists:
    """Counts of the items in lists of length k. `add` is the `observe` of `protocol.rank_next_items`."""

    def __init__(self, num_items: int, k: int) -> None:
        self.k = k
        self.num_lists = 0
        self.counts = np.zeros(num_items, np.int64)
        """int64 [V]: lists that hold the item."""
        self._targets: list[Int] = []
        self._score_sum = np.zeros(num_items, np.float64)

    def add(self, scores: NDArray[np.float32], target: Int, excluded: tuple[Int, Int] | None) -> None:
        """Count one batch.

        Args:
            scores: [n, V].
            target: int64 [n] columns of the labels, -1 where unknown.
            excluded: cells left out of the lists, as in `metrics.top_items`.
        """
        top = top_items(scores, target, self.k, excluded)
        self.counts += np.bincount(top[top >= 0], minlength=len(self.counts))
        self._score_sum += scores.sum(axis=0, dtype=np.float64)
        self.num_lists += len(scores)
        self._targets.append(target)

    def take_all(self, ranks: Ranks) -> None:
        """Take in the lists of the other ranks, whose cases follow one another."""
        all_lists = ranks.gather((self.num_lists, self.counts, self._score_sum, self.target))
        numbers, counts, score_sums, targets = zip(*all_lists, strict=True)
        self.num_lists, self._targets = sum(numbers), list(targets)
        self.counts, self._score_sum = np.sum(counts, axis=0), np.sum(score_sums, axis=0)

    @property
    def target(self) -> Int:
        """int64 [number of lists] columns of the labels, in the order in which they were added."""
        return np.concatenate([np.zeros(0, np.int64), *self._targets])

    @property
    def mean_scores(self) -> Floats:
        """float64 [V]: each item's score averaged over all users."""
        return self._score_sum / max(self.num_lists, 1)
