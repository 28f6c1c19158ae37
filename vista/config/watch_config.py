"""Configuration of `vista watch`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import MAX_THREADS, check_types, require, require_counts, require_finite
from vista.config.choices import Arrival, OnBadRows
from vista.config.prepare_config import SourceConfig
from vista.config.stream_config import StreamConfig


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Keep a store up to date with arriving files or messages, or with a log to which other processes append."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model whose full refresh made the store."""
    store: str = "stores/vista"
    """Folder of the summary store, or its URL, such as redis://host:6379/mine."""
    folder: str | None = None
    """Folder in which Parquet, CSV, or TSV files arrive. Files that cannot be read are listed in its folder `refused`,
    with the reason. Without folder and source, the watch follows a log to which other processes append."""
    source: str | None = None
    """Kafka topics to read, as kafka://server:port/topic. Separate several servers or topics by commas. Needs the
    extra `kafka`. Each message is a JSON object with the columns of `events`."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How the messages of `source` are read."""
    arrival: Arrival = Arrival.done
    """How the watch tells that a file is complete. done: its writer creates an empty file with the suffix .done next to
    it, such as day.csv.done. pause: the file has not changed for settle_s; if its writer pauses longer, the rows before
    the pause count twice."""
    settle_s: float = 2.0
    """With arrival=pause: number of seconds without a change after which a file is complete."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Columns of the files or messages. events.paths is not used."""
    on_bad_rows: OnBadRows = OnBadRows.error
    """What happens to invalid rows and messages. raise refuses the file and continues with the other files; an
    invalid message ends the watch. quarantine sets them aside."""
    authentication_key_file: str | None = None
    """File with the key that authenticates records: 32 bytes, or 64 hex digits. null uses the environment variable
    VISTA_AUTHENTICATION_KEY, or no key if that is unset."""
    poll_s: float = 5.0
    """Number of seconds between two checks of the folder, the topics, or the log."""
    report_file: str | None = None
    """JSON file with the report of the last successful check, for monitoring: its time, what it appended, and for
    topics the rate and the number of waiting messages per partition."""
    once: bool = False
    """Check once and exit, as a scheduled job does. Topics are read to the end."""
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
        require(
            self.folder is None or self.source is None,
            "source",
            f"folder={self.folder} is set too; leave one out, or run a watch for each",
        )
        require(self.poll_s > 0, "poll_s", f"must be positive, got {self.poll_s}")
