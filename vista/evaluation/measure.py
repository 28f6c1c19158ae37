"""What a report compares: one metric of several predictors over the same cases."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.evaluation.estimate import Estimate


class Measure(Protocol):
    """A metric of several predictors over N cases, of which a part can be selected."""

    @property
    def title(self) -> str:
        """Name of the metric and of what it is measured on: "AUC of click"."""

    @property
    def metric(self) -> str:
        """Name of the metric alone, as in tables: "ndcg@10"."""

    @property
    def user(self) -> Int:
        """int64 [N] rows of the log."""

    @property
    def seen(self) -> Int:
        """int64 [N] events before the question."""

    @property
    def item(self) -> Int | None:
        """int64 [N] labels or candidates, rows of the log; None if a case has several."""

    @property
    def names(self) -> list[str]:
        """The predictors; the run of the report comes first."""

    def estimates(self, part: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """The metric of each predictor over a part of the cases, bool [N], or over all of them."""

    def gains(self) -> dict[str, Estimate]:
        """The metric of the first predictor minus that of each other one, with paired intervals."""
