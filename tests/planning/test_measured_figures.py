"""The plan explains the results of the benchmarks in docs/results, and what is published about VISTA's deployment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vista.config import ModelConfig, PlanConfig
from vista.config.checks import Codec, StateDtype
from vista.config.composition import compose_config
from vista.planning.capacity_plan import WRITE_MB_PER_S, RefreshCost, StoreSizes, plan_capacity, request_core_s, token_s

RESULTS = Path(__file__).parents[2] / "docs" / "results"
NEW = 50
"""New events per user in the incremental refreshes."""


def measured(bench: str, case: str, column: str = "value", cpu: str = "AMD EPYC") -> float:
    """The newest row of a case on one kind of processor."""
    rows = [json.loads(line) for line in (RESULTS / f"bench_{bench}.jsonl").read_text().splitlines()]
    values = [row[column] for row in rows if row["case"] == case and row["hardware"]["cpu"].startswith(cpu)]
    return float(values[-1])


def refresh_cost(num_seeds: int, dim: int) -> tuple[RefreshCost, StoreSizes]:
    config = PlanConfig(model=ModelConfig(dim=dim, num_seeds=num_seeds))
    sizes = StoreSizes.of(config.model, config.codec, StateDtype.float32, num_items=50_000, history_events=1_000)
    return RefreshCost.of(config, sizes), sizes


@pytest.mark.parametrize(
    ("num_users", "length"), [(64, 10_000), (64, 100_000), (64, 1_000_000), (1_000, 10_000)], ids=str
)
def test_refreshes_of_bench_store(num_users: int, length: int) -> None:
    """One thread, K=32, d=64: `value` is an incremental refresh, `baseline` a full one, in ms."""
    case = f"incremental refresh of {num_users} users of {length:,} events, {NEW} new each, against a full refresh"
    cost, _ = refresh_cost(32, 64)
    incremental_s = cost.batch_s + num_users * (NEW * cost.event_s + cost.changed_user_s)
    assert incremental_s * 1e3 == pytest.approx(measured("store", case), rel=0.15)
    full_s = num_users * (length * cost.event_s + cost.full_user_s)
    assert full_s * 1e3 == pytest.approx(measured("store", case, "baseline"), rel=0.2)


def test_full_refresh_of_many_short_histories() -> None:
    """One thread, K=32, d=64: the stages of the refresh in s."""
    prefix = "full refresh of 6,040 users, 1,002,035 events: "
    stages = ("read", "summarize", "encode", "write", "publish", "other")
    cost, _ = refresh_cost(32, 64)
    planned_s = 1_002_035 * cost.event_s + 6_040 * cost.full_user_s
    assert planned_s == pytest.approx(sum(measured("store", prefix + stage) for stage in stages), rel=0.2)


def test_summarizer_of_the_paper() -> None:
    """Two threads, d=256, three layers: 1,000,000 events per history."""
    case = "1,000,000 events, separable, d=256, K=128, 3 layers, float32: time over the roofline"
    planned_s = 1e6 * token_s(PlanConfig(model=ModelConfig(dim=256)), 3)
    assert planned_s == pytest.approx(2 * measured("summarizer", case), rel=0.1)


@pytest.mark.parametrize(("num_seeds", "dim"), [(32, 64), (128, 256)])
def test_durable_writes(num_seeds: int, dim: int) -> None:
    """One thread: records of this size per s."""
    per_s = measured("store", f"K={num_seeds}, d={dim}: durable writes in batches of 512, against raw LMDB")
    _, sizes = refresh_cost(num_seeds, dim)
    assert per_s * sizes.record == pytest.approx(WRITE_MB_PER_S * 1e6, rel=0.1)


def test_requests_of_a_worker_with_one_thread() -> None:
    case = "d=256, K=128, 500 candidates: two worker processes of one thread each against one"
    planned_s = request_core_s(PlanConfig(model=ModelConfig(dim=256, num_seeds=128)))
    assert 1 / planned_s == pytest.approx(measured("scorer", case, "baseline"), rel=0.15)


@pytest.mark.parametrize("candidates", [50, 500, 5000])
@pytest.mark.parametrize(("num_seeds", "dim"), [(16, 64), (128, 256)])
def test_requests_with_two_threads(num_seeds: int, dim: int, candidates: int) -> None:
    """A call with two threads takes at least half of the time of one core, and at most all of it."""
    model = ModelConfig(dim=dim, num_seeds=num_seeds)
    planned_ms = 1e3 * request_core_s(PlanConfig(model=model, candidates=candidates))
    two_threads_ms = measured("scorer", f"d={dim}, K={num_seeds}, {candidates} candidates: median")
    assert 0.9 * two_threads_ms < planned_ms < 2.2 * two_threads_ms


PUBLISHED_BYTES = (100e12, 1e15)
"""VISTA's deployment (Chen et al., ICLR 2026, arXiv 2510.22049).

Title and abstract: "hundreds of trillions of parameters", a platform of "billions of users", "a few hundred tokens".
Our notes on the text: K = 128, d = 256, a refresh every two hours, 94 % less inference cost, histories of up to 16,000
events. A reader's summary, not checked against the text: a cache of 100 TB to 1 PB per deployment
(https://www.hotmolts.com/post/why-meta-caches-1-petabyte-of-user-embeddings-and--832574c8-b20e-49f1-8acf-e7e514b0490d).
"""
PUBLISHED_VALUES = (1e14, 1e15)
"""Hundreds of trillions."""
USERS = 3.2e9
"""Billions, as few as give a hundred trillion values."""


@pytest.mark.parametrize(
    ("num_seeds", "codec", "expected_bytes"),
    [
        # 3.2e9 users x 128 rows x (256 int8 values + 8 bytes of scale and bias), or 2 bytes per value.
        (128, Codec.int8, 108e12),
        (128, Codec.float16, 210e12),
        (256, Codec.int8, 216e12),
        (256, Codec.float16, 419e12),
    ],
)
def test_cache_of_the_published_size(num_seeds: int, codec: Codec, expected_bytes: float) -> None:
    model = compose_config(PlanConfig, ["model=paper", f"model.num_seeds={num_seeds}"]).model
    plan = plan_capacity(PlanConfig(users=USERS, events_per_day=1e11, model=model, codec=codec))
    low, high = PUBLISHED_VALUES
    assert low <= USERS * model.num_seeds * model.dim <= high
    assert PUBLISHED_BYTES[0] <= plan.summary_bytes <= PUBLISHED_BYTES[1]
    # Pages, headers, and tails add less than a tenth to the values themselves.
    assert expected_bytes <= plan.summary_bytes <= 1.1 * expected_bytes


def test_refreshed_every_two_hours() -> None:
    """A refresh ends before the next one starts, so no summary is older than two intervals."""
    model = ModelConfig(dim=256, num_seeds=128)
    plan = plan_capacity(PlanConfig(users=USERS, events_per_day=1e11, model=model, refresh_every_s=7200))
    assert 3600 < plan.mean_lag_s < plan.longest_lag_s < 2 * 7200


def test_stored_summaries_save_what_is_published() -> None:
    """94 % less: without a store, a request would summarize the history first.

    bench_scorer.jsonl measures 94 % (separable mixing, float32, two threads).
    """
    config = PlanConfig(model=ModelConfig(dim=256, num_seeds=128))
    stored_s = request_core_s(config)
    recomputed_s = stored_s + 16_000 * token_s(config, config.model.num_layers)
    assert 1 - stored_s / recomputed_s == pytest.approx(0.94, abs=0.03)
