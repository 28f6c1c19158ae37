"""Configuration of `vista refresh`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, require, require_counts
from vista.config.choices import EngineName
from vista.config.ray_config import RayConfig
from vista.config.refresh_options import INCREMENTAL_OPTIONS, SET_BY_FULL_REFRESH, RefreshOptions


@dataclass(kw_only=True, slots=True)
class RefreshConfig(RefreshOptions):
    """One refresh: write the summaries of all users into a new generation, or update those with new events."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    incremental: bool = False
    """Update only the users with new events, in the published generation. The format of the store stays as the full
    refresh set it."""
    until: str | None = None
    """Events that summaries may cover: all (null), all but each user's last (leave-last-out), last N (leave-last-N-out)
    or last P percent (leave-last-P-percent-out), or those before a time, which is an ISO date or time (UTC) or integer
    milliseconds. TIME-less-N also hides the newest N of each user's events before that time, and
    leave-last-P-percent-out-less-N those before the last P percent."""
    shard: str | None = None
    """Written i/n: refresh only the users of shard i of n, into <store>/part-i-of-n, so that several machines can share
    the work. null refreshes all users."""
    engine: EngineName = EngineName.local
    """What computes a full refresh: local (this process) or ray (several processes, on one machine or in a cluster).
    Both write the same store."""
    ray: RayConfig = field(default_factory=RayConfig)
    """With engine=ray: where Ray runs, and how many processes share the work."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch. With engine=ray, the number is per actor, and 0 means
    one."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        RefreshOptions.__post_init__(self)  # super() does not work in a dataclass with slots
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        if self.incremental:
            reason = f"{SET_BY_FULL_REFRESH} with incremental=true"
            require(self.until is None, "until", reason)
            full_only = "works only for a full refresh; use shard=i/n to divide an incremental one"
            require(self.engine is EngineName.local, "engine", full_only)
            self.require_only(INCREMENTAL_OPTIONS, reason, prefix="")
