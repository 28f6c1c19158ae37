"""Configuration of `vista score`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require_counts
from vista.config.choices import OnMissing


@dataclass(kw_only=True, slots=True)
class ScoreConfig:
    """Score candidates for users, or rank the whole catalog for them."""

    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    authentication_key_file: str | None = None
    """File with the store's key, 32 bytes or 64 hex digits; null reads VISTA_AUTHENTICATION_KEY if set."""
    users: list[str] = field(default_factory=list)
    """User ids; at least one."""
    candidates: list[str] = field(default_factory=list)
    """Item ids; empty ranks the whole catalog."""
    top_k: int = 10
    """Items to list per user if no candidates are given."""
    now: str | None = None
    """Time of the request, an ISO date or time (UTC) or ms; null if unknown."""
    on_missing: OnMissing = OnMissing.empty
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("top_k",))
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
