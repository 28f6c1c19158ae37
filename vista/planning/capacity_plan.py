"""Cores, machines, disk, memory, and network of a deployment (docs/design/scale.md)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from textwrap import fill

import numpy as np

from vista.config.checks import Codec, Mixing, StateDtype
from vista.config.model_config import ACTION, ModelConfig, counted_categories, parts_of
from vista.config.store_config import ACTIVE_SHARE, MachineConfig, PlanConfig
from vista.counters.counters import CounterSpec
from vista.counters.keys import largest_key
from vista.errors import ConfigError
from vista.log.segment_files import EVENT_COLUMNS
from vista.store.folder_files import MAP_SIZE_BYTES
from vista.store.record import HEADER_BYTES, CounterLayout, RecordSpec, event_bytes
from vista.store.record_encoding import most_bytes
from vista.store.state_record import StateSpec, tables_bytes
from vista.text_table import cores, count, duration, hours, size

# What every plan assumes.

DAY_S = 86_400
PEAK = 1.5
"""Events in the busiest hour of a day, divided by those of an average hour."""
UTILIZATION = 0.6
"""Share of the time that cores are busy in the busiest hour."""
FULL_REFRESH_HOURS = 8.0
"""Time that a full refresh may take."""
HOT_SHARE = 0.2
"""Without a remote store: share of the summaries that stays in the page cache, because their users return soon."""
NETWORK_GBIT_PER_S = 25.0
"""Of each machine."""

# Speed of one core, in float32. tests/planning/test_capacity_plan.py checks these figures against docs/results;
# scripts/benchmarks/fit_planner.py fits those of requests.

TOKEN_NS = 0.16
"""Time per token, layer, and squared width in stage 1, which has a token per event and per row of the summary. From
bench_store.jsonl (full refresh, d=64: 0.15 to 0.16), and bench_summarizer.jsonl (d=256: 0.17)."""
WRITE_MB_PER_S = 500.0
"""Rate of durable writes of records and states. From bench_store.jsonl (470 with K=128 and d=256, 540 with K=32 and
d=64)."""
BATCH_MS = 15.0
"""Fixed time of an incremental refresh, however few users changed. From bench_store.jsonl (incremental refresh of 64
and of 1,000 users)."""
REQUEST_MS = 0.086
"""Time per request, without its tokens. From bench_scorer.jsonl (d=64, 50 candidates)."""
CANDIDATE_US = 0.57
"""Time per candidate, without its token. From bench_scorer.jsonl (d=64, 50 to 5,000 candidates)."""
REQUEST_TOKEN_NS = 0.1
"""`TOKEN_NS` of stage 2, which has a token per row of the summary, event of the tail, and candidate. From
bench_scorer.jsonl (d=256)."""


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
            "network": network_bytes_per_s / (NETWORK_GBIT_PER_S * 1e9 / 8),
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
with Valkey 8.1 (tests/planning/test_capacity_plan.py)."""


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
            model: its shape, with `counter_keys` null meaning none.
            codec: how summaries are stored.
            state: how states are stored; bidirectional mixing has none.
            num_items: of the catalog, which decides how many bytes a counted key has.
            history_events: events per user, which are as many counted keys per field in a state at most.

        Raises:
            ConfigError: a record would exceed the format's limit, or it is unknown how many actions are counted.
        """
        if unnamed := [key for key in model.counter_keys or [] if ACTION in parts_of(key)]:
            raise ConfigError(
                f"model.counter_keys: {unnamed[0]!r} is a key per action; list them, such as item*action:click"
            )
        spec = CounterSpec.of(model, has_time=True, actions=[])
        layout = None
        if spec is not None:
            # Most categories have fewer values than there are items.
            sizes = dict.fromkeys(counted_categories(spec.fields), num_items)
            layout = CounterLayout.of(spec, [largest_key(field, num_items, sizes) for field in spec.fields])
        try:
            record_spec = RecordSpec(
                summarizer_id=bytes(32),
                generation=1,
                num_tokens=model.num_rows,
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
                num_layers=model.num_layers,
                num_heads=model.num_heads,
                head_dim=model.dim // model.num_heads,
                dtype=state,
                pooled_dim=model.space_dim,
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
    return TOKEN_NS * 1e-9 * num_layers * config.model.dim**2


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
        rows = config.model.num_seeds
        written_s = (sizes.record_on_disk + sizes.state_on_disk) / (WRITE_MB_PER_S * 1e6)
        user_s = rows * event_s + written_s
        again_s = 0.0 if sizes.state else config.history_events * event_s
        return cls(event_s, user_s, user_s + again_s, BATCH_MS / 1e3)

    def seconds(self, num_events: float, num_users: float) -> float:
        """Core seconds to add new events of `num_users` active users to the store, without the time per batch."""
        return num_events * self.event_s + changed_users(num_events, num_users) * self.changed_user_s


def changed_users(num_events: float, num_users: float) -> float:
    """Expected number of distinct users among events that are spread evenly over `num_users` users."""
    return -num_users * math.expm1(-num_events / num_users)


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
    """Cores that finish a full refresh within `FULL_REFRESH_HOURS`."""
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
        """Mean time from an event in the busiest hour until it is in the store."""
        return max(self.config.refresh_every_s, self.refresh_s) / 2 + self.refresh_s

    @property
    def longest_lag_s(self) -> float:
        """The same for the event that waits longest."""
        return max(self.config.refresh_every_s, self.refresh_s) + self.refresh_s

    def __str__(self) -> str:
        config = self.config
        parts = [
            f"{count(config.users)} users, {count(config.events_per_day)} events per day, "
            f"{count(config.requests_per_s)} requests per s of {config.candidates} candidates",
            *_section("Disk", _disk(self)),
            *_section("Refresh", _refresh(self)),
            *_section("Serving", _serving(self)),
            *_section(
                _machine_title(self), [(one.name, f"{count(one.machines)}, by {one.bound_by}") for one in self.groups]
            ),
            "Assumptions",
            *(fill(line, 110, initial_indent="  - ", subsequent_indent="    ") for line in assumptions(self)),
        ]
        return "\n".join(parts)


def plan_capacity(config: PlanConfig) -> CapacityPlan:
    """Plan a deployment. Raises ConfigError if a refresh takes longer than the time between two even without events, a
    record is too large, or the items do not fit a machine."""
    history = round(config.history_events)
    # Without a choice, refreshes write to a folder, from which a remote store is copied.
    state = config.state or StateDtype.float32
    sizes = StoreSizes.of(config.model, config.codec, state, num_items=round(config.items), history_events=history)
    cost = RefreshCost.of(config, sizes)
    per_s, active = config.events_per_day / DAY_S, config.users * ACTIVE_SHARE
    busy_s = config.refresh_every_s * UTILIZATION
    if busy_s <= cost.batch_s:
        raise ConfigError(
            f"refresh_every_s: a refresh takes {cost.batch_s:.2g} s without any events, but {config.refresh_every_s:g} "
            f"s at a utilization of {UTILIZATION:g} leave {busy_s:.2g} s; refresh less often"
        )
    new_events = per_s * PEAK * config.refresh_every_s
    work_s = cost.seconds(new_events, active)
    workers = max(1, math.ceil(work_s / (busy_s - cost.batch_s)))
    on_disk = (config.users * sizes.record_on_disk, config.users * sizes.state_on_disk)
    full_s = config.users * (config.history_events * cost.event_s + cost.full_user_s)
    full_cores = max(1, math.ceil(full_s / (FULL_REFRESH_HOURS * 3600)))
    request_s = request_core_s(config)
    changed = changed_users(new_events, active)
    sent = changed if config.remote_store and not sizes.state else config.users
    records_per_s = sent / config.refresh_every_s + config.users / (FULL_REFRESH_HOURS * 3600)
    plan = CapacityPlan(
        config=config,
        sizes=sizes,
        summary_bytes=on_disk[0],
        state_bytes=on_disk[1],
        log_bytes=config.users * config.history_events * EVENT_BYTES,
        log_bytes_per_day=config.events_per_day * EVENT_BYTES,
        events_per_s=per_s * PEAK,
        changed_users=changed,
        refresh_workers=workers,
        refresh_s=work_s / workers + cost.batch_s,
        shards=max(workers, math.ceil(2 * max(on_disk) / MAP_SIZE_BYTES)),
        full_refresh_core_s=full_s,
        full_refresh_cores=full_cores,
        request_s=request_s,
        serving_cores=max(1, math.ceil(config.requests_per_s * request_s / UTILIZATION)),
        request_bytes=config.candidates * CANDIDATE_BYTES + (sizes.record if config.remote_store else 0),
        # Per item: its retrieval vector, its vector with four projections (`ItemProjections`), that of the item space,
        # which the retrieval vector has too, float32, and followers.
        item_bytes=config.items
        * (6 * config.model.dim * 4 + 8 * config.model.space_dim + 8 * config.model.num_transitions),
        copied_bytes_per_s=records_per_s * sizes.record * config.replicas,
        groups=(),
    )
    return replace(plan, groups=_groups(plan))


def request_core_s(config: PlanConfig) -> float:
    """Time of one core for a request of one user."""
    model = config.model
    tokens = model.num_seeds + model.tail_len + config.candidates
    fixed_s = REQUEST_MS * 1e-3 + config.candidates * CANDIDATE_US * 1e-6
    return fixed_s + tokens * REQUEST_TOKEN_NS * 1e-9 * model.num_target_layers * model.dim**2


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
            memory_bytes=HOT_SHARE * copies_bytes,
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


# The plan as text.

_WIDTH = 36


def _section(title: str, rows: Sequence[tuple[str, str]]) -> list[str]:
    return [title, *(f"  {name:<{_WIDTH}}{value}" for name, value in rows)]


def _disk(plan: CapacityPlan) -> list[tuple[str, str]]:
    sizes = plan.sizes
    if plan.writes_to_server:
        rows = [("record of a user", size(sizes.record))]
    else:
        rows = [
            ("record of a user", f"{size(sizes.record)}, in pages {size(sizes.record_on_disk)}"),
            ("summaries, one generation", size(plan.summary_bytes)),
        ]
    if sizes.state:
        rows.append(("state of a user", f"{size(sizes.state)}, in pages {size(sizes.state_on_disk)}"))
        rows.append(("states, one generation", size(plan.state_bytes)))
    return [*rows, ("event log", f"{size(plan.log_bytes)}, growing by {size(plan.log_bytes_per_day)} per day")]


def _refresh(plan: CapacityPlan) -> list[tuple[str, str]]:
    config = plan.config
    full_s = plan.full_refresh_core_s
    full = f"{cores(plan.full_refresh_cores)}, {duration(full_s / plan.full_refresh_cores)} ({hours(full_s)})"
    return [
        ("new events in the busiest hour", f"{count(plan.events_per_s)} per s"),
        ("changed users per refresh", f"{count(plan.changed_users)} of {count(config.users * ACTIVE_SHARE)} active"),
        ("incremental refresh", f"{cores(plan.refresh_workers)}, {duration(plan.refresh_s)} each time"),
        ("lag of an event", f"mean {duration(plan.mean_lag_s)}, longest {duration(plan.longest_lag_s)}"),
        ("full refresh", full),
        ("records sent to the copies", f"{size(plan.copied_bytes_per_s)} per s"),
        ("shards of the store", f"at least {count(plan.shards)}"),
    ]


def _serving(plan: CapacityPlan) -> list[tuple[str, str]]:
    config = plan.config
    return [
        ("request", f"{duration(plan.request_s)} of one core, {size(plan.request_bytes)} of network"),
        ("all requests", cores(plan.serving_cores)),
        ("network", f"{size(config.requests_per_s * plan.request_bytes)} per s"),
        ("vectors of items, per machine", f"{size(plan.item_bytes)} of memory"),
    ]


def _machine_title(plan: CapacityPlan) -> str:
    machine = plan.config.machine
    return (
        f"Machines of {cores(machine.cores)}, {machine.memory_gb:g} GB memory, {machine.disk_tb:g} TB disk, "
        f"{NETWORK_GBIT_PER_S:g} Gbit/s"
    )


def assumptions(plan: CapacityPlan) -> list[str]:
    """The assumptions of the plan, one sentence each."""
    config, model = plan.config, plan.config.model
    lines = [
        f"model: {model.num_seeds} summary tokens of width {model.dim}, {model.num_layers} layers in stage 1 and "
        f"{model.num_target_layers} in stage 2, float32 on CPUs, {config.codec.value} summaries, no features",
        f"one core: {TOKEN_NS:g} ns per token, layer, and squared width ({REQUEST_TOKEN_NS:g} in requests); "
        f"{WRITE_MB_PER_S:g} MB/s of durable writes; {BATCH_MS:g} ms per refresh; "
        f"{REQUEST_MS:g} ms per request; {CANDIDATE_US:g} µs per candidate",
        f"cores are busy {100 * UTILIZATION:g} % of the busiest hour, which has {PEAK:g} times "
        "the events of an average one",
        f"{config.history_events:,g} events of {EVENT_BYTES} bytes per user; the events of a day are spread evenly "
        f"over {100 * ACTIVE_SHARE:g} % of the users",
        f"up to {GENERATIONS} generations at a time, {config.replicas} copies of each summary",
    ]
    if config.remote_store:
        lines.append(f"summaries are in the memory of servers, {size(plan.sizes.on_server)} per record")
        if plan.stores_on_servers > 1:
            lines.append(
                f"the users are divided among {count(plan.stores_on_servers)} stores on servers, because such a store "
                "has no shards; the client knows the store of each user"
            )
    else:
        lines.append(
            f"summaries are on the disks of the machines that serve, {100 * HOT_SHARE:g} % of them in the "
            "page cache; each request goes to a machine that has its user"
        )
    if not plan.writes_to_server:
        lines.append("each refresh ends with a copy of the complete generation, whose time is not in the lag")
    if not plan.sizes.state:
        why = "bidirectional mixing has none" if model.mixing is Mixing.bidirectional else "state=none"
        lines.append(f"without states ({why}), a changed user's whole history is summarized again")
    lines.append("training, the machines' own software, and protocol overhead are not counted")
    return lines
