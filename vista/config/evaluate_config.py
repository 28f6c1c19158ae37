"""Configurations of `vista evaluate`, `report`, `compare`, and `runs`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_DAYS, MAX_THREADS, Checked, check_types, require, require_counts, require_finite
from vista.config.choices import AskedBaselines, RunOrder, Target
from vista.config.train_config import MAX_HORIZON_EVENTS
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
    top_k: list[int] = field(default_factory=lambda: [10, 50, 200])
    """Cutoffs k of the metrics, in items. The first is also the list length of the popularity report."""
    popularity: bool = False
    """Also report how closely the retrieval head's lists follow training popularity."""
    baselines: AskedBaselines = AskedBaselines.none
    """Baselines to measure too, on the same users. counting takes seconds for a million events: popularity, own
    frequency, transitions, item neighbors, and with features of items, content neighbors. trained adds those that
    learn, which takes minutes: EASE, TIFU-KNN, pooled factors, pooled vectors, and boosted trees. It needs the extra
    `baselines`."""
    staleness: int = 0
    """Number of each user's newest visible events that the store's summaries lack; the tail has them. Refresh with
    until=leave-last-N-out, where N is 1 + staleness (validation: 2 + staleness), or for another split with
    until=TIME-less-N or until=leave-last-P-percent-out-less-N, where N is staleness. 0 evaluates up-to-date
    summaries."""
    recall: bool = False
    """Also report how well the stored summaries recall a user's events, by the age of the event. Takes some seconds."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written."""
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
        is_window = self.target is Target.window
        require(
            not (is_window and self.popularity),
            "popularity",
            "only applies with target=next; set that, or leave it out",
        )
        require(self.split in ("test", "validation"), "split", f"must be test or validation, got {self.split}")


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """A report about a training run, as one self-contained HTML file."""

    run: str = "runs/vista"
    """Folder of the run: the `run_dir` of its training."""
    others: list[str] = field(default_factory=list)
    """Folders of other runs to compare with this one, on the same cases. They need the same data split."""
    data: str | None = None
    """Folder of the EventLog. null uses `data.path` of the training."""
    store: str | None = None
    """Folder or URL of a store of the run's summaries, refreshed with the `until` of its split. null refreshes one in a
    temporary folder next to `out`. Other runs always get a temporary store."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records of `store`: 32 bytes, or 64 hex digits. null uses the environment
    variable VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    split: str = "test"
    """Labels to evaluate: test or validation, according to the data split of the training."""
    target: Target = Target.next
    """What to predict for each user: the next event and the impressions (next), or the distinct items of the next
    events (window)."""
    horizon_events: int = 50
    """With target=window: length of the windows, in events."""
    top_k: int = 10
    """Cutoff k of the ranking metrics, in items."""
    baselines: bool = True
    """Also measure simple baselines: counting baselines and pooled vectors. Takes seconds for a million events."""
    item_categories: str | None = None
    """Table (Parquet or CSV) with the categories of items and a column `item`. Quality is then shown by the age of the
    newest event in the label's category. null uses events with the same item, or with the most similar item if items of
    the history are not ranked."""
    category_column: str = "category"
    """Column of categories in item_categories."""
    out: str | None = None
    """HTML file. An existing file is replaced. null writes report.html into the folder of the run."""
    verify_log: bool = True
    """Check first that no byte of the log's files has changed since it was written."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("top_k",), most=MAX_TOP_K)
        require_counts(self, "", ("horizon_events",), most=MAX_HORIZON_EVENTS)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require(self.split in ("test", "validation"), "split", f"must be test or validation, got {self.split}")
        require(len({*self.others, self.run}) == 1 + len(self.others), "others", "names a run twice")


@dataclass(kw_only=True, slots=True)
class CompareConfig(Checked):
    """A paired test between two models that were evaluated on the same users."""

    a: list[str] = field(default_factory=list)
    """Files that `vista evaluate` wrote as `out`: the first model, with one file per seed. The metrics of each user are
    read from <file>.npz, and averaged over the seeds."""
    b: list[str] = field(default_factory=list)
    """The same of the second model. Differences are those of b minus a."""


@dataclass(kw_only=True, slots=True)
class RunsConfig(Checked):
    """The list of training runs in a folder."""

    folder: str = "runs"
    """Folder that contains run folders, at most four levels deep."""
    sort: RunOrder = RunOrder.best
    """Order of the list: best (the best metric first), name, newest, seconds, or parameters."""
    metric: str | None = None
    """Validation metric of each run's best model, to list and to sort by. null uses the metric that selected it."""
    out: str | None = None
    """JSON file for the list, with all metrics of each run. An existing file is replaced. null only prints the list."""


@dataclass(kw_only=True, slots=True)
class RunsCompareConfig(Checked):
    """Training runs side by side."""

    runs: list[str] = field(default_factory=list)
    """Folders of two or more runs."""
    out: str | None = None
    """JSON file for the comparison. An existing file is replaced. null only prints it."""
