"""What the torch backend chooses by itself: to keep no states of short segments, and to multiply in bfloat16."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vista_kernels import accumulate_state
from vista_kernels.torch_backend import short_segments

from .conftest import OPERATORS, Inputs
from .test_operators import check_against_oracle

LENGTHS = [200, 3, 3, 0, 5, 1, 30, 31, 4]
"""The first segment is a long one in small windows."""
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}
QLA = OPERATORS["quasi_linear_attention"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the functions that ran, so that a test can assert that they did."""
    names: list[str] = []
    for name in ("_tiles", "_long_state"):
        plain = getattr(short_segments, name)

        def counted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            names.append(name)
            return plain(*args)

        monkeypatch.setattr(short_segments, name, counted)
    return names


def short_inputs(dtype: torch.dtype, weight: str, width: int = 64) -> Inputs:
    """Return inputs without targets, whose states hold more numbers than the segments."""
    inputs = QLA.make(LENGTHS, dtype, width=width, value_width=6) | {"num_targets": None}
    if weight == "none":
        inputs["weight"] = None
    elif weight == "tokens":
        inputs["weight"] = inputs["weight"][:, 0]
    return inputs


@pytest.mark.processor
@pytest.mark.parametrize("profile", ["bfloat16", "float32"])
@pytest.mark.parametrize("weight", ["none", "tokens", "heads"])
@pytest.mark.parametrize("normalization", ["none", "length"])
@pytest.mark.parametrize("dtype", UNITS, ids=str)
@pytest.mark.usefixtures("small_windows")
def test_short_segments_agree_with_the_oracle(
    dtype: torch.dtype,
    normalization: str,
    weight: str,
    profile: str,
    calls: list[str],
    force_processor: Callable[[str], None],
) -> None:
    force_processor(profile)
    inputs = short_inputs(dtype, weight) | {"normalization": normalization}
    check_against_oracle(QLA, inputs, UNITS[dtype])
    assert calls.count("_tiles") == calls.count("_long_state") == 2  # forward and backward


def test_short_segments_alone_and_together(calls: list[str]) -> None:
    inputs = short_inputs(torch.float64, "heads")
    (together,), gradients = QLA.gradients(QLA.fast, inputs)
    exact = QLA.gradients(QLA.oracle, inputs)[1]
    for ours, theirs in zip(gradients, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    for b in range(len(LENGTHS)):
        alone = QLA.fast(QLA.segment(inputs | {"num_targets": torch.zeros(len(LENGTHS))}, b) | {"num_targets": None})[0]
        torch.testing.assert_close(together[QLA.rows("tokens", inputs, b)], alone, rtol=1e-12, atol=1e-12)
    assert "_tiles" in calls


def test_poison_in_a_short_segment_stays_there(calls: list[str]) -> None:
    inputs = short_inputs(torch.float32, "heads")

    def run(inputs: Inputs) -> tuple[Tensor, ...]:
        outputs, gradients = QLA.gradients(QLA.fast, inputs)
        return outputs + gradients

    clean = run(inputs)
    start, stop = inputs["offsets"][6:8].tolist()
    poisoned = {name: inputs[name].clone() for name in ("q", "k", "v", "weight")}
    for x in poisoned.values():
        x[start + 1 : stop : 2] = torch.nan
    for before, after in zip(clean, run(inputs | poisoned), strict=True):
        assert after[start:stop].isnan().any()
        assert torch.equal(before[:start], after[:start]) and torch.equal(before[stop:], after[stop:])
    assert "_tiles" in calls


@pytest.mark.parametrize("length", [257, 5000])
@pytest.mark.processor
@pytest.mark.parametrize("profile", ["bfloat16", "float32"])
def test_sums_of_bfloat16_tokens_stay_exact(length: int, profile: str, force_processor: Callable[[str], None]) -> None:
    """A sum held in bfloat16 would stop at 256."""
    force_processor(profile)
    ones = torch.ones(length, 2, 3, dtype=torch.bfloat16)
    z, n = accumulate_state(ones, ones, torch.tensor([0, length]), activation="identity")
    assert z.dtype == n.dtype == torch.float32
    assert bool((z == length).all()) and bool((n == length).all())
