"""Configuration of `vista refresh`."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import (
    Codec,
    Precision,
    StateDtype,
)


@dataclass(kw_only=True, slots=True)
class RefreshConfig:
    """One batch refresh: every user's summary into a new generation of the store."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    shared_with_group: bool = False
    """Let the group of the store's folder read it (folders 2750, files 0640), instead of this account alone."""
    incremental: bool = False
    """Only users with new events, into the served generation; what the store is stays as its full refresh made it."""
    until: str | None = None
    """Events that summaries may see: null (all), leave-last-out, leave-last-N-out, an ISO time (UTC), or ms; a time
    can be followed by -less-N, which hides the newest N of each user's events before it."""
    codec: Codec = Codec.int8
    state: StateDtype = StateDtype.float32
    """How states are kept beside the summaries, for incremental refreshes: float32, float16 or none."""
    shard: str | None = None
    """i/n: only the users of part i of n, into <store>/part-i-of-n, so that several machines refresh one store."""
    tokens_per_batch: int = 65536
    """Events read and summarized together (a longer life by itself)."""
    users_per_batch: int = 512
    """Users of one write transaction."""
    precision: Precision = Precision.float32
    """Of matrix products: bfloat16 is faster where the device multiplies it, and moves summaries by some 0.3 %."""
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
                message = "is what the store's full refresh made it; leave it out with incremental=true"
                require(getattr(self, key) == value, key, message)
