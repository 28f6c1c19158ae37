"""What one look of a watch brought into the store."""

from __future__ import annotations

from dataclasses import dataclass

from vista.refresh.refresh_report import RefreshReport


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
    """Seconds from the arrival of the oldest file, or of a segment of another process, until all was published."""

    def __str__(self) -> str:
        lag = "" if self.lag_s is None else f", {self.lag_s:.1f} s after it arrived"
        refused = f", {self.refused} refused" if self.refused else ""
        return f"{self.files} file(s){refused}{lag}: {'; '.join(map(str, self.refreshes)) or 'nothing new'}"
