"""The plan against what is published about VISTA's deployment (Chen et al., ICLR 2026, arXiv 2510.22049).

Title and abstract: "hundreds of trillions of parameters", a platform of "billions of users", "a few hundred tokens".
Our notes on the text: K = 128, d = 256, a refresh every two hours, 94 % less inference cost, histories of up to 16,000
events. A reader's summary, not checked against the text: a cache of 100 TB to 1 PB per deployment
(https://www.hotmolts.com/post/why-meta-caches-1-petabyte-of-user-embeddings-and--832574c8-b20e-49f1-8acf-e7e514b0490d).
"""

from __future__ import annotations

import pytest

from vista.config import ModelConfig, PlanConfig
from vista.config.choices import Codec
from vista.config.composition import compose_config
from vista.planning.capacity_plan import plan_capacity, request_core_s
from vista.planning.refresh_cost import token_s

PUBLISHED_BYTES = (100e12, 1e15)
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
