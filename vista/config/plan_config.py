"""Configuration of `vista plan`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts, require_finite, require_share
from vista.config.choices import Architecture, Codec, StateDtype
from vista.config.measured_config import MeasuredConfig
from vista.config.model_config import ModelConfig


@dataclass(kw_only=True, slots=True)
class MachineConfig:
    """One machine."""

    cores: int = 32
    """Number of cores."""
    memory_gb: float = 256.0
    """Memory, in GB."""
    disk_tb: float = 8.0
    """Disk, in TB."""
    network_gbit_per_s: float = 25.0
    """Network, in Gbit per s."""

    def __post_init__(self) -> None:
        check_types(self, "machine.")
        require_counts(self, "machine.", ("cores",), most=65_536)
        numbers = ("memory_gb", "disk_tb", "network_gbit_per_s")
        require_finite(self, "machine.", numbers, positive=True, most=1e6)


@dataclass(kw_only=True, slots=True)
class PlanConfig:
    """What a deployment would need: cores, machines, disk, memory, network, and how old summaries become.

    The plan reads no data and measures nothing. It ignores keys of `model` that change neither sizes nor times.
    """

    users: float = 1e6
    """Number of users in the store."""
    events_per_day: float = 5e7
    """New events per day, of all users."""
    history_events: float = 1000.0
    """Mean number of events per user in the log."""
    active_share: float = 0.5
    """Share of the users, in (0, 1], who have events on a day."""
    peak: float = 1.5
    """Events in the busiest hour of a day, divided by those of an average hour, from 1 to 2."""
    requests_per_s: float = 1000.0
    """Requests per s at the busiest time."""
    candidates: int = 500
    """Number of candidates per request."""
    items: float = 1e6
    """Number of items in the catalog."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The model, as for `vista train`."""
    codec: Codec = Codec.int8
    """How the values of a summary are stored: float32, float16, int8, or int4."""
    state: StateDtype = StateDtype.float32
    """How states are stored for incremental refreshes: float32, float16, or none."""
    refresh_every_s: float = 3600.0
    """Time between the starts of two incremental refreshes, in s. A refresh that takes longer delays the next one."""
    full_refresh_hours: float = 8.0
    """Time that a full refresh may take, in hours."""
    utilization: float = 0.6
    """Share of the time, in (0, 1), that cores are busy in the busiest hour."""
    remote_store: bool = False
    """Whether summaries are in the memory of Valkey or Redis servers instead of on the disks of the serving
    machines."""
    replicas: int = 2
    """Number of copies of each summary."""
    hot_share: float = 0.2
    """Without remote_store: share of the summaries that stays in the page cache, because their users return soon."""
    machine: MachineConfig = field(default_factory=MachineConfig)
    """Resources of each machine."""
    measured: MeasuredConfig = field(default_factory=MeasuredConfig)
    """Speed of one core, as measured by vista's benchmarks."""
    burst: float = 1.0
    """Events during a burst in the busiest hour, divided by those without it. Above 1, the plan simulates the lag."""
    burst_minutes: float = 60.0
    """Length of the burst, in minutes."""
    failures_per_day: float = 0.0
    """Failures of refresh workers per day, in the whole fleet. Above 0, the plan simulates the lag."""
    restart_minutes: float = 10.0
    """Time from a worker's failure to its restart, in minutes."""
    seed: int = 0
    """Seed of the simulation."""
    out: str | None = None
    """JSON file for the plan. An existing file is replaced. null only prints the plan."""

    def __post_init__(self) -> None:
        check_types(self)
        require_finite(self, "", ("users", "events_per_day"), positive=True, most=1e15)
        require_finite(self, "", ("items",), positive=True, most=2**31 - 1)
        require_finite(self, "", ("history_events", "requests_per_s"), most=1e12)
        require_counts(self, "", ("candidates",), most=2**24)
        require_counts(self, "", ("replicas",), most=100)
        require_counts(self, "", ("seed",), least=0)
        require_share(self, "", ("active_share", "hot_share", "utilization"))
        require(self.users >= 1, "users", f"must be at least 1, got {self.users}")
        require(self.active_share > 0, "active_share", "must be above 0, because some users have the day's events")
        require(0 < self.utilization < 1, "utilization", f"must lie in (0, 1), got {self.utilization}")
        require(1 <= self.peak <= 2, "peak", f"must lie in [1, 2], got {self.peak}")
        require(1 <= self.burst <= 1000, "burst", f"must lie in [1, 1000], got {self.burst}")
        require(
            1 <= self.refresh_every_s <= 86_400,
            "refresh_every_s",
            f"must lie in [1, 86400], got {self.refresh_every_s}; for less frequent refreshes, plan full ones",
        )
        require_finite(self, "", ("full_refresh_hours",), positive=True, most=8760)
        require_finite(self, "", ("burst_minutes",), positive=True, most=720)
        require_finite(self, "", ("failures_per_day", "restart_minutes"), most=1440)
        per_user = self.events_per_day / (self.users * self.active_share)
        require(
            per_user <= 100_000,
            "events_per_day",
            f"is {per_user:.2g} per active user, more than one per second; check users, active_share, and this",
        )
        require(
            self.model.architecture is Architecture.vista and self.model.num_seeds + self.model.num_state_rows > 0,
            "model.architecture",
            "only vista with num_seeds above 0 stores summaries; other models read the raw history in each request",
        )
