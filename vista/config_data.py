"""Configurations of the commands that make and keep logs: simulate, prepare, log …. Those of all others: config.py."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from vista.choices import IdType, OnBadRows
from vista.config_checks import check_types, require, require_counts
from vista.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class SimulateConfig:
    """A simulated lifelong log with impressions whose true label probabilities are known."""

    out: str = "data/simulated"
    """Folder that receives events.parquet, impressions.parquet and items.parquet, which `prepare` reads."""
    num_users: int = 400
    events_per_user: int = 4000
    """Mean length of a history; lengths spread around it."""
    num_items: int = 1600
    num_topics: int = 32
    """Latent topics, at most 256; every item belongs to one."""
    min_interests: int = 4
    max_interests: int = 6
    """Slow interests of a user: topics that return for as long as the user lives."""
    episode_events: int = 450
    """Mean length of an episode, in events; a user's slow interests take turns, one an episode."""
    session_events: int = 20
    """Mean length of a session, in events."""
    impressions_per_user: int = 300
    impressions_per_request: int = 4
    """Candidates shown at one moment."""
    start: str = "2024-01-01"
    days: float = 730.0
    """Length of the simulated period; users' lives fill it."""
    seed: int = 1
    num_threads: int = 1
    """Threads that generate; the bytes do not depend on them."""
    reference: bool = False
    """Also report the best possible AUC and NE: of the truth, and of the last 200 and 32 events (some seconds)."""

    def __post_init__(self) -> None:
        check_types(self)
        counts = ("num_users", "events_per_user", "num_items", "num_topics", "episode_events", "session_events")
        require_counts(self, "", (*counts, "impressions_per_user", "impressions_per_request", "num_threads"))
        require_counts(self, "", ("seed",), least=0)
        try:
            datetime.fromisoformat(self.start)
        except ValueError as error:
            raise ConfigError(f"start: {error}; write a date such as 2024-01-01") from None
        topics, items, low, high = self.num_topics, self.num_items, self.min_interests, self.max_interests
        require(topics <= 256, "num_topics", f"must be at most 256, got {topics}")
        require(items >= topics, "num_items", f"must be at least num_topics={topics}, got {items}")
        message = f"needs 1 <= min_interests <= max_interests < num_topics, got {low}, {high}, {topics}"
        require(1 <= low <= high < topics, "max_interests", message)
        message = f"must be at least 1 and one more a million events a user, and at most 36500, got {self.days}"
        require(1 + self.events_per_user / 1e6 <= self.days <= 36_500, "days", message)


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """Where a table's columns are; one `kind` of a known data set, or `table` with names."""

    kind: str = "table"
    """auto (by what lies at the path) | table | ml-1m | ml-latest-small | ml-100k | recbole | npz | simulated"""
    paths: list[str] = field(default_factory=list)
    """Files (Parquet, CSV, or the data set's own); several are read in the order of their names."""
    user: str = "user"
    """Column of user ids, integers or strings."""
    item: str = "item"
    """Column of item ids, integers or strings."""
    timestamp: str | None = None
    """Null for a table without times: input order counts then."""
    time_unit: str | None = None
    """s | ms | us | ns | iso, of numbers and text; a Parquet column of dates and times needs none."""
    action: str | None = None
    """Column of action names, such as click or buy."""
    rating: str | None = None
    sequence: str | None = None
    """Column that orders equal timestamps; input order without it."""
    separator: str = ","
    """Of CSV files."""
    user_ids: IdType = IdType.auto
    """What user ids are; auto follows the column's type, and in text files the first value."""
    item_ids: IdType = IdType.auto
    """The same of item ids."""
    labels: list[str] = field(default_factory=list)
    """Impressions: one 0/1/empty column a task."""
    probabilities: list[str] = field(default_factory=list)
    """Impressions of a simulation: the true probability of each label, in the order of `labels`."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Ingest of source tables into an EventLog."""

    out: str = "data/log"
    """Folder that receives the EventLog."""
    events: SourceConfig = field(default_factory=SourceConfig)
    impressions: SourceConfig | None = None
    append: bool = False
    """Add a segment to an existing log; a source that it holds already is refused."""
    on_bad_rows: OnBadRows = OnBadRows.error
    progress: bool = True

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogForgetConfig:
    """Deletion of single events from an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""
    events: str = "deletions.csv"
    """CSV or Parquet file with the columns user, item, timestamp and, if wanted, action; each row names an event."""
    time_unit: str | None = None
    """s | ms | us | ns | iso, of its timestamps; null in a log without times, where they count events from 0."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogEraseConfig:
    """Deletion of users from an EventLog."""

    data: str = "data/log"
    """Folder of the EventLog."""
    users: list[str] = field(default_factory=list)
    """User ids; at least one."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogCompactConfig:
    """Compaction of an EventLog's segments into one, without what was deleted."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class LogStatsConfig:
    """What an EventLog holds."""

    data: str = "data/log"
    """Folder of the EventLog."""

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(kw_only=True, slots=True)
class WatchConfig:
    """Arriving files, or a growing log, into the served store."""

    data: str = "data/log"
    """Folder of the EventLog."""
    model: str = "runs/vista/best"
    """Folder of the exported model, whose full refresh made the store."""
    store: str = "stores/vista"
    """Folder of the summary store."""
    folder: str | None = None
    """Folder in which Parquet, CSV or TSV files arrive, by a rename or complete within two seconds of the last change;
    null follows a log that others append to."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Columns of the files; events.paths is not used."""
    on_bad_rows: OnBadRows = OnBadRows.error
    """raise refuses a file with bad rows as a whole, and goes on with the others; quarantine sets the rows aside."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    poll_s: float = 5.0
    """Seconds between two looks."""
    once: bool = False
    """Look once and end, as a scheduled job does."""
    device: str = "auto"
    num_threads: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("num_threads",), least=0)
        require(self.poll_s > 0, "poll_s", f"must be above 0 seconds, got {self.poll_s}")
