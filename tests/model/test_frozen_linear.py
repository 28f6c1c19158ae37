"""Frozen linear maps compute what the maps they were made from compute, packed or not."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vista.config.choices import Precision, TargetAttentionKind
from vista.model import frozen_linear as frozen_module
from vista.model import inference
from vista.model.frozen_linear import FrozenLinear, frozen
from vista.model.layers import FeedForward, linear_parts
from vista.model.padded_tail import pad_tail
from vista_kernels.processor import PROFILES, Processor, processor

pytestmark = pytest.mark.processor
UNIT = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}
"""Rounding of inputs, weights and result, relative to the largest output."""


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packed(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, force_processor: Callable[[str], None]
) -> None:
    """Weights packed in every dtype that this processor can pack, and in none."""
    force_processor("bfloat16")
    packable = processor().packed_dtypes
    if request.param and not packable:
        pytest.skip("torch without oneDNN")
    forced = Processor("forced", True, packable if request.param else ())
    monkeypatch.setattr(frozen_module, "processor", lambda: forced)


def linear(inputs: int, outputs: int, *, bias: bool = False) -> nn.Linear:
    torch.manual_seed(inputs + outputs)
    return nn.Linear(inputs, outputs, bias=bias)


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", UNIT, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_frozen_map_computes_what_the_map_computes(dtype: torch.dtype, bias: bool) -> None:
    one = linear(24, 40, bias=bias)
    for shape in ((3, 24), (2, 5, 24), (0, 24), (1, 1, 24)):
        x = torch.randn(shape)
        with torch.inference_mode():
            output, expected = FrozenLinear(one, dtype)(x), one(x)
        assert output.dtype is dtype and output.shape == expected.shape
        torch.testing.assert_close(output.float(), expected, rtol=0, atol=8 * UNIT[dtype])


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_parts_equal_those_of_the_whole_output(dtype: torch.dtype) -> None:
    one = linear(16, 32)
    for shape, first in itertools.product(((2, 9, 16), (0, 16), (3, 0, 16), (1, 16)), (0, 2, 3)):
        x = torch.randn(shape)
        with torch.inference_mode():
            whole = F.linear(x, one.weight).chunk(4, -1)
            parts = linear_parts(x, FrozenLinear(one, dtype), 4, first)
            trained = linear_parts(x, one, 4, first)
        assert len(parts) == len(trained) == 4 - first
        for part, other, expected in zip(parts, trained, whole[first:], strict=True):
            assert part.shape == expected.shape
            torch.testing.assert_close(part.float(), expected, rtol=0, atol=8 * UNIT[dtype])
            torch.testing.assert_close(other, expected)


@pytest.mark.usefixtures("packed")
def test_training_does_not_reach_a_frozen_copy() -> None:
    block = FeedForward(8, 2.0, 0.0).eval()
    x = torch.randn(5, 8)
    with torch.inference_mode():
        copy = frozen(block, torch.float32)
        before = copy(x)
        torch.testing.assert_close(before, block(x), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(2)
    with torch.inference_mode():
        assert torch.equal(copy(x), before)
        assert not torch.allclose(block(x), before)
    assert not any(parameter.requires_grad for parameter in copy.parameters())


@pytest.mark.usefixtures("packed")
@pytest.mark.parametrize(("seeds", "kind"), [(seeds, kind) for seeds in (0, 5) for kind in TargetAttentionKind])
@pytest.mark.parametrize("precision", [Precision.float32, Precision.bfloat16])
def test_a_model_with_a_frozen_stage_computes_the_same(
    make: SimpleNamespace, seeds: int, kind: TargetAttentionKind, precision: Precision
) -> None:
    """Summaries, contexts, users and candidates, with histories shorter than the tail and one without events."""
    model = make.model(num_seeds=seeds, target_attention=kind).eval()
    histories = make.histories([3, 0, 40, 7], 2)
    tail = pad_tail(model, histories.item, histories.timestamp, histories.action.astype(np.int64), histories.offsets)
    candidates = torch.from_numpy(np.random.default_rng(1).integers(1, make.num_items, (4, 6)))
    small = precision is Precision.float32

    def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
        atol = (1e-5 if small else 3e-2) * float(expected.abs().max())
        torch.testing.assert_close(actual.float(), expected, rtol=0, atol=atol)

    summary = inference.summarize(model, histories)
    if summary.shape[1]:
        close(inference.summarize(model.with_frozen("summarizer", precision), histories), summary)
    else:
        assert model.with_frozen("summarizer", precision).summarizer is None
    other = model.with_frozen("target_attention", precision)
    assert other.summarizer is model.summarizer and other.task_head is model.task_head
    assert not isinstance(model.target_attention.request_projection, FrozenLinear)
    asked = [(one, inference.request_context(one, summary, tail)) for one in (model, other)]
    gap = inference.request_gap(model, tail.last_time + 3_600_000, tail)
    (expected, actual) = (inference.user_vectors(one, context, gap) for one, context in asked)
    close(actual, expected)
    (expected, actual) = (inference.candidate_logits(one, context, gap, candidates) for one, context in asked)
    close(actual, expected)


@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_a_packed_row_does_not_depend_on_the_others(dtype: torch.dtype, force_processor: Callable[[str], None]) -> None:
    force_processor("")  # a forced profile does not promise this of other hardware
    if dtype not in processor().packed_dtypes:
        pytest.skip("not packed on this processor")
    one, x = FrozenLinear(linear(64, 96), dtype), torch.randn(100, 64)
    assert one.packs
    with torch.inference_mode():
        every = one(x)
        for count in (1, 2, 3, 7, 50, 99):
            assert torch.equal(one(x[:count]), every[:count])
            assert torch.equal(one(x[-count:].contiguous()), every[-count:])


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("dtype", UNIT, ids=str)
def test_weights_are_packed_where_that_is_faster(
    dtype: torch.dtype, profile: str, force_processor: Callable[[str], None]
) -> None:
    force_processor(profile)
    assert FrozenLinear(linear(4, 4), dtype).packs is (dtype in processor().packed_dtypes)
    assert not FrozenLinear(linear(4, 4).to("meta"), dtype).packs
