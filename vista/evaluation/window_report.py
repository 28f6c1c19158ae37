"""Quality over windows, as a table with standard errors over users."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from vista.arrays import Floats
from vista.evaluation.per_user_metrics import mean_and_error, mean_cells
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
        lines = []
        for window, metrics in self.windows.items():
            names = [name for name in metrics if ":" not in name]
            head, kinds = f"next {window}", [kind for kind in KINDS if names[0] + kind in metrics]
            lines.append(f"{head:<20}" + "".join(f"{kind[1:] or 'all':>18}" for kind in kinds).rstrip())
            counts = [np.count_nonzero(~np.isnan(metrics[names[0] + kind])) for kind in kinds]
            lines.append(f"  {'users':<18}" + "".join(f"{count:>18}" for count in counts))
            for name in names:
                lines.append(f"  {name:<18}" + mean_cells([metrics[name + kind] for kind in kinds]))
        return "\n".join(lines)


def window_metric(name: str, window: str) -> str:
    """Name of a metric of one window: "precision@10/50-events"."""
    return f"{name}/{window.replace(' ', '-')}"
