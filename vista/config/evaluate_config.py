"""Configuration of `vista evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation of quality as served: summaries come from the store, scores from the scorer."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store. Not used for baselines, which read the raw history."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    split: str = "test"
    """Labels that are evaluated: test or validation, according to the data split of the model's training."""
    exclude_seen: bool | None = None
    """Whether to exclude items of the visible history from rankings (never the label). null uses `data.exclude_seen`
    of the model's training."""
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cutoffs k of HR@k and NDCG@k, in items. The first is also the list length of the popularity report."""
    popularity: bool = False
    """Also report how closely the retrieval head's lists follow training popularity."""
    staleness: int = 0
    """Number of each user's newest visible events that the store's summaries lack; the tail has them. Refresh with
    until=leave-last-N-out, where N is 1 + staleness (validation: 2 + staleness), or for a split by time with
    until=TIME-less-N, where N is staleness. 0 evaluates up-to-date summaries."""
    recall: bool = False
    """Also report how well the stored summaries recall a user's events, by the age of the event. Takes some seconds."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written."""
    users_per_batch: int = 512
    """Number of users that are ranked at once."""
    out: str | None = None
    """JSON file for the metrics. An existing file is replaced. null only prints them."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("users_per_batch",))
        require_counts(self, "", ("staleness",), least=0)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require(
            min(self.top_k, default=0) >= 1, "top_k", f"needs one or more numbers of at least 1, got {list(self.top_k)}"
        )
        require(self.split in ("test", "validation"), "split", f"must be test or validation, got {self.split}")
