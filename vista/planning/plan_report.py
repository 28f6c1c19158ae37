"""A capacity plan as text, with everything that it assumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import fill

from vista.config.choices import Mixing
from vista.planning.capacity_plan import EVENT_BYTES, GENERATIONS, NUM_DAYS, CapacityPlan
from vista.planning.quantities import cores, count, duration, hours, size

_WIDTH = 36


@dataclass(frozen=True, slots=True)
class PlanReport:
    """Prints a plan."""

    plan: CapacityPlan

    def __str__(self) -> str:
        plan, config = self.plan, self.plan.config
        parts = [
            f"{count(config.users)} users, {count(config.events_per_day)} events per day, "
            f"{count(config.requests_per_s)} requests per s of {config.candidates} candidates",
            *_section("Disk", _disk(plan)),
            *_section("Refresh", _refresh(plan)),
            *_section("Serving", _serving(plan)),
            *(_section("Simulated lag of an event", _lag(plan)) if plan.lag is not None else ()),
            *_section(
                _machine_title(plan), [(one.name, f"{count(one.machines)}, by {one.bound_by}") for one in plan.groups]
            ),
            "Assumptions",
            *(fill(line, 110, initial_indent="  - ", subsequent_indent="    ") for line in assumptions(plan)),
        ]
        return "\n".join(parts)


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
        (
            "changed users per refresh",
            f"{count(plan.changed_users)} of {count(config.users * config.active_share)} active",
        ),
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


def _lag(plan: CapacityPlan) -> list[tuple[str, str]]:
    lag, config = plan.lag, plan.config
    assert lag is not None
    rows = [
        ("median, 95 %, 99 %, longest", ", ".join(map(duration, (lag.median_s, lag.p95_s, lag.p99_s, lag.longest_s)))),
    ]
    if config.burst > 1:
        rows.append(("normal again after the burst", duration(lag.caught_up_s)))
    if config.failures_per_day:
        rows.append(("longest of a worker that fails", duration(lag.failed_longest_s)))
        rows.append(("normal again after its failure", duration(lag.failed_caught_up_s)))
    return rows


def _machine_title(plan: CapacityPlan) -> str:
    machine = plan.config.machine
    return (
        f"Machines of {cores(machine.cores)}, {machine.memory_gb:g} GB memory, {machine.disk_tb:g} TB disk, "
        f"{machine.network_gbit_per_s:g} Gbit/s"
    )


def assumptions(plan: CapacityPlan) -> list[str]:
    """The assumptions of the plan, one sentence each."""
    config, measured = plan.config, plan.config.measured
    model = config.model
    lines = [
        f"model: {model.num_seeds} summary tokens of width {model.dim}, {model.num_layers} layers in stage 1 and "
        f"{model.num_target_layers} in stage 2, float32 on CPUs, {config.codec.value} summaries, no features",
        f"one core: {measured.token_ns:g} ns per token, layer, and squared width; "
        f"{measured.write_mb_per_s:g} MB/s of durable writes; {measured.batch_ms:g} ms per refresh; "
        f"{measured.request_ms:g} ms per request; {measured.candidate_us:g} µs per candidate",
        f"cores are busy {100 * config.utilization:g} % of the busiest hour, which has {config.peak:g} times "
        "the events of an average one",
        f"{config.history_events:,g} events of {EVENT_BYTES} bytes per user; the events of a day are spread evenly "
        f"over {100 * config.active_share:g} % of the users",
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
            f"summaries are on the disks of the machines that serve, {100 * config.hot_share:g} % of them in the "
            "page cache; each request goes to a machine that has its user"
        )
    if not plan.writes_to_server:
        lines.append("each refresh ends with a copy of the complete generation, whose time is not in the lag")
    if not plan.sizes.state:
        why = "bidirectional mixing has none" if model.mixing is Mixing.bidirectional else "state=none"
        lines.append(f"without states ({why}), a changed user's whole history is summarized again")
    if plan.lag is not None:
        lines.append(
            f"simulation: {NUM_DAYS} days, {plan.lag.num_simulated} of {count(plan.refresh_workers)} workers, events "
            f"at random times; burst of {config.burst:g} for {duration(60 * config.burst_minutes)}, "
            f"{config.failures_per_day:g} failures per day with a restart after "
            f"{duration(60 * config.restart_minutes)}"
        )
    lines.append("training, the machines' own software, and protocol overhead are not counted")
    return lines
