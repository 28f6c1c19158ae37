"""What a refresh reports when it ends."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from vista.log.segment_files import StreamPartition


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


# Seconds per stage of a refresh.

STAGES = ("read", "summarize", "encode", "wait", "write", "publish")
"""In a refresh with Ray, `wait` is the time until the actors return the next batch, and the first three are theirs."""


class StageClock:
    """Adds up the seconds that are spent in each of `STAGES`."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)
        self._stage, self._entered = "", 0.0

    def stage(self, name: str) -> Self:
        """Context whose time counts toward a stage."""
        self._stage = name
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.seconds[self._stage] += time.perf_counter() - self._entered


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


@dataclass(frozen=True, slots=True)
class WatchReport:
    """What one look did."""

    files: int
    """Files appended to the log."""
    refused: int
    """Files that cannot be read; they are listed in `<folder>/refused`, and tried again only after they change."""
    refreshes: list[RefreshReport]
    """One report per store or shard that was updated; empty if nothing was new."""
    lag_s: float | None
    """Seconds from the arrival of the oldest file or message, or of a segment of another process, until all was
    published. The arrival of a message is its time in the topic."""
    stream: StreamReport | None
    """Messages read from topics; None without a source."""
    seconds: float
    """Seconds that the look took."""

    @property
    def is_empty(self) -> bool:
        """Whether nothing had arrived."""
        messages = 0 if self.stream is None else self.stream.messages
        return not (self.files or self.refused or self.refreshes or messages)

    @property
    def is_behind(self) -> bool:
        """Whether more messages are waiting, so that the next look should follow at once."""
        return self.stream is not None and any(self.stream.behind.values())

    def as_json(self) -> dict[str, Any]:
        """The report as JSON values. `checked_at` is the present time in seconds since 1970."""
        fields: dict[str, Any] = {
            "checked_at": round(time.time(), 3),
            "seconds": round(self.seconds, 3),
            "files": self.files,
            "refused": self.refused,
            "refreshed_users": sum(refresh.num_users for refresh in self.refreshes),
            "lag_s": None if self.lag_s is None else round(self.lag_s, 3),
        }
        return fields if self.stream is None else fields | {"stream": self.stream.as_json(self.seconds)}

    def __str__(self) -> str:
        lag = "" if self.lag_s is None else f", {self.lag_s:.1f} s after it arrived"
        refused = f", {self.refused} refused" if self.refused else ""
        arrived = f"{self.files} file(s){refused}" if self.stream is None else self.stream.described(self.seconds)
        return f"{arrived}{lag}: {'; '.join(map(str, self.refreshes)) or 'nothing new'}"
