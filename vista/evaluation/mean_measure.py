"""A metric that every user has, such as the NDCG of the next item, averaged over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.estimate import Estimate


@dataclass(frozen=True, slots=True)
class MeanMeasure:
    """Mean of a metric over N users; a `Measure`."""

    title: str
    metric: str
    user: Int
    seen: Int
    item: Int | None
    values: dict[str, Floats]
    """{predictor: float64 [N]}; NaN for users without a label."""

    @property
    def names(self) -> list[str]:
        return list(self.values)

    def estimates(self, part: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """Mean of each predictor over users."""
        chosen = slice(None) if part is None else part
        return {name: Estimate.of_users(each[chosen]) for name, each in self.values.items()}

    def gains(self) -> dict[str, Estimate]:
        """Mean difference per user of the first predictor and each other one."""
        own, *others = self.names
        return {name: Estimate.of_users(self.values[own] - self.values[name]) for name in others}
