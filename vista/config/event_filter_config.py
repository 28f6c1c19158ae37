"""Configuration of the events that ingest keeps."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require_counts


@dataclass(kw_only=True, slots=True)
class EventFilterConfig:
    """Which events of the source files become events of the log, as published protocols choose them."""

    actions: list[str] = field(default_factory=list)
    """Actions whose events are kept. Empty keeps all."""
    min_item_events: int = 1
    """Minimum number of events per item. Rarer items are dropped with their events and impressions, repeatedly, until
    this and min_user_events both hold."""
    min_user_events: int = 1
    """Minimum number of events per user. Users with fewer are dropped with their events and impressions."""

    def __post_init__(self) -> None:
        check_types(self, "filter.")
        require_counts(self, "filter.", ("min_item_events", "min_user_events"))

    @property
    def counts(self) -> bool:
        """Whether it counts the events of items or users."""
        return self.min_item_events > 1 or self.min_user_events > 1
