"""How much a user's next items follow the items' overall popularity.

Cosines to one user vector can hardly say "popular items" and "these similar items" at once. With this term the score
of item i is (cos(u, v_i) + T β(u) popularity_i) / T, an inner product of vectors with one more dimension. So rankings
and nearest-neighbor indexes need no change.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn


class PopularityTerm(nn.Module):
    """β(u), a linear function of the unit user vector. It starts at 1: where cosines say nothing, items have the
    probability of their popularity."""

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Linear(dim, 1)
        nn.init.zeros_(self.weight.weight)
        nn.init.ones_(self.weight.bias)

    def forward(self, unit: Tensor) -> Tensor:
        """Unit user vectors [..., M] -> retrieval vectors [..., M + 1], which end with T β(u)."""
        with torch.autocast(unit.device.type, enabled=False):
            unit = unit.to(self.weight.weight.dtype)
            strength = self.weight(unit * math.sqrt(unit.shape[-1]))  # entries near 0 ± 1
            return torch.cat([unit, self.temperature * strength], -1)


def standardized_popularity(frequency: NDArray[np.int64], num_items: int) -> NDArray[np.float64]:
    """float64 [num_items] log frequencies with mean 0 and standard deviation 1.

    Args:
        frequency: int64 [at most num_items] events of each item; items beyond have none.
    """
    log_frequency = np.zeros(num_items)
    log_frequency[: len(frequency)] = np.log(np.maximum(frequency, 1))
    centered = log_frequency - log_frequency.mean()
    standardized: NDArray[np.float64] = centered / max(float(centered.std()), 1e-6)
    return standardized
