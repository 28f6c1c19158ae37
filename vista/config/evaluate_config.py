"""Configuration of `vista evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Quality as served: summaries read from the store, scores made by the scorer."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store; a baseline reads the raw history and has none."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    split: str = "test"
    """test or validation, of the model's own data split."""
    exclude_seen: bool | None = None
    """Leave items of the visible history out of the ranking, but never the label; null: as `data.exclude_seen` of the
    model's training says."""
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cut-offs k of HR@k and NDCG@k; the first is also the length of the popularity report's lists."""
    popularity: bool = False
    """Also report how far the retrieval head's lists follow training popularity."""
    staleness: int = 0
    """Newest events of each user that the store's summaries lack, of those that the split lets them see; the tail is up
    to date all the same. Refresh with until=leave-last-N-out, N = 1 + staleness (validation: 2 + staleness), or of a
    split in time with until=TIME-less-N, N = staleness."""
    recall: bool = False
    """Also report what the stored summaries recall of a user's events, by their age (some seconds)."""
    users_per_batch: int = 512
    """Users ranked in one pass."""
    out: str | None = None
    """JSON file that receives the metrics; replaced if it exists. null prints only."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("users_per_batch",))
        require_counts(self, "", ("num_threads", "staleness"), least=0)
        require(min(self.top_k, default=0) >= 1, "top_k", f"needs numbers of at least 1, got {list(self.top_k)}")
        require(self.split in ("test", "validation"), "split", f"write test or validation, got {self.split}")
