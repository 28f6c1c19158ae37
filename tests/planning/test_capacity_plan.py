"""Plans grow with what is asked, refuse what makes no sense, and print and write what they compute."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from vista.cli.main import main
from vista.config import PlanConfig
from vista.config.composition import compose_config
from vista.errors import ConfigError
from vista.planning.capacity_plan import CapacityPlan, plan_capacity
from vista.text_table import count, duration, plain, size

LARGE = ("users=1e8", "events_per_day=5e9", "requests_per_s=2e4", "model.dim=128", "model.num_seeds=64")
REMOTE = ("remote_store=true",)


@lru_cache
def plan_of(*words: str) -> CapacityPlan:
    return plan_capacity(compose_config(PlanConfig, words))


@pytest.mark.parametrize(
    ("word", "grows"),
    [
        ("users=2e8", ("summary_bytes", "state_bytes", "log_bytes", "full_refresh_cores", "copied_bytes_per_s")),
        ("events_per_day=2e10", ("log_bytes_per_day", "refresh_workers", "events_per_s")),
        ("requests_per_s=4e4", ("serving_cores",)),
        ("candidates=1000", ("serving_cores", "request_s", "request_bytes")),
        ("model.dim=256", ("summary_bytes", "state_bytes", "request_s", "refresh_workers", "item_bytes")),
        ("model.counters=true", ("state_bytes",)),
        ("codec=float32", ("summary_bytes",)),
        ("history_events=5000", ("log_bytes", "full_refresh_core_s")),
        ("refresh_every_s=60", ("refresh_workers", "copied_bytes_per_s")),
        ("remote_store=true", ("request_bytes",)),
        ("model.mixing=bidirectional", ("refresh_workers",)),
        ("model.num_layers=4", ("refresh_workers", "full_refresh_core_s")),
        ("model.num_target_layers=4", ("serving_cores",)),
    ],
)
def test_needs_grow_with_what_is_asked(word: str, grows: tuple[str, ...]) -> None:
    before, after = plan_of(*LARGE), plan_of(*LARGE, word)
    for name in grows:
        assert getattr(after, name) > getattr(before, name), name


def test_a_plan_by_hand() -> None:
    """One million users, half of them active, with a day of 57.6 million events: 1,000 per s in the busiest hour."""
    plan = plan_of("users=1e6", "events_per_day=57.6e6", "requests_per_s=1000")
    event_s = 0.16e-9 * 2 * 64**2
    assert plan.sizes.record == 128 + 16 * (64 + 8) + 32 * (4 + 8 + 1)
    assert plan.sizes.state == 120 + 2 * 4 * 4 + 4 * 2 * 4 * 16**2
    assert plan.summary_bytes == pytest.approx(1e6 * (4096 / 2) * (1 + 1 / 204), rel=1e-3)
    assert plan.changed_users == pytest.approx(5e5 * (1 - 2.718281828**-7.2), rel=1e-6)
    user_s = 16 * event_s + (plan.sizes.record_on_disk + plan.sizes.state_on_disk) / 500e6
    refresh_s = 3.6e6 * event_s + plan.changed_users * user_s + 0.015
    assert (plan.refresh_workers, plan.refresh_s) == (1, pytest.approx(refresh_s))
    assert plan.mean_lag_s == pytest.approx(1800 + refresh_s)
    request_s = 1.7e-3 + 500 * 1.4e-6 + (16 + 32 + 500) * event_s
    assert plan.request_s == pytest.approx(request_s)
    assert plan.serving_cores == -(-1000 * request_s // 0.6)
    assert plan.log_bytes == 1e6 * 1000 * 17
    assert [(group.name, group.machines) for group in plan.groups] == [("refresh", 1), ("serving", 1)]


def test_a_remote_store_needs_memory_instead_of_disks() -> None:
    local, remote, direct = (plan_of(*LARGE, *more) for more in ((), REMOTE, (*REMOTE, "state=none")))
    assert [group.name for group in remote.groups] == ["refresh", "serving", "store"]
    store = remote.groups[2]
    assert store.bound_by == "memory"
    assert store.machines == -(-3 * 2 * 1e8 * remote.sizes.on_server // 256e9)
    assert remote.sizes.record < remote.sizes.on_server < 1.3 * remote.sizes.record
    assert remote.copied_bytes_per_s == local.copied_bytes_per_s
    assert (local.stores_on_servers, remote.stores_on_servers) == (0, max(remote.shards, -(-store.machines // 2)))
    assert f"divided among {remote.stores_on_servers} stores on servers" in " ".join(str(remote).split())
    # Without states, the refresh writes to the server: only what changed, after reading whole histories again.
    assert direct.writes_to_server and not remote.writes_to_server
    assert direct.copied_bytes_per_s < remote.copied_bytes_per_s
    assert direct.refresh_workers > remote.refresh_workers


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["users=0"], r"users: must be positive and finite, got 0"),
        (["users=0.5"], r"users: must be at least 1, got 0\.5"),
        (["users=1e30"], r"users: must be at most 1e\+15"),
        (
            ["users=10", "events_per_day=1e9"],
            r"events_per_day: is 2e\+08 per active user, more than one per second; check users and this",
        ),
        (["burst=0.5"], r"burst: must lie in \[1, 1000\], got 0\.5"),
        (["refresh_every_s=0"], r"refresh_every_s: must lie in \[1, 86400\], got 0"),
        (["candidates=0"], r"candidates: must be at least 1, got 0"),
        (["model=tail-only"], r"model\.architecture: only vista with num_seeds above 0 stores summaries"),
        (["items=1e9"], r"machine\.memory_gb: the vectors of the items take 1\.5 TB on each machine"),
        (["machine.disk_tb=0"], r"machine\.disk_tb: must be positive and finite, got 0"),
    ],
)
def test_senseless_input_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_of(*words)


def test_the_command_prints_and_writes_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "plan.json"
    words = [*LARGE, "burst=3", "failures_per_day=2"]
    assert main(["plan", *words, f"out={out}"]) == 0
    printed = capsys.readouterr().out
    plan = plan_of(*words, f"out={out}")
    assert printed == f"{plan}\n"
    assert printed.startswith(
        "100 million users, 5 billion events per day, 20 thousand requests per s of 500 candidates"
    )
    for title in ("Disk", "Refresh", "Serving", "Simulated lag of an event", "Machines of 32 cores", "Assumptions"):
        assert f"\n{title}" in printed
    assert max(map(len, printed.splitlines())) <= 120
    written: dict[str, Any] = json.loads(out.read_text())
    assert written["refresh_workers"] == plan.refresh_workers
    assert written["sizes"]["record"] == plan.sizes.record
    assert written["config"]["model"]["dim"] == 128 and written["config"]["codec"] == "int8"
    assert plan.lag is not None and written["lag"]["p99_s"] == plan.lag.p99_s
    refresh = plan.groups[0]
    assert written["groups"][0] == {"name": "refresh", "machines": refresh.machines, "bound_by": refresh.bound_by}
    assert written["longest_lag_s"] == plan.longest_lag_s and len(written["assumptions"]) >= 8


def test_numbers_have_two_significant_digits() -> None:
    assert [*map(plain, (0, 0.1234, 9.96, 10.4, 123, 12_345))] == ["0", "0.12", "10", "10", "120", "12,000"]
    expected = ["7", "9,900", "10 thousand", "1.2 million", "50 billion"]
    assert [*map(count, (7, 9_940, 9_999, 1_234_567, 5e10))] == expected
    assert [*map(size, (0, 999, 34_336, 1.08e14))] == ["0 B", "1 KB", "34 KB", "110 TB"]
    expected = ["0 s", "0.2 µs", "16 ms", "1 s", "1 min", "1 h", "1.5 h", "2.1 days", "more than a day"]
    assert [*map(duration, (0, 2e-7, 0.0161, 1, 61, 3599, 5400, 180_000, None))] == expected
