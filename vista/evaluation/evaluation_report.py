"""The result of an evaluation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vista.arrays import Float32s, Int
from vista.evaluation.baseline_report import BaselineReport
from vista.evaluation.cases import ImpressionCases
from vista.evaluation.per_user_metrics import PerUserMetrics
from vista.evaluation.popularity_report import PopularityReport
from vista.evaluation.recall import RecallReport
from vista.evaluation.window_report import WindowReport
from vista.text_table import fitted


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Metrics, and the cases that they were computed from, for reports."""

    metrics: dict[str, float]
    num_cases: int
    seconds: float
    ranks: Int | None = None
    impressions: ImpressionCases | None = None
    probabilities: Float32s | None = None
    popularity: PopularityReport | None = None
    recall: RecallReport | None = None
    per_user: PerUserMetrics | None = None
    windows: WindowReport | None = None
    baselines: BaselineReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values: metrics (null where undefined), standard errors over users, num_cases, seconds, baselines."""
        errors = {} if self.per_user is None else self.per_user.standard_errors()
        values = {
            "metrics": _finite(self.metrics),
            "standard_errors": _finite(errors),
            "num_cases": self.num_cases,
            "seconds": self.seconds,
        }
        if self.baselines is not None:
            values["baselines"] = {name: _finite(metrics) for name, metrics in self.baselines.metrics().items()}
        return values

    def __str__(self) -> str:
        # Reports print their own numbers, as tables.
        reports = [report for report in (self.windows, self.popularity, self.recall) if report is not None]
        hidden = {name for report in reports for name in report.metrics()}
        lines = [f"{self.num_cases} cases in {self.seconds:.1f} s"]
        lines += [f"  {name:<20} {value:.4f}" for name, value in self.metrics.items() if name not in hidden]
        lines = [fitted(line, 4) for line in lines]
        lines += map(str, reports)
        if self.baselines is not None:
            lines.append(str(self.baselines))
            if below := self.baselines.ahead_of(self.metrics):
                lines.append(fitted(f"the model is below a baseline: {', '.join(below)}"))
        return "\n".join(lines)


def _finite(values: dict[str, float]) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}
