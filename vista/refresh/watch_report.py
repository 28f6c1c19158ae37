"""What one look of a watch brought into the store."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from vista.refresh.refresh_report import RefreshReport
from vista.refresh.stream_report import StreamReport


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
