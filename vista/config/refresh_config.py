"""Configuration of `vista refresh`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import MAX_THREADS, require, require_counts
from vista.config.refresh_options import INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH, RefreshOptions


@dataclass(kw_only=True, slots=True)
class RefreshConfig(RefreshOptions):
    """One refresh: write the summaries of all users into a new generation, or update those with new events."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """File with the store's key, 32 bytes or 64 hex digits; null reads VISTA_AUTHENTICATION_KEY if set."""
    incremental: bool = False
    """Update only users with new events, in the published generation; the format stays that of the full refresh."""
    until: str | None = None
    """Events that summaries may cover: null (all), leave-last-out, leave-last-N-out, an ISO time (UTC), or ms; a time
    can be followed by -less-N, which hides the newest N of each user's events before it."""
    shard: str | None = None
    """i/n: refresh only the users of shard i of n, in <store>/part-i-of-n, so that machines can share the work."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        RefreshOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        if self.incremental:
            reason = f"{SET_BY_FULL_REFRESH} with incremental=true"
            require(self.until is None, "until", reason)
            self.require_only(INCREMENTAL_OPTIONS, reason, prefix="")
