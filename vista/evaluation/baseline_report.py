"""Quality of counting baselines, as a table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vista.evaluation.per_user_metrics import PerUserMetrics, mean_cell, per_user_path, table_of_means


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Metrics of each user, by baseline."""

    per_user: dict[str, PerUserMetrics]
    tables: dict[str, dict[str, str]]
    """What is printed: {"next 50 events": {"precision@10": "precision@10/50-events", …}, …}, names by column."""

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over users, by baseline and metric."""
        return {name: own.means() for name, own in self.per_user.items()}

    def ahead_of(self, model: Mapping[str, float]) -> list[str]:
        """The metrics in which the best baseline is ahead of a model: "hr@10 0.1200 (own frequency: 0.1300)"."""
        measured, found = self.metrics(), []
        for name in dict.fromkeys(name for metrics in measured.values() for name in metrics):
            best = max(measured, key=lambda baseline: measured[baseline].get(name, -math.inf))
            value, bar = model.get(name, math.nan), measured[best][name]
            if value < bar:  # not if one is undefined
                found.append(f"{name} {value:.4f} ({best}: {bar:.4f})")
        return found

    def save(self, out: str) -> None:
        """Write the metrics of each user where `vista compare` finds them under the name <out>.<baseline>."""
        for name, own in self.per_user.items():
            own.save(per_user_path(f"{out}.{name.replace(',', '').replace(' ', '-')}"))

    def __str__(self) -> str:
        tables = []
        for title, columns in self.tables.items():
            header = [f"baselines, {title}", *columns]
            rows = [
                [baseline, *(mean_cell(own.values[name]) for name in columns.values())]
                for baseline, own in self.per_user.items()
            ]
            tables.append(table_of_means(header, rows, 34))
        return "\n".join(tables)
