"""Quality of counting baselines, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from vista.evaluation.per_user_metrics import PerUserMetrics, mean_and_error, per_user_path


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Metrics of each user, by baseline, and the names of the metrics that are printed."""

    per_user: dict[str, PerUserMetrics]
    shown: list[str]

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over users, by baseline and metric."""
        return {name: own.means() for name, own in self.per_user.items()}

    def save(self, out: str) -> None:
        """Write the metrics of each user where `vista compare` finds them under the name <out>.<baseline>."""
        for name, own in self.per_user.items():
            own.save(per_user_path(f"{out}.{name.replace(',', '').replace(' ', '-')}"))

    def __str__(self) -> str:
        lines = []
        for window in dict.fromkeys(name.partition("/")[2] for name in self.shown):
            names = [name for name in self.shown if name.partition("/")[2] == window]
            head = f"baselines, next {window.replace('-', ' ') or 'item'}"
            lines.append(f"{head:<34}" + "".join(f"{name.partition('/')[0]:>18}" for name in names).rstrip())
            for baseline, own in self.per_user.items():
                cells = ["{:.4f} ± {:.4f}".format(*mean_and_error(own.values[name])) for name in names]
                lines.append(f"  {baseline:<32}" + "".join(f"{cell:>18}" for cell in cells))
        return "\n".join(lines)
