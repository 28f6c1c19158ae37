"""Cores, machines, disk, memory, and network of a deployment (docs/explanation/scale.md)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from vista.config.choices import Codec, Mixing, StateDtype
from vista.config.model_config import ModelConfig
from vista.config.store_config import MachineConfig, PlanConfig
from vista.counters.counter_codes import CounterSpec
from vista.errors import ConfigError
from vista.log.segment_files import EVENT_COLUMNS
from vista.planning.quantities import DAY_S, PEAK_S, ArrivalRate, size
from vista.store.lmdb_environment import MAP_SIZE_BYTES
from vista.store.record import most_bytes
from vista.store.record_spec import HEADER_BYTES, CounterLayout, RecordSpec, event_bytes
from vista.store.state_record import StateSpec, tables_bytes


@dataclass(frozen=True, slots=True)
class MachineGroup:
    """How many machines of one kind a task needs, and which part of a machine decides it."""

    name: str
    machines: int
    bound_by: str
    """cores, memory, disk, or network."""

    @classmethod
    def of(
        cls,
        name: str,
        machine: MachineConfig,
        *,
        cores: float = 0.0,
        memory_bytes: float = 0.0,
        disk_bytes: float = 0.0,
        network_bytes_per_s: float = 0.0,
    ) -> MachineGroup:
        """The smallest group that has enough of everything.

        Args:
            name: what the machines do.
            machine: what each of them has.
            cores: that are needed.
            memory_bytes: that are needed.
            disk_bytes: that are needed.
            network_bytes_per_s: that are needed.
        """
        needs: Mapping[str, float] = {
            "cores": cores / machine.cores,
            "memory": memory_bytes / (machine.memory_gb * 1e9),
            "disk": disk_bytes / (machine.disk_tb * 1e12),
            "network": network_bytes_per_s / (machine.network_gbit_per_s * 1e9 / 8),
        }
        bound_by = max(needs, key=lambda part: needs[part])
        return cls(name, max(1, math.ceil(needs[bound_by])), bound_by)


# Bytes per user in a store, from the code of the formats.

KEY_BYTES = 10
"""Key of a user with an integer id."""
_PAGE_BYTES, _PAGE_HEADER_BYTES, _NODE_HEADER_BYTES, _POINTER_BYTES, _PAGE_NUMBER_BYTES = 4096, 16, 8, 2, 8
"""Of LMDB 0.9 (`lmdb.h`, `mdb.c`)."""
_MOST_NODE_BYTES = (_PAGE_BYTES - _PAGE_HEADER_BYTES) // 2 // 2 * 2 - _POINTER_BYTES
"""A value that does not fit a node of this size has pages of its own."""
_SERVER_HEADER_BYTES = 20
"""Of a string in Valkey or Redis, allocated together with it."""
_SERVER_BYTES_PER_USER = 180
"""Of everything else that a server holds per user: the key, its hash entry, and its entry in the set of users. Measured
with Valkey 8.1 (tests/planning/test_store_sizes.py)."""


@dataclass(frozen=True, slots=True)
class StoreSizes:
    """Bytes per user of a store whose users have integer ids and full tails."""

    record: int
    """Of the record."""
    record_on_disk: float
    """Of the record's share of LMDB pages."""
    state: int
    """Of the state; 0 if none are kept."""
    state_on_disk: float
    """Of the state's share of LMDB pages."""
    on_server: float
    """Of the record in the memory of a Valkey or Redis server."""

    @classmethod
    def of(
        cls, model: ModelConfig, codec: Codec, state: StateDtype, *, num_items: int, history_events: int
    ) -> StoreSizes:
        """The sizes of a model's records and states, without features of users or events.

        Args:
            model: its shape, with `counters` null meaning false.
            codec: how summaries are stored.
            state: how states are stored; bidirectional mixing has none.
            num_items: of the catalog, which decides how many bytes a counted key has.
            history_events: events per user, which are as many counted keys per field in a state at most.

        Raises:
            ConfigError: a record would exceed the format's limit.
        """
        spec = CounterSpec.of(model, has_time=True)
        # Most categories have fewer values than there are items.
        layout = None if spec is None else CounterLayout.of(spec, [num_items] * spec.num_fields)
        try:
            record_spec = RecordSpec(
                summarizer_id=bytes(32),
                generation=1,
                num_tokens=model.num_seeds + model.num_state_rows,
                dim=model.dim,
                codec=codec,
                counters=layout,
            )
        except ValueError as error:
            raise ConfigError(f"model.num_seeds: {error}") from error
        tail = model.tail_len * int(event_bytes(np.array([layout is not None]), ())[0])
        record = HEADER_BYTES + record_spec.rows_bytes + tail + (0 if layout is None else most_bytes(layout))
        state_bytes = 0
        if state is not StateDtype.none and model.mixing is Mixing.separable:
            state_spec = StateSpec(
                summarizer_id=bytes(32),
                generation=1,
                num_layers=model.num_state_layers,
                num_heads=model.num_heads,
                head_dim=model.dim // model.num_heads,
                dtype=state,
            )
            state_bytes = state_spec.least_bytes + (
                0 if spec is None else tables_bytes(spec, [history_events] * spec.num_fields)
            )
        on_disk = [lmdb_bytes(size) if size else 0.0 for size in (record, state_bytes)]
        return cls(record, on_disk[0], state_bytes, on_disk[1], server_bytes(record))


def lmdb_bytes(value_bytes: int, key_bytes: int = KEY_BYTES) -> float:
    """Bytes of LMDB pages per value, for many values of one size that are written in the order of their keys."""
    inline = _NODE_HEADER_BYTES + key_bytes + value_bytes
    own_pages = 0
    if inline > _MOST_NODE_BYTES:
        inline = _NODE_HEADER_BYTES + key_bytes + _PAGE_NUMBER_BYTES
        own_pages = math.ceil((_PAGE_HEADER_BYTES + value_bytes) / _PAGE_BYTES)
    leaves = 1 / _per_page(inline)
    branches = leaves / _per_page(_NODE_HEADER_BYTES + key_bytes)
    return _PAGE_BYTES * (own_pages + leaves + branches)


def server_bytes(value_bytes: int) -> int:
    """Memory of a Valkey or Redis server per value of a user: its allocator (jemalloc) has four sizes per doubling."""
    needed = value_bytes + _SERVER_HEADER_BYTES
    step = 1 << max(0, (needed - 1).bit_length() - 3)
    return math.ceil(needed / step) * step + _SERVER_BYTES_PER_USER


def _per_page(node_bytes: int) -> int:
    """Nodes per page."""
    return (_PAGE_BYTES - _PAGE_HEADER_BYTES) // (node_bytes + node_bytes % 2 + _POINTER_BYTES)


# Core seconds of refreshes.


def token_s(config: PlanConfig, num_layers: int) -> float:
    """Core seconds per token of a stage with this many layers."""
    return config.measured.token_ns * 1e-9 * num_layers * config.model.dim**2


@dataclass(frozen=True, slots=True)
class RefreshCost:
    """Core seconds that a refresh takes per event, user, and batch."""

    event_s: float
    """Per event that is summarized."""
    full_user_s: float
    """Per user of a full refresh, besides the events of the history."""
    changed_user_s: float
    """Per user with new events, besides these. Without states, it includes summarizing the history again."""
    batch_s: float
    """Per incremental refresh of a worker."""

    @classmethod
    def of(cls, config: PlanConfig, sizes: StoreSizes) -> RefreshCost:
        """The cost with a configuration and the sizes of its records."""
        event_s = token_s(config, config.model.num_layers)
        rows = config.model.num_seeds + config.model.num_state_rows
        written_s = (sizes.record_on_disk + sizes.state_on_disk) / (config.measured.write_mb_per_s * 1e6)
        user_s = rows * event_s + written_s
        again_s = 0.0 if sizes.state else config.history_events * event_s
        return cls(event_s, user_s, user_s + again_s, config.measured.batch_ms / 1e3)

    def seconds(self, num_events: float, num_users: float) -> float:
        """Core seconds to add new events of `num_users` active users to the store, without the time per batch."""
        return num_events * self.event_s + changed_users(num_events, num_users) * self.changed_user_s


def changed_users(num_events: float, num_users: float) -> float:
    """Expected number of distinct users among events that are spread evenly over `num_users` users."""
    return -num_users * math.expm1(-num_events / num_users)


# A discrete-event simulation of how old summaries become, under bursts and failures.
#
# Users are divided among workers (`shard=i/n`), so each worker has a queue of its own. At the start of a refresh, a
# worker takes all its events that have arrived. They are in the store when the refresh ends.

NUM_DAYS = 3
"""Simulated days. The first one is a warm-up, and the burst is in the busiest hour of the second one."""
MOST_WORKERS = 16
"""Workers to simulate. They are alike, so a sample of them is enough."""
MOST_ARRIVALS = 20_000
"""Times of arrival per worker."""
_NORMAL = 1.1
"""A lag of at most this times the longest one without bursts and failures is normal."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """The workers that refresh a store incrementally."""

    num_workers: int
    seconds: Callable[[float], float]
    """Time that one worker takes for a refresh with this many new events, in s."""
    interval_s: float
    """Time between the starts of two refreshes; 0 starts the next one as soon as there are events."""
    failures_per_day: float = 0.0
    """Of all workers together."""
    restart_s: float = 0.0
    """Time from a failure to the restart. The interrupted refresh starts over."""


@dataclass(frozen=True, slots=True)
class LagReport:
    """How long events wait until they are in the store, in s, over a day and a half around the burst."""

    median_s: float
    p95_s: float
    p99_s: float
    longest_s: float
    caught_up_s: float | None
    """Time after the burst until lags are normal again; 0 if they always are, None if not within a day."""
    failed_longest_s: float
    """Longest lag of a worker that fails at the end of the burst."""
    failed_caught_up_s: float | None
    """Time from this failure until the worker's lags are normal again; None if not within a day."""
    num_simulated: int
    """Simulated workers."""


def refreshed(
    arrivals: NDArray[np.float64],
    weight: float,
    seconds: Callable[[float], float],
    *,
    interval_s: float = 0.0,
    failures: Sequence[float] = (),
    restart_s: float = 0.0,
    most_per_refresh: int | None = None,
) -> NDArray[np.float64]:
    """When each event of one worker is in the store.

    Args:
        arrivals: [N] times in s, ascending.
        weight: events that arrive at each of these times.
        seconds: time of a refresh by its number of events.
        interval_s: refreshes start at multiples of it, or when the previous one ends, if that is later.
        failures: times, ascending, at which the worker fails; the refresh that it is in has no effect.
        restart_s: time from a failure to the restart.
        most_per_refresh: times of arrival that one refresh takes at most; None for no limit.

    Returns:
        [N] times in s at which the refreshes end.
    """
    ends = np.empty(len(arrivals))
    first, free, due, waiting = 0, 0.0, 0.0, list(failures)
    while first < len(arrivals):
        start = max(free, due, float(arrivals[first]))
        if interval_s and start > max(free, due):  # The ticks before this event found nothing to do.
            start = math.ceil(start / interval_s) * interval_s
        while True:
            last = int(np.searchsorted(arrivals, start, side="right"))
            if most_per_refresh is not None:
                last = min(last, first + most_per_refresh)
            end = start + seconds((last - first) * weight)
            if not waiting or waiting[0] >= end:
                break
            start = max(start, waiting.pop(0) + restart_s)
        ends[first:last] = end
        first, free = last, end
        due = (math.floor(start / interval_s) + 1) * interval_s if interval_s else 0.0
    return ends


def simulate_lag(
    rate: ArrivalRate, fleet: Fleet, *, burst: float = 1.0, burst_s: float = 0.0, seed: int = 0
) -> LagReport:
    """Simulate `NUM_DAYS` days of a fleet with one burst.

    Args:
        rate: of all users, without the burst.
        fleet: the workers.
        burst: factor of the rate during the burst, which is in the middle of the busiest hours of the second day.
        burst_s: length of the burst, in s.
        seed: of arrivals and failures.
    """
    peak_s, duration_s = float(DAY_S + PEAK_S), float(NUM_DAYS * DAY_S)
    burst_end_s = peak_s + burst_s / 2
    own = replace(
        rate, per_s=rate.per_s / fleet.num_workers, burst=burst, burst_s=burst_s, burst_start_s=peak_s - burst_s / 2
    )
    num_simulated = min(fleet.num_workers, MOST_WORKERS)
    failures_per_worker = fleet.failures_per_day * NUM_DAYS / fleet.num_workers
    lags = []
    for generator in np.random.default_rng(seed).spawn(num_simulated):
        arrivals, weight = own.arrivals(duration_s, MOST_ARRIVALS, generator)
        failures = np.sort(generator.uniform(0, duration_s, generator.poisson(failures_per_worker)))
        ends = _ends(arrivals, weight, fleet, failures.tolist())
        lags.append((ends - arrivals)[(arrivals >= DAY_S) & (arrivals < duration_s - DAY_S / 2)])
    lag = np.concatenate(lags)

    calm, weight = replace(own, burst=1.0).arrivals(duration_s, MOST_ARRIVALS, None)
    normal_s = _NORMAL * float(np.max(_ends(calm, weight, fleet) - calm, initial=0.0))
    fluid, weight = own.arrivals(duration_s, MOST_ARRIVALS, None)
    with_burst = _ends(fluid, weight, fleet)
    with_failure = _ends(fluid, weight, fleet, [burst_end_s])
    affected = (with_failure > burst_end_s) & (fluid < duration_s - DAY_S / 2)
    median_s, p95_s, p99_s = np.percentile(lag, [50, 95, 99]) if len(lag) else (0.0, 0.0, 0.0)
    return LagReport(
        median_s=float(median_s),
        p95_s=float(p95_s),
        p99_s=float(p99_s),
        longest_s=float(np.max(lag, initial=0.0)),
        caught_up_s=_caught_up(fluid, with_burst, burst_end_s, normal_s, duration_s),
        failed_longest_s=float(np.max((with_failure - fluid)[affected], initial=0.0)),
        failed_caught_up_s=_caught_up(fluid, with_failure, burst_end_s, normal_s, duration_s),
        num_simulated=num_simulated,
    )


def _ends(
    arrivals: NDArray[np.float64], weight: float, fleet: Fleet, failures: Sequence[float] = ()
) -> NDArray[np.float64]:
    return refreshed(
        arrivals,
        weight,
        fleet.seconds,
        interval_s=fleet.interval_s,
        failures=failures,
        restart_s=fleet.restart_s,
    )


def _caught_up(
    arrivals: NDArray[np.float64], ends: NDArray[np.float64], from_s: float, normal_s: float, until_s: float
) -> float | None:
    """Time from `from_s` until the last event with a longer lag than normal is in the store."""
    late = ends[(ends - arrivals > normal_s) & (ends > from_s)]
    if not len(late):
        return 0.0
    return None if late[-1] >= until_s else float(late[-1]) - from_s


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
