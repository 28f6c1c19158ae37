"""Configuration of `vista simulate`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from vista.config.checks import check_types, require, require_counts
from vista.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SimulateConfig:
    """A simulated lifelong log with impressions whose true label probabilities are known."""

    out: str = "data/simulated"
    """Folder that receives events.parquet, impressions.parquet and items.parquet, which `prepare` reads."""
    num_users: int = 400
    """Users of the log."""
    events_per_user: int = 4000
    """Mean length of a history; lengths spread around it."""
    num_items: int = 1600
    """Items of the log."""
    num_topics: int = 32
    """Latent topics, at most 256; every item belongs to one."""
    min_interests: int = 4
    """Fewest slow interests of a user."""
    max_interests: int = 6
    """Most slow interests of a user: topics that return throughout the history."""
    episode_events: int = 450
    """Mean length of an episode, in events; a user's slow interests take turns, one an episode."""
    session_events: int = 20
    """Mean length of a session, in events."""
    impressions_per_user: int = 300
    """Labeled impressions per user."""
    impressions_per_request: int = 4
    """Candidates shown at one moment."""
    start: str = "2024-01-01"
    """First day of the simulated period, an ISO date (UTC)."""
    days: float = 730.0
    """Length of the simulated period; users' lives fill it."""
    seed: int = 1
    """Seed of the random numbers."""
    num_threads: int = 1
    """Threads that generate; the bytes do not depend on them."""
    reference: bool = False
    """Also report the best possible AUC and NE: of the truth, and of the last 200 and 32 events (some seconds)."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("num_users", "events_per_user", "num_items", "num_topics", "episode_events", "session_events")
        require_counts(self, "", (*counts, "impressions_per_user", "impressions_per_request", "num_threads"))
        require_counts(self, "", ("seed",), least=0)
        try:
            datetime.fromisoformat(self.start)
        except ValueError as error:
            raise ConfigError(f"start: {error}; write a date such as 2024-01-01") from None
        topics, items, low, high = self.num_topics, self.num_items, self.min_interests, self.max_interests
        require(topics <= 256, "num_topics", f"must be at most 256, got {topics}")
        require(items >= topics, "num_items", f"must be at least num_topics={topics}, got {items}")
        message = f"needs 1 <= min_interests <= max_interests < num_topics, got {low}, {high}, {topics}"
        require(1 <= low <= high < topics, "max_interests", message)
        message = f"must be at least 1 and one more a million events a user, and at most 36500, got {self.days}"
        require(1 + self.events_per_user / 1e6 <= self.days <= 36_500, "days", message)
