"""The result of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vista.arrays import Int
from vista.evaluation.cases import Floats, ImpressionCases
from vista.evaluation.popularity import PopularityReport
from vista.evaluation.recall import RecallReport


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics, and the cases that they were computed from, for reports."""

    metrics: dict[str, float]
    num_cases: int
    seconds: float
    ranks: Int | None
    impressions: ImpressionCases | None
    probabilities: Floats | None
    popularity: PopularityReport | None = None
    recall: RecallReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: metrics (null where undefined), num_cases, seconds."""
        metrics = {name: value if math.isfinite(value) else None for name, value in self.metrics.items()}
        return {"metrics": metrics, "num_cases": self.num_cases, "seconds": self.seconds}

    def __str__(self) -> str:
        # Reports print their own numbers, as tables.
        reports = [report for report in (self.popularity, self.recall) if report is not None]
        hidden = {name for report in reports for name in report.metrics()}
        lines = [f"{self.num_cases} cases in {self.seconds:.1f} s"]
        lines += [f"  {name:<20} {value:.4f}" for name, value in self.metrics.items() if name not in hidden]
        return "\n".join([*lines, *map(str, reports)])
