"""Configuration of `vista refresh`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import Codec, Precision, StateDtype


@dataclass(kw_only=True, slots=True)
class RefreshConfig:
    """One refresh: write the summaries of all users into a new generation, or update those with new events."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """File with the store's key, 32 bytes or 64 hex digits; null reads VISTA_AUTHENTICATION_KEY if set."""
    shared_with_group: bool = False
    """Let the group of the store's folder read the store (folders 2750, files 0640), not only this account."""
    incremental: bool = False
    """Update only users with new events, in the published generation; the format stays that of the full refresh."""
    until: str | None = None
    """Events that summaries may cover: null (all), leave-last-out, leave-last-N-out, an ISO time (UTC), or ms; a time
    can be followed by -less-N, which hides the newest N of each user's events before it."""
    codec: Codec = Codec.int8
    state: StateDtype = StateDtype.float32
    """How states are stored for incremental refreshes: float32, float16 or none."""
    shard: str | None = None
    """i/n: refresh only the users of shard i of n, in <store>/part-i-of-n, so that machines can share the work."""
    tokens_per_batch: int = 65536
    """Events read and summarized together (a longer history forms a batch of its own)."""
    users_per_batch: int = 512
    """Users per write transaction."""
    precision: Precision = Precision.float32
    """Precision of matrix products: bfloat16 is faster on devices that support it, and changes summaries by about
    0.3 %."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("tokens_per_batch", "users_per_batch"))
        require_counts(self, "", ("num_threads",), least=0)
        if self.incremental:
            usual = {"until": None, "codec": Codec.int8, "state": StateDtype.float32, "precision": Precision.float32}
            for key, value in {**usual, "shared_with_group": False}.items():
                message = "was set by the store's full refresh; leave it out with incremental=true"
                require(getattr(self, key) == value, key, message)
