"""The report of `vista simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from vista.simulation.oracle import OracleMetrics, format_oracle_metrics


@dataclass(frozen=True, slots=True)
class SimulationReport:
    """What a simulation wrote, and how long it took."""

    out: Path
    num_users: int
    num_events: int
    num_impressions: int
    validation_from: int
    """Suggested split, ms: labels from this time on are validation labels."""
    test_from: int
    """Suggested split, ms: labels from this time on are test labels."""
    generate_s: float
    write_s: float
    reference: tuple[OracleMetrics, ...] = ()
    """The best possible metrics, if the config asks for them."""

    def __str__(self) -> str:
        rate = self.num_events / max(self.generate_s, 1e-9)
        text = (
            f"{self.out}: {self.num_users} users, {self.num_events} events, {self.num_impressions} impressions; "
            f"generated in {self.generate_s:.2f} s ({rate / 1e6:.2f}M events/s), written in {self.write_s:.2f} s "
            f"(together {self.num_events / max(self.generate_s + self.write_s, 1e-9) / 1e6:.2f}M events/s)"
        )
        return f"{text}\n{format_oracle_metrics(self.reference)}" if self.reference else text
