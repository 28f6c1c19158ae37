"""Quality over windows, as a table with standard errors over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Floats
from vista.evaluation.per_user_metrics import mean_and_error, mean_cell, table_of_means
from vista.evaluation.window_metrics import KINDS


@dataclass(frozen=True, slots=True)
class WindowReport:
    """Metrics of N users over windows of one or several lengths."""

    windows: dict[str, dict[str, Floats]]
    """{"50 events": {"precision@10:new": float64 [N], …}, …}"""

    def per_user(self) -> dict[str, Floats]:
        """{"precision@10:new/50-events": float64 [N], …}"""
        return {
            window_metric(name, window): values
            for window, metrics in self.windows.items()
            for name, values in metrics.items()
        }

    def metrics(self) -> dict[str, float]:
        """Means over the users who have labels of the kind, by the names of `per_user`."""
        return {name: mean_and_error(values)[0] for name, values in self.per_user().items()}

    def __str__(self) -> str:
        tables = []
        for window, metrics in self.windows.items():
            names = [name for name in metrics if ":" not in name]
            kinds = [kind for kind in KINDS if names[0] + kind in metrics]
            header = [f"next {window}", *(kind[1:] or "all" for kind in kinds)]
            counts = [np.count_nonzero(~np.isnan(metrics[names[0] + kind])) for kind in kinds]
            rows = [["users", *map(str, counts)]]
            rows += [[name, *(mean_cell(metrics[name + kind]) for kind in kinds)] for name in names]
            tables.append(table_of_means(header, rows, 20))
        return "\n".join(tables)


def window_metric(name: str, window: str) -> str:
    """Name of a metric of one window: "precision@10/50-events"."""
    return f"{name}/{window.replace(' ', '-')}"
