"""What a refresh reports when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class RefreshReport:
    """What a refresh did."""

    store: str
    generation: int
    num_users: int
    """Users that the run covers: all users with events, or those with changes."""
    resumed_at: int
    """How many of these users an earlier, interrupted run had already written."""
    num_events: int
    """Events summarized in this run."""
    seconds: float
    shares: dict[str, float]
    """Share of the time per stage; the shares add up to 1."""
    counts: dict[str, int] = field(default_factory=dict)
    """Users by outcome: written, appended, exchanged, recomputed, removed, erased, unchanged, failed."""
    failures: dict[str, str] = field(default_factory=dict)
    """Some of the users that failed, with the reason; their old records, if any, stay."""
    bytes_per_user: float = 0.0
    """Mean size of the records that this run wrote; 0 if it wrote none."""

    def __str__(self) -> str:
        done = self.num_users - self.resumed_at
        stages = ", ".join(f"{name} {share:.0%}" for name, share in self.shares.items() if share)
        resumed = f" ({self.resumed_at} of them by an earlier run)" if self.resumed_at else ""
        size = f", {self.bytes_per_user:,.0f} bytes per user" if self.bytes_per_user else ""
        counts = "".join(f"; {number} {what}" for what, number in self.counts.items() if number)
        failed = "".join(f"\nuser {user} failed: {reason}" for user, reason in self.failures.items())
        return (
            f"generation {self.generation} of {self.store}: {self.num_users} users{resumed}, {self.num_events} events "
            f"in {self.seconds:.1f} s: {done / max(self.seconds, 1e-9):,.0f} users/s ({stages}){size}{counts}{failed}"
        )
