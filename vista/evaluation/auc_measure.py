"""AUC of a task, with intervals over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.estimate import Estimate
from vista.evaluation.metrics import auc
from vista.evaluation.user_bootstrap import drawn_aucs


@dataclass(frozen=True, slots=True)
class AucMeasure:
    """AUC of one task over N impressions; a `Measure`."""

    task: str
    user: Int
    seen: Int
    item: Int | None
    label: NDArray[np.float32]
    """[N] of 0 and 1."""
    probabilities: dict[str, NDArray[np.floating]]
    """{predictor: [N]}."""

    @property
    def title(self) -> str:
        return f"AUC of {self.task}"

    @property
    def metric(self) -> str:
        return "AUC"

    @property
    def names(self) -> list[str]:
        return list(self.probabilities)

    def estimates(self, part: NDArray[np.bool_] | None = None) -> dict[str, Estimate]:
        """AUC of each predictor; the interval is that of the draws. NaN where a class is absent."""
        chosen = slice(None) if part is None else part
        label = self.label[chosen]
        if len(np.unique(label)) < 2:
            return dict.fromkeys(self.names, Estimate(float("nan")))
        scores = {name: each[chosen] for name, each in self.probabilities.items()}
        draws = drawn_aucs(self.user[chosen], label, scores)
        return {name: Estimate(auc(label, scores[name]), half_width(draws[name])) for name in scores}

    def gains(self) -> dict[str, Estimate]:
        """Differences of the first predictor, whose intervals come from draws of the same users."""
        draws = drawn_aucs(self.user, self.label, self.probabilities)
        values = {name: auc(self.label, each) for name, each in self.probabilities.items()}
        own, *others = self.names
        return {name: Estimate(values[own] - values[name], half_width(draws[own] - draws[name])) for name in others}


def half_width(draws: Floats) -> float:
    """Half of the 95 % interval, from the 2.5 % and 97.5 % quantiles of the draws; NaN without draws."""
    known = draws[np.isfinite(draws)]
    if len(known) < 2:
        return float("nan")
    low, high = np.quantile(known, [0.025, 0.975])
    return float(high - low) / 2
