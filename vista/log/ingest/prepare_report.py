"""The report of an ingest."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What `prepare` wrote, and how long each stage took.

    num_users and num_items count the whole log, the other numbers only the new segment. kept: how many rows a filter
    kept, as text; empty without one. first_ms, last_ms: oldest and newest time of the events, None in a log without
    times. features: a line per column of features of items and users. stages: seconds for open (with digests), read
    (parse, check, and filter), vocabularies, sort (join and sort), write, and sync (fsync and rename).
    """

    path: Path
    segment: int
    num_users: int
    num_items: int
    num_events: int
    num_impressions: int
    num_quarantined: int
    quarantine: Path | None
    kept: str
    first_ms: int | None
    last_ms: int | None
    features: list[str]
    stages: dict[str, float]
    warnings: list[str] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Total time."""
        return sum(self.stages.values())

    @property
    def rows_per_second(self) -> float:
        """Good rows (events and impressions) divided by the total time."""
        return (self.num_events + self.num_impressions) / max(self.seconds, 1e-9)

    @property
    def shares(self) -> dict[str, float]:
        """Share of each stage in the total time."""
        return {stage: seconds / max(self.seconds, 1e-9) for stage, seconds in self.stages.items()}

    def __str__(self) -> str:
        times = "order only"
        if self.first_ms is not None and self.last_ms is not None:
            days = [datetime.fromtimestamp(ms / 1000, UTC).date().isoformat() for ms in (self.first_ms, self.last_ms)]
            times = f"{days[0]} to {days[1]}"
        content = f"{self.num_events:,} events ({times}) and {self.num_impressions:,} impressions"
        if not self.num_events:
            content = "features only"
        lines = [
            f"{self.path}: segment {self.segment} with {content}; the log has {self.num_users:,} users and "
            f"{self.num_items:,} items",
            f"{self.seconds:.2f} s, {self.rows_per_second:,.0f} rows/s: "
            + ", ".join(f"{stage} {share:.0%}" for stage, share in self.shares.items()),
            *([self.kept] if self.kept else []),
            *(f"feature {line}" for line in self.features),
        ]
        if self.quarantine is not None:
            lines.append(f"{self.num_quarantined:,} bad rows set aside in {self.quarantine}")
        return "\n".join(lines + [f"warning: {warning}" for warning in self.warnings])
