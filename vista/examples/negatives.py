"""Negatives of the sampled softmax, shared by a batch, with the correction for how they were really drawn.

The softmax over the catalogue is estimated as e^{s+} + sum_j c_j / (J q_j) e^{s_j} over the distinct drawn items j,
with c_j the times that j was drawn in J draws from q (Bengio and Senécal 2008; Yi et al., RecSys 2019: "logQ").
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vista.errors import DataError


class NegativeSampler:
    """Draws item rows in proportion to frequency ** power; power 0 is uniform over the items that occur."""

    def __init__(self, item_counts: NDArray[np.int64], *, num_negatives: int, power: float) -> None:
        """item_counts: int64 [V], how often each model row occurs in training; rows with 0 are never drawn.

        Estimates will do: the correction is for what is drawn, so their errors do not bias it.
        """
        self.items = np.flatnonzero(item_counts)
        if len(self.items) == 0:
            raise DataError("no item occurs in training; is data.validation_from before the first event?")
        self.num_negatives = num_negatives
        weight = item_counts[self.items].astype(np.float64) ** power
        self.probability = weight / weight.sum()
        self._cumulative = np.cumsum(self.probability)
        self._uniform = power == 0.0

    def draw(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Draw the negatives of one batch.

        Returns:
            (items, log_weight): int64 [J] distinct sorted item rows, float32 [J] log of c_j / (draws * q_j). With as
            many negatives as there are items every item comes once with weight 1: the exact softmax.
        """
        count, total = self.num_negatives, len(self.items)
        if count >= total:
            return self.items, np.zeros(total, np.float32)
        if self._uniform:
            # Without replacement: an item is in with probability count / total.
            picked = np.sort(rng.choice(total, count, replace=False, shuffle=False))
            return self.items[picked], np.full(count, np.log(total / count), np.float32)
        drawn = np.minimum(np.searchsorted(self._cumulative, rng.random(count)), total - 1)
        picked, times = np.unique(drawn, return_counts=True)
        return self.items[picked], np.log(times / (count * self.probability[picked])).astype(np.float32)
