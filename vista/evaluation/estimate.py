"""A number with its 95 % interval over users."""

from __future__ import annotations

import math
from dataclasses import dataclass

from vista.arrays import Floats
from vista.evaluation.comparison import NORMAL_95
from vista.evaluation.per_user_metrics import mean_and_error


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with a 95 % interval, which is NaN where there are too few users."""

    value: float
    half_width: float = float("nan")

    @classmethod
    def of_users(cls, values: Floats) -> Estimate:
        """Mean of a value per user; NaN stands for users without one."""
        mean, error = mean_and_error(values)
        return cls(mean, NORMAL_95 * error)

    def ends(self) -> tuple[float, float]:
        """Ends of the interval."""
        return self.value - self.half_width, self.value + self.half_width

    @property
    def is_clear(self) -> bool:
        """Of a difference: whether its interval does not contain 0."""
        return abs(self.value) > self.half_width

    def text(self, *, signed: bool = False) -> str:
        """As a cell of a table: 0.7863 ± 0.0041; a dash if it is not defined."""
        if not math.isfinite(self.value):
            return "–"
        value = f"{self.value:+.4f}" if signed else f"{self.value:.4f}"
        return f"{value} ± {self.half_width:.4f}" if math.isfinite(self.half_width) else value
