"""Configuration of `vista report`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts
from vista.config.choices import Target
from vista.config.data_config import MAX_HORIZON_EVENTS
from vista.config.evaluate_config import MAX_TOP_K


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
