"""Cores, machines, disk, memory, and network of a deployment (docs/explanation/scale.md)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np

from vista.config.store_config import MachineConfig, PlanConfig
from vista.errors import ConfigError
from vista.log.segment_files import EVENT_COLUMNS
from vista.planning.arrival_rate import DAY_S, ArrivalRate
from vista.planning.lag_simulation import Fleet, LagReport, simulate_lag
from vista.planning.machine_group import MachineGroup
from vista.planning.plan_text import size
from vista.planning.refresh_cost import RefreshCost, changed_users, token_s
from vista.planning.store_sizes import StoreSizes
from vista.store.lmdb.data_file import MAP_SIZE_BYTES

GENERATIONS = 3
"""Most generations at a time: the two that a store keeps, and the one that a full refresh or a copy writes."""
EVENT_BYTES = sum(np.dtype(dtype).itemsize for dtype in EVENT_COLUMNS.values())
"""Of an event in the log, with a rating and without features."""
CANDIDATE_BYTES = 8 + 4
"""Network bytes per candidate: its id, and its score as float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityPlan:
    """What a deployment needs. Units are in the names; nothing is rounded."""

    config: PlanConfig
    sizes: StoreSizes
    summary_bytes: float
    """Disk of one generation's summaries, one copy."""
    state_bytes: float
    """Disk of one generation's states."""
    log_bytes: float
    """Disk of the event log."""
    log_bytes_per_day: float
    """How much the log grows."""
    events_per_s: float
    """In the busiest hour."""
    changed_users: float
    """Users with new events per incremental refresh of the busiest hour."""
    refresh_workers: int
    """Incremental refresh: processes with one core each."""
    refresh_s: float
    """Length of an incremental refresh in the busiest hour."""
    shards: int
    """Parts of the store: at least one per worker, and each fits the address space that LMDB reserves."""
    full_refresh_core_s: float
    full_refresh_cores: int
    """Cores that finish a full refresh within `full_refresh_hours`."""
    request_s: float
    """Time of one core per request."""
    serving_cores: int
    request_bytes: float
    """Network bytes per request: ids, scores, and from a remote store the record."""
    item_bytes: float
    """Memory of the items' vectors and projections on each machine that serves."""
    copied_bytes_per_s: float
    """Records that are sent to all copies, in the busiest hour during a full refresh: those that changed if refreshes
    write to a remote store, and otherwise a complete generation per refresh, as `vista store copy` does."""
    groups: tuple[MachineGroup, ...]
    lag: LagReport | None
    """The simulated lag, with a burst or failures."""

    @property
    def writes_to_server(self) -> bool:
        """Whether refreshes write to the remote store, whose memory states would fill. With states, they write to a
        store on their own disks, which is copied."""
        return self.config.remote_store and not self.sizes.state

    @property
    def stores_on_servers(self) -> int:
        """Stores on servers: one per shard, because such a store is not divided, and each fits one server's memory."""
        if not self.config.remote_store:
            return 0
        needed_bytes = GENERATIONS * self.config.users * self.sizes.on_server
        return max(self.shards, math.ceil(needed_bytes / (self.config.machine.memory_gb * 1e9)))

    @property
    def mean_lag_s(self) -> float:
        """Mean time from an event in the busiest hour until it is in the store, without a burst or failures."""
        return max(self.config.refresh_every_s, self.refresh_s) / 2 + self.refresh_s

    @property
    def longest_lag_s(self) -> float:
        """The same for the event that waits longest."""
        return max(self.config.refresh_every_s, self.refresh_s) + self.refresh_s


def plan_capacity(config: PlanConfig) -> CapacityPlan:
    """Plan a deployment.

    Raises:
        ConfigError: a refresh takes longer than the time between two even without events, a record is too large, or
            the items do not fit a machine.
    """
    history = round(config.history_events)
    sizes = StoreSizes.of(
        config.model, config.codec, config.state, num_items=round(config.items), history_events=history
    )
    cost = RefreshCost.of(config, sizes)
    per_s, active = config.events_per_day / DAY_S, config.users * config.active_share
    busy_s = config.refresh_every_s * config.utilization
    if busy_s <= cost.batch_s:
        raise ConfigError(
            f"refresh_every_s: a refresh takes {cost.batch_s:.2g} s without any events, but {config.refresh_every_s:g} "
            f"s at a utilization of {config.utilization:g} leave {busy_s:.2g} s; refresh less often"
        )
    new_events = per_s * config.peak * config.refresh_every_s
    work_s = cost.seconds(new_events, active)
    workers = max(1, math.ceil(work_s / (busy_s - cost.batch_s)))
    on_disk = (config.users * sizes.record_on_disk, config.users * sizes.state_on_disk)
    full_s = config.users * (config.history_events * cost.event_s + cost.full_user_s)
    full_cores = max(1, math.ceil(full_s / (config.full_refresh_hours * 3600)))
    request_s = request_core_s(config)
    changed = changed_users(new_events, active)
    sent = changed if config.remote_store and not sizes.state else config.users
    records_per_s = sent / config.refresh_every_s + config.users / (config.full_refresh_hours * 3600)
    plan = CapacityPlan(
        config=config,
        sizes=sizes,
        summary_bytes=on_disk[0],
        state_bytes=on_disk[1],
        log_bytes=config.users * config.history_events * EVENT_BYTES,
        log_bytes_per_day=config.events_per_day * EVENT_BYTES,
        events_per_s=per_s * config.peak,
        changed_users=changed,
        refresh_workers=workers,
        refresh_s=work_s / workers + cost.batch_s,
        shards=max(workers, math.ceil(2 * max(on_disk) / MAP_SIZE_BYTES)),
        full_refresh_core_s=full_s,
        full_refresh_cores=full_cores,
        request_s=request_s,
        serving_cores=max(1, math.ceil(config.requests_per_s * request_s / config.utilization)),
        request_bytes=config.candidates * CANDIDATE_BYTES + (sizes.record if config.remote_store else 0),
        # Per item: its retrieval vector, and its vector with four projections (`ItemProjections`), float32.
        item_bytes=config.items * 6 * config.model.dim * 4,
        copied_bytes_per_s=records_per_s * sizes.record * config.replicas,
        groups=(),
        lag=_simulated(config, cost, workers) if config.burst > 1 or config.failures_per_day else None,
    )
    return replace(plan, groups=_groups(plan))


def request_core_s(config: PlanConfig) -> float:
    """Time of one core for a request of one user."""
    model, measured = config.model, config.measured
    tokens = model.num_seeds + model.num_state_rows + model.tail_len + config.candidates
    fixed_s = measured.request_ms * 1e-3 + config.candidates * measured.candidate_us * 1e-6
    return fixed_s + tokens * token_s(config, model.num_target_layers)


def _groups(plan: CapacityPlan) -> tuple[MachineGroup, ...]:
    """The machines of each task."""
    config, machine = plan.config, plan.config.machine
    free_bytes = machine.memory_gb * 1e9 - plan.item_bytes
    if free_bytes <= 0:
        raise ConfigError(
            f"machine.memory_gb: the vectors of the items take {size(plan.item_bytes)} on each machine that "
            f"serves, but it has {machine.memory_gb:g} GB; use fewer items or more memory"
        )
    refresh = MachineGroup.of(
        "refresh",
        machine,
        cores=plan.refresh_workers + plan.full_refresh_cores,
        disk_bytes=plan.log_bytes
        + (0 if plan.writes_to_server else GENERATIONS * (plan.summary_bytes + plan.state_bytes)),
        network_bytes_per_s=plan.copied_bytes_per_s,
    )
    copies_bytes = config.replicas * plan.summary_bytes
    received = config.requests_per_s * plan.request_bytes
    serving_machine: MachineConfig = replace(machine, memory_gb=free_bytes / 1e9)
    if not config.remote_store:
        serving = MachineGroup.of(
            "serving",
            serving_machine,
            cores=plan.serving_cores,
            memory_bytes=config.hot_share * copies_bytes,
            disk_bytes=GENERATIONS * copies_bytes,
            network_bytes_per_s=received + plan.copied_bytes_per_s,
        )
        return refresh, serving
    serving = MachineGroup.of("serving", serving_machine, cores=plan.serving_cores, network_bytes_per_s=received)
    store = MachineGroup.of(
        "store",
        machine,
        memory_bytes=GENERATIONS * config.replicas * config.users * plan.sizes.on_server,
        network_bytes_per_s=config.requests_per_s * plan.sizes.record + plan.copied_bytes_per_s,
    )
    return refresh, serving, store


def _simulated(config: PlanConfig, cost: RefreshCost, workers: int) -> LagReport:
    """The lag of the plan's workers with the configuration's burst and failures."""
    active = config.users * config.active_share / workers
    fleet = Fleet(
        workers,
        lambda num_events: cost.batch_s + cost.seconds(num_events, active),
        config.refresh_every_s,
        config.failures_per_day,
        60 * config.restart_minutes,
    )
    rate = ArrivalRate(config.events_per_day / DAY_S, config.peak)
    return simulate_lag(rate, fleet, burst=config.burst, burst_s=60 * config.burst_minutes, seed=config.seed)
