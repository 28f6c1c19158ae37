"""Configurations of `vista refresh`, `watch`, `store …`, and `plan`."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field, fields

from vista.config.checks import (
    Keyed,
    Multiplies,
    NamesUsers,
    RunsOn,
    SharesWithGroup,
    SummaryFormat,
    UsesLog,
    UsesModel,
    UsesStore,
    VerifiesLog,
    WritesJson,
    check_types,
    require,
    require_counts,
    require_finite,
)
from vista.config.log_config import ReadsRows, SourceConfig, StreamConfig
from vista.config.model_config import ModelConfig

INCREMENTAL_OPTIONS = ("tokens_per_batch", "users_per_batch", "verify_log")
"""The options that an incremental refresh can choose."""
SET_BY_FULL_REFRESH = "was set by the store's full refresh; leave it out"


@dataclass(kw_only=True, slots=True)
class RefreshOptions(SharesWithGroup, VerifiesLog, Multiplies, SummaryFormat):
    """What a refresh writes and how it batches its work. Choices may be given as words, such as codec="float32"."""

    tokens_per_batch: int = 65_536
    """Number of events that are read and summarized at once. A longer history forms a batch of its own."""
    users_per_batch: int = 512
    """Number of users per durable transaction."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("tokens_per_batch", "users_per_batch"))

    def require_only(self, names: Container[str], reason: str, *, prefix: str = "options.") -> None:
        """Raise ConfigError with `reason` if an option outside of `names` differs from its default."""
        for option in fields(RefreshOptions):
            changed = getattr(self, option.name) != option.default
            require(option.name in names or not changed, f"{prefix}{option.name}", reason)


MAX_ACTORS = 100_000


@dataclass(kw_only=True, slots=True)
class RayConfig:
    """Where Ray runs, and how many actors share the work."""

    num_actors: int = 0
    """Number of actors: processes that each load the model and share the work. 0 starts as many as Ray has CPUs for
    (num_threads each, where 0 means one), or one per GPU."""
    address: str = "local"
    """local starts Ray on this machine and stops it at the end. Otherwise, the address of a cluster: host:port of
    its head node, or auto on one of its machines."""

    def __post_init__(self) -> None:
        check_types(self, "ray.")
        is_client = self.address.startswith("ray://")
        require(
            not is_client,
            "ray.address",
            "write host:port of the head node, or auto, and run on a machine of the cluster",
        )
        require_counts(self, "ray.", ("num_actors",), least=0, most=MAX_ACTORS)


@dataclass(kw_only=True, slots=True)
class RefreshConfig(RunsOn, Keyed, UsesStore, UsesModel, UsesLog, RefreshOptions):
    """One refresh: write the summaries of all users into a new generation, or update those with new events."""

    incremental: bool = False
    """Update only the users with new events, in the published generation. The format of the store stays as the full
    refresh set it."""
    until: str | None = None
    """Events that summaries may cover. null: all. leave-last-out, leave-last-N-out, and leave-last-P-percent-out: all
    but each user's last one, N, or P percent. A time, an ISO date or time (UTC) or integer milliseconds: those before
    it. TIME-less-N also hides the newest N of each user's events before that time, and leave-last-P-percent-out-less-N
    those before the last P percent."""
    shard: str | None = None
    """Written i/n: refresh only the users of shard i of n, into <store>/part-i-of-n, so that several machines can share
    the work. null refreshes all users."""
    ray: RayConfig | None = None
    """Where Ray runs, and how many of its processes share the work of a full refresh. null: this process does it. Both
    write the same store."""

    def __post_init__(self) -> None:
        RunsOn.__post_init__(self)  # calls that of RefreshOptions; super() does not work in a dataclass with slots
        if self.incremental:
            reason = f"{SET_BY_FULL_REFRESH} with incremental=true"
            require(self.until is None, "until", reason)
            full_only = "works only for a full refresh; use shard=i/n to divide an incremental one"
            require(self.ray is None, "ray", full_only)
            self.require_only(INCREMENTAL_OPTIONS, reason, prefix="")


@dataclass(kw_only=True, slots=True)
class WatchConfig(RunsOn, Keyed, UsesStore, UsesModel, UsesLog, ReadsRows):
    """Keep a store up to date with arriving files or messages, or with a log to which other processes append."""

    folder: str | None = None
    """Folder in which Parquet, CSV, or TSV files arrive. Files that cannot be read are listed in its folder `refused`,
    with the reason. Without folder and source, the watch follows a log to which other processes append."""
    source: str | None = None
    """Kafka topics to read, as kafka://server:port/topic. Separate several servers or topics by commas. Needs the
    extra `kafka`. Each message is a JSON object with the columns of `events`."""
    stream: StreamConfig = field(default_factory=StreamConfig)
    """How the messages of `source` are read."""
    settle_s: float | None = None
    """Number of seconds without a change after which a file is complete. If its writer pauses longer, the rows before
    the pause count twice. null: a file is complete once its writer has created an empty file with the suffix .done next
    to it, such as day.csv.done."""
    events: SourceConfig = field(default_factory=SourceConfig)
    """Columns of the files or messages. events.paths is not used."""
    poll_s: float = 5.0
    """Number of seconds between two checks of the folder, the topics, or the log."""
    report_file: str | None = None
    """JSON file with the report of the last successful check, for monitoring. It has its time, what it appended, and
    for topics the rate and the number of waiting messages per partition."""
    once: bool = False
    """Check once and exit, as a scheduled job does. Topics are read to the end."""

    def __post_init__(self) -> None:
        RunsOn.__post_init__(self)
        require_finite(self, "", ("settle_s",))
        require(
            self.folder is None or self.source is None,
            "source",
            f"folder={self.folder} is set too; leave one out, or run a watch for each",
        )
        require(self.poll_s > 0, "poll_s", f"must be positive, got {self.poll_s}")


@dataclass(kw_only=True, slots=True)
class StoreStatsConfig(UsesStore):
    """Statistics of a store and its generations."""


@dataclass(kw_only=True, slots=True)
class StoreVerifyConfig(Keyed, UsesStore):
    """Check a store's files and every record."""


@dataclass(kw_only=True, slots=True)
class StoreCompactConfig(Keyed, UsesStore):
    """Rewrite the published generation without the bytes of removed records."""


@dataclass(kw_only=True, slots=True)
class StoreExportConfig(Keyed, UsesStore):
    """Export the published generation to a Parquet file."""

    out: str = "summaries.parquet"
    """The file; replaced if it exists."""


@dataclass(kw_only=True, slots=True)
class StoreImportConfig(SharesWithGroup, Keyed, UsesStore):
    """Publish an exported file as a new generation of a store."""

    file: str = "summaries.parquet"
    """File written by `vista store export`."""


@dataclass(kw_only=True, slots=True)
class StoreCopyConfig(SharesWithGroup, Keyed, UsesStore):
    """Copy one generation to the store of a serving host."""

    to: str = ""
    """Folder of the summary store to copy to, made if it does not exist, or its URL, such as redis://host:6379/mine."""
    generation: int | None = None
    """Number of the generation; null copies the published one."""
    publish: bool = True
    """Publish the copy at once; false only copies and verifies it, until the same command with true publishes it."""


@dataclass(kw_only=True, slots=True)
class StoreMergeConfig(RunsOn, Keyed, SharesWithGroup, VerifiesLog, UsesModel, UsesStore):
    """Combine stores that one model made, from different events or users, into one store."""

    parts: list[str] = field(default_factory=list)
    """Folders of the stores to merge; at least one. To merge all shards of a store, name the folder above them."""
    data: list[str] = field(default_factory=lambda: ["data/log"])
    """EventLog of each part, in the same order, or one for all parts. Different logs must hold different events, and
    parts of one log different users."""


@dataclass(kw_only=True, slots=True)
class StoreRollbackConfig(Keyed, UsesStore):
    """Publish an earlier generation again."""

    to: int | None = None
    """Number of the generation; null takes the newest one before the published one."""


@dataclass(kw_only=True, slots=True)
class StoreGetConfig(Keyed, UsesStore):
    """Print one user's record."""

    user: str | None = None
    """Id as in the log."""
    model: str | None = None
    """Folder of the exported model, to print the tail's items by their ids in the log; null prints model rows."""


@dataclass(kw_only=True, slots=True)
class StoreEraseConfig(NamesUsers, UsesStore):
    """Remove users from a store for good."""

    data: str | None = None
    """Folder of the EventLog to erase them from too; null erases them from the store only."""


ACTIVE_SHARE = 0.5
"""Of the users: those who have events on a day, in a plan."""


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """One machine."""

    cores: int = 32
    """Number of cores."""
    memory_gb: float = 256.0
    """Memory, in GB."""
    disk_tb: float = 8.0
    """Disk, in TB."""

    def __post_init__(self) -> None:
        check_types(self, "machine.")
        require_counts(self, "machine.", ("cores",), most=65_536)
        require_finite(self, "machine.", ("memory_gb", "disk_tb"), positive=True, most=1e6)


@dataclass(kw_only=True, slots=True)
class PlanConfig(WritesJson, SummaryFormat):
    """What a deployment would need: cores, machines, disk, memory, network, and how old summaries become.

    The plan reads no data and measures nothing. It ignores keys of `model` that change neither sizes nor times. With
    `state` null, it plans float32 states in a folder.
    """

    users: float = 1e6
    """Number of users in the store."""
    events_per_day: float = 5e7
    """New events per day, of all users."""
    history_events: float = 1000.0
    """Mean number of events per user in the log."""
    requests_per_s: float = 1000.0
    """Requests per s at the busiest time."""
    candidates: int = 500
    """Number of candidates per request."""
    items: float = 1e6
    """Number of items in the catalog."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model, as for `vista train`."""
    refresh_every_s: float = 3600.0
    """Time between the starts of two incremental refreshes, in s. A refresh that takes longer delays the next one."""
    remote_store: bool = False
    """Whether summaries are in the memory of Valkey or Redis servers instead of on the disks of the serving
    machines."""
    replicas: int = 2
    """Number of copies of each summary."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Resources of each machine."""

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "", ("users", "events_per_day"), positive=True, most=1e15)
        require_finite(self, "", ("items",), positive=True, most=2**31 - 1)
        require_finite(self, "", ("history_events", "requests_per_s"), most=1e12)
        require_counts(self, "", ("candidates",), most=2**24)
        require_counts(self, "", ("replicas",), most=100)
        require(self.users >= 1, "users", f"must be at least 1, got {self.users}")
        require(
            1 <= self.refresh_every_s <= 86_400,
            "refresh_every_s",
            f"must lie in [1, 86400], got {self.refresh_every_s}; for less frequent refreshes, plan full ones",
        )
        per_user = self.events_per_day / (self.users * ACTIVE_SHARE)
        require(
            per_user <= 100_000,
            "events_per_day",
            f"is {per_user:.2g} per active user, more than one per second; check users and this",
        )
        require(
            self.model.num_rows > 0,
            "model.architecture",
            "only vista with num_seeds or pooled_dim above 0 stores summaries; other models read the raw history in "
            "each request",
        )
