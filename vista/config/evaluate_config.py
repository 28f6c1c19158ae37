"""Configuration of `vista evaluate`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_DAYS, MAX_THREADS, check_types, require, require_counts, require_finite
from vista.config.choices import Target
from vista.config.data_config import MAX_HORIZON_EVENTS
from vista.errors import shown

MAX_TOP_K = 2**20


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Evaluation of quality as served: summaries come from the store, scores from the scorer."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine. Not used for baselines, which read the
    raw history."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    split: str = "test"
    """Labels that are evaluated: test or validation, according to the data split of the model's training."""
    target: Target = Target.next
    """What is asked about each user: the very next event and the impressions (next), or the distinct items of the next
    events or days (window), separately for items that the user had before (returns), for new ones, and for items that
    nobody had before (cold)."""
    horizon_events: list[int] = field(default_factory=lambda: [50, 200])
    """With target=window: lengths of the windows, in events."""
    horizon_days: float = 0.0
    """With target=window: length of the window, in days. It replaces horizon_events; 0 uses these."""
    min_seen: int = 50
    """With target=window: least number of events before the question. Users with fewer are not asked."""
    min_after: int = 20
    """With target=window: least number of events after the question, in the window or beyond it. Users with fewer are
    not asked."""
    exclude_seen: bool | None = None
    """With target=next: whether to exclude items of the visible history from rankings (never the label). null uses
    `data.exclude_seen` of the model's training."""
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cutoffs k of the metrics, in items. The first is also the list length of the popularity report."""
    popularity: bool = False
    """Also report how closely the retrieval head's lists follow training popularity."""
    baselines: bool = False
    """Also measure counting baselines on the same users: popularity, own frequency, transitions, item neighbors,
    and with features of items, content neighbors. Takes seconds for a million events."""
    trained_baselines: bool = False
    """With baselines=true: also measure baselines that learn, which takes minutes for a million events: EASE, TIFU-KNN,
    pooled factors, pooled vectors, and boosted trees. Needs the extra `baselines`."""
    staleness: int = 0
    """Number of each user's newest visible events that the store's summaries lack; the tail has them. Refresh with
    until=leave-last-N-out, where N is 1 + staleness (validation: 2 + staleness), or for another split with
    until=TIME-less-N or until=leave-last-P-percent-out-less-N, where N is staleness. 0 evaluates up-to-date
    summaries."""
    recall: bool = False
    """Also report how well the stored summaries recall a user's events, by the age of the event. Takes some seconds."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written."""
    users_per_batch: int = 512
    """Number of users that are ranked at once."""
    out: str | None = None
    """JSON file for the metrics. An existing file is replaced. The metrics of each user are written to <out>.npz, which
    `vista compare` reads, and those of each baseline to <out>.<name>.npz. null only prints the metrics."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("users_per_batch",))
        require_counts(self, "", ("min_seen", "min_after"))
        require_counts(self, "", ("staleness",), least=0)
        require_finite(self, "", ("horizon_days",), most=MAX_DAYS)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        for key, most in (("top_k", MAX_TOP_K), ("horizon_events", MAX_HORIZON_EVENTS)):
            values = getattr(self, key)
            require(
                min(values, default=0) >= 1 and max(values) <= most,
                key,
                f"needs one or more numbers from 1 to {most}, got {shown(values)}",
            )
        require(self.baselines or not self.trained_baselines, "trained_baselines", "needs baselines=true")
        if self.target is Target.window:
            require(
                self.exclude_seen is None, "exclude_seen", "only applies with target=next; set that, or leave it out"
            )
            require(not self.popularity, "popularity", "only applies with target=next; set that, or leave it out")
        require(self.split in ("test", "validation"), "split", f"must be test or validation, got {self.split}")
