"""What one look of a watch read from topics, and how far it is behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vista.log.segment_files import StreamPartition

_NAMED = 3


@dataclass(frozen=True, slots=True)
class StreamReport:
    """Messages that one look read. All of them are in the log, as events or as dead letters."""

    messages: int
    dead_letters: int
    """Messages that are not valid events."""
    behind: Mapping[StreamPartition, int]
    """Messages per partition that the topic held when the look began, but that it did not read."""
    oldest_ms: int | None
    """Time of the oldest message in ms; None if no message has a time."""

    def described(self, seconds: float) -> str:
        """One line, with the rate of a look that took so many seconds."""
        letters = f", {self.dead_letters:,} of them dead letters" if self.dead_letters else ""
        rate = f" ({self.messages / max(seconds, 1e-9):,.0f}/s)" if self.messages else ""
        late = sorted(
            ((number, partition) for partition, number in self.behind.items() if number), key=lambda entry: -entry[0]
        )
        behind = ""
        if late:
            named = "; ".join(f"{partition}: {number:,}" for number, partition in late[:_NAMED])
            more = f"; and {len(late) - _NAMED} more partitions" if len(late) > _NAMED else ""
            behind = f", {sum(number for number, _ in late):,} behind ({named}{more})"
        return f"{self.messages:,} message(s){rate}{letters}{behind}"

    def as_json(self, seconds: float) -> dict[str, Any]:
        """The report of a look that took so many seconds, as JSON values; `behind` by topic and partition."""
        behind: dict[str, dict[str, int]] = {}
        for partition, number in sorted(self.behind.items()):
            behind.setdefault(partition.topic, {})[str(partition.number)] = number
        return {
            "messages": self.messages,
            "dead_letters": self.dead_letters,
            "messages_per_s": round(self.messages / max(seconds, 1e-9), 1),
            "behind": behind,
        }
