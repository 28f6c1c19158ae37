"""Configuration of `vista simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from vista.config.checks import MAX_DAYS, MAX_THREADS, check_types, require, require_counts
from vista.config.choices import WorldName
from vista.errors import ConfigError

MAX_ROWS = 10**9
"""Most events, and most impressions. A simulation is made in memory, at up to 40 bytes per row."""


@dataclass(kw_only=True, slots=True)
class SimulateConfig:
    """A simulated log of long histories, with impressions whose true label probabilities are known."""

    out: str = "data/simulated"
    """Folder for events.parquet, impressions.parquet, and items.parquet, which `vista prepare` reads."""
    world: WorldName = WorldName.share
    """What decides a click (docs/explanation/simulation.md). Only share has the tasks like and long_view."""
    num_users: int = 400
    """Number of users."""
    events_per_user: int = 4000
    """Mean number of events per user. Lengths vary around it."""
    num_items: int = 1600
    """Number of items, at least num_topics."""
    num_topics: int = 32
    """Number of latent topics, at most 256. Every item belongs to one."""
    min_interests: int = 4
    """Minimum number of slow interests per user: topics that return throughout the history."""
    max_interests: int = 6
    """Maximum number of slow interests per user, below num_topics."""
    episode_events: int = 450
    """Mean length of an episode, in events. A user's slow interests take turns, one per episode."""
    session_events: int = 20
    """Mean length of a session, in events."""
    impressions_per_user: int = 300
    """Number of impressions per user."""
    impressions_per_request: int = 4
    """Number of candidates that are shown at the same time."""
    start: str = "2024-01-01"
    """First day of the simulated period, an ISO date or time (UTC)."""
    days: float = 730.0
    """Length of the simulated period in days. Histories fill it."""
    seed: int = 1
    """Seed of all random numbers. The same seed gives the same files."""
    num_threads: int = 1
    """Number of threads. It does not change the result."""
    reference: bool = False
    """Also report the best possible AUC and NE: those of the oracle, which knows the true probabilities, those possible
    from the last 2,000, 200, and 32 events, and those of the best linear function of pooled vectors. Takes some
    seconds."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("num_users", "events_per_user", "num_items", "num_topics", "episode_events", "session_events")
        require_counts(self, "", (*counts, "impressions_per_user", "impressions_per_request"), most=MAX_ROWS)
        for key in ("events_per_user", "impressions_per_user"):
            rows = self.num_users * getattr(self, key)
            require(rows <= MAX_ROWS, "num_users", f"times {key} must be at most {MAX_ROWS:,}, got {rows:,}")
        require_counts(self, "", ("num_threads",), most=MAX_THREADS)
        require_counts(self, "", ("seed",), least=0)
        try:
            datetime.fromisoformat(self.start)
        except ValueError as error:
            raise ConfigError(f"start: {error}; write a date such as 2024-01-01") from None
        topics, items, low, high = self.num_topics, self.num_items, self.min_interests, self.max_interests
        require(topics <= 256, "num_topics", f"must be at most 256, got {topics}")
        require(items >= topics, "num_items", f"must be at least num_topics={topics}, got {items}")
        require(
            1 <= low <= high < topics,
            "max_interests",
            f"needs 1 <= min_interests <= max_interests < num_topics, got {low}, {high}, {topics}",
        )
        if self.world != WorldName.share:
            taken = 2 * high if self.world == WorldName.conjunction else high
            message = (
                f"must be at least {taken + 2} with world={self.world.value} and max_interests={high}, got {topics}"
            )
            require(topics >= taken + 2, "num_topics", message)
        fewest_days = 1 + self.events_per_user / 1e6  # room for distinct times in milliseconds
        require(
            fewest_days <= self.days <= MAX_DAYS,
            "days",
            f"must lie in [{fewest_days:g}, {MAX_DAYS}] with events_per_user={self.events_per_user}, got {self.days}",
        )
