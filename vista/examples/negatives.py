"""Negatives of the sampled softmax, shared by a batch, with the correction for the distribution they are drawn from.

The softmax over the catalog is estimated as e^{s+} + sum_j c_j / (J q_j) e^{s_j} over the distinct drawn items j, where
item j was drawn c_j times in J draws from q (Bengio and Senécal 2008; Yi et al., RecSys 2019: "logQ").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.errors import DataError


class NegativeSampler:
    """Draws item rows in proportion to frequency ** power. Power 0 is uniform over the items that occur."""

    def __init__(self, item_counts: NDArray[np.int64], *, num_negatives: int, power: float) -> None:
        """
        Args:
            item_counts: int64 [V], how often each model row occurs in training; rows with 0 are never drawn. Estimates
                are enough: the correction uses the probabilities of the draws, so errors do not bias it.
            num_negatives: draws per batch.
            power: exponent of the frequencies.

        Raises:
            DataError: if no item occurs.
        """
        self.items = np.flatnonzero(item_counts)
        if len(self.items) == 0:
            raise DataError("no item occurs in training; check that data.validation_from lies after the first events")
        self.num_negatives = num_negatives
        weight = item_counts[self.items].astype(np.float64) ** power
        self.probability = weight / weight.sum()
        self._cumulative = np.cumsum(self.probability)
        self._uniform = power == 0.0

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw the negatives of one batch.

        Returns:
            (items, log_weight): int64 [J] distinct sorted item rows, float32 [J] log of c_j / (draws * q_j). With at
            least as many negatives as items, every item comes once with weight 1, which gives the exact softmax.
        """
        count, total = self.num_negatives, len(self.items)
        if count >= total:
            return self.items, np.zeros(total, np.float32)
        if self._uniform:
            # Without replacement: an item is included with probability count / total.
            picked = np.sort(rng.choice(total, count, replace=False, shuffle=False))
            return self.items[picked], np.full(count, np.log(total / count), np.float32)
        drawn = np.minimum(np.searchsorted(self._cumulative, rng.random(count)), total - 1)
        picked, times = np.unique(drawn, return_counts=True)
        return self.items[picked], np.log(times / (count * self.probability[picked])).astype(np.float32)
