"""Quality of counting baselines, as a table."""

from __future__ import annotations

from dataclasses import dataclass

from vista.evaluation.per_user_metrics import PerUserMetrics, mean_cells, per_user_path


@dataclass(frozen=True, slots=True)
class BaselineReport:
    """Metrics of each user, by baseline."""

    per_user: dict[str, PerUserMetrics]
    tables: dict[str, dict[str, str]]
    """What is printed: {"next 50 events": {"precision@10": "precision@10/50-events", …}, …}, names by column."""

    def metrics(self) -> dict[str, dict[str, float]]:
        """Means over users, by baseline and metric."""
        return {name: own.means() for name, own in self.per_user.items()}

    def save(self, out: str) -> None:
        """Write the metrics of each user where `vista compare` finds them under the name <out>.<baseline>."""
        for name, own in self.per_user.items():
            own.save(per_user_path(f"{out}.{name.replace(',', '').replace(' ', '-')}"))

    def __str__(self) -> str:
        lines = []
        for title, columns in self.tables.items():
            lines.append(f"{'baselines, ' + title:<34}" + "".join(f"{head:>18}" for head in columns).rstrip())
            for baseline, own in self.per_user.items():
                lines.append(f"  {baseline:<32}" + mean_cells([own.values[name] for name in columns.values()]))
        return "\n".join(lines)
