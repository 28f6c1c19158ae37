"""Configuration of `vista watch`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts, require_finite
from vista.config.choices import Arrival, OnBadRows
from vista.config.prepare_config import SourceConfig


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Bring arriving files, or what is appended to a log, into the store."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model whose full refresh made the store."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    folder: str | None = None
    """Folder in which Parquet, CSV, or TSV files arrive. Files that cannot be read are listed in its folder `refused`,
    with the reason. null follows a log to which other processes append."""
    arrival: Arrival = Arrival.done
    """How the watch tells that a file is complete. done: its writer creates an empty file with the suffix .done next to
    it, such as day.csv.done. pause: the file has not changed for settle_s; if its writer pauses longer, the rows before
    the pause count twice."""
    settle_s: float = 2.0
    """With arrival=pause: number of seconds without a change after which a file is complete."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Columns of the files. events.paths is not used."""
    on_bad_rows: OnBadRows = OnBadRows.error
    """What happens to invalid rows: raise refuses the file and continues with the other files; quarantine sets the rows
    aside."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    poll_s: float = 5.0
    """Number of seconds between two checks of the folder or the log."""
    once: bool = False
    """Check once and exit, as a scheduled job does."""
    device: str = "auto"
    """auto, cpu, cuda, or cuda:N. auto uses a GPU if there is one."""
    num_threads: int = 0
    """Number of CPU threads. 0 leaves the choice to PyTorch."""
    progress: bool = False
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("num_threads",), least=0, most=MAX_THREADS)
        require_finite(self, "", ("settle_s",))
        require(self.poll_s > 0, "poll_s", f"must be positive, got {self.poll_s}")
