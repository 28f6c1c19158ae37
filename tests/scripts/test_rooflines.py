"""Rooflines are positive, grow with the work, and combine their parts as documented."""

from __future__ import annotations

import math

import pytest
import torch

from scripts.benchmarks import rooflines
from scripts.benchmarks.rooflines import (
    Roofline,
    RooflineWork,
    backward_roofline,
    forward_roofline,
    matmul_roofline,
    products,
    short_users_roofline,
)
from scripts.benchmarks.timing import interleaved, timing_of

pytestmark = pytest.mark.research
SHAPE = (512, 2, 64, torch.bfloat16)


def test_rooflines_grow_with_the_work() -> None:
    assert matmul_roofline(512, 512, 512) > matmul_roofline(4, 4, 4) > 0


@pytest.mark.parametrize(
    "roofline",
    [
        forward_roofline(*SHAPE),
        backward_roofline(*SHAPE),
        short_users_roofline(500, 20, 64, torch.float32, state_passes=2),
    ],
    ids=["forward", "backward", "short users"],
)
def test_rooflines_are_measured(roofline: Roofline) -> None:
    timing = interleaved(roofline.calls(), rounds=3)
    parts = roofline.parts(timing)
    assert len(timing) == len(roofline.calls()) and all(0 < part < math.inf for part in parts)
    assert roofline.seconds(timing) == max(parts[:2]) + parts[2]
    assert "products" in roofline.describe(timing)


def test_a_roofline_by_hand() -> None:
    copy, product, silu = (RooflineWork(lambda: None, times, "") for times in (2.0, 3.0, 0.5))
    timing = {f"roofline {index}": timing_of([seconds]) for index, seconds in enumerate([10.0, 4.0, 5.0, 2.0])}
    roofline = Roofline(copy, (product, product.scaled(2)), (silu,))
    assert roofline.parts(timing) == (20.0, 3 * 4 + 6 * 5, 1.0) and roofline.seconds(timing) == 43.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bytes_that_must_move(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[int] = []
    monkeypatch.setattr(
        rooflines, "copying", lambda num_bytes: moved.append(num_bytes) or RooflineWork(lambda: None, 1, "")
    )
    forward_roofline(300, 1, 64, dtype)
    backward_roofline(300, 1, 64, dtype)
    for passes in (1, 2):
        short_users_roofline(300, 20, 64, dtype, state_passes=passes)  # type: ignore[arg-type]
    token, state = 64 * dtype.itemsize, 64 * 64 * 4
    assert moved == [4 * 300 * token, 7 * 300 * token, *(4 * 300 * token + n * 20 * state for n in (1, 2))]


def test_products_do_what_they_count() -> None:
    tried = products(3, 4, 5, count=8, dtypes=(torch.float32, torch.bfloat16), batches=(1, 4, 16))
    assert len(tried) == 2 * 2 * 4 and {work.times for work in tried} == {8, 2}  # there are fewer than 16 products
    assert {tuple(work.call().shape) for work in tried} == {(3, 4), (4, 3, 4)}  # type: ignore[attr-defined]
    assert len({work.form for work in tried}) == len(tried)


def test_float32_products_stay_in_float32() -> None:
    assert rooflines.product_dtypes(torch.float32) == (torch.float32,)
    assert rooflines.product_dtypes(torch.bfloat16) == (torch.float32, torch.bfloat16)
