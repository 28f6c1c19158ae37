"""Layers against their formulas: embeddings of events, SiLU, pointwise attention, frozen maps."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.checks import Precision, TargetAttentionKind
from vista.log.histories import NUM_GAPS, gap_bucket, history_gaps
from vista.model import inference
from vista.model.features import Schema
from vista.model.layers import (
    SHARE,
    VECTOR,
    CausalConvolution,
    Dropout,
    FeedForward,
    FrozenLinear,
    frozen,
    linear_parts,
    silu,
)
from vista.model.ranking_model import EventEncoder
from vista.model.serving_model import pad_tail
from vista.model.summarizer import Stage1Config
from vista.model.target_attention import MASKED, PointwiseLayer, target_layer
from vista_kernels.processor import PROFILES, Processor, processor


def test_gap_buckets_by_hand() -> None:
    ms = [-5, 0, 999, 1000, 2999, 3000, 6999, 7000, 3_600_000, 86_400_000, 2**62]
    # 1 + floor(log2(1 + seconds))
    assert gap_bucket(np.array(ms)).tolist() == [1, 1, 1, 2, 2, 3, 3, 4, 12, 17, NUM_GAPS - 1]


def test_history_gaps_start_over_with_every_user() -> None:
    times = np.array([0, 1000, 4000, 10**9, 10**9 + 7000, 5])
    gaps = history_gaps(times, np.array([0, 3, 3, 5, 6, 6]))
    assert gaps.tolist() == [0, 2, 3, 0, 4, 0]
    assert history_gaps(np.zeros(0, np.int64), np.array([0, 0])).tolist() == []


def encoder(num_actions: int = 3, has_time: bool = True, **options: Any) -> EventEncoder:
    torch.manual_seed(0)
    schema = Schema(list("abc")[:num_actions], has_time, options.get("rating_range", (1.0, 5.0)), [])
    return EventEncoder(Stage1Config.of(ModelConfig(dim=4), schema))


def test_an_event_is_the_sum_of_its_fields() -> None:
    made = encoder()
    items, action, gap = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]), torch.tensor([0, 1, 5, 39, 2])
    rating = torch.tensor([1.0, 3.0, 5.0, float("nan"), 4.0])
    assert made.action is not None and made.gap is not None and made.rating is not None
    scaled = torch.tensor([-1.0, 0.0, 1.0, 0.0, 0.5])  # the range becomes [-1, 1]; an unrated event is neutral
    expected = items + made.action.weight[action] + made.gap.weight[gap] + scaled[:, None] * made.rating
    torch.testing.assert_close(made(items, action, gap, rating), expected)
    torch.testing.assert_close(made(items, action, gap), items + made.action.weight[action] + made.gap.weight[gap])


def test_fields_that_a_log_lacks_are_absent() -> None:
    items = torch.randn(2, 4)
    zeros = torch.zeros(2, dtype=torch.int64)
    bare = encoder(num_actions=1, has_time=False, rating_range=None)
    assert not list(bare.parameters()) and bare.gap_vectors(zeros) is None
    assert torch.equal(bare(items, zeros, zeros, torch.ones(2)), items)
    same = encoder(rating_range=(3.0, 3.0))
    other = torch.tensor([3.0, 4.0])  # ratings after a training that had only one value
    assert torch.equal(same(items, zeros, zeros, other), same(items, zeros, zeros)), (
        "a model trained on one rating value ignores ratings"
    )


def test_the_convolution_looks_back_within_its_history() -> None:
    torch.manual_seed(0)
    made = CausalConvolution(3, 3)
    x = torch.randn(7, 3)
    position = torch.tensor([0, 1, 2, 3, 0, 0, 1])
    w = made.weight
    y = made(x, position)
    torch.testing.assert_close(y[3], x[3] + w[0] * x[3] + w[1] * x[2] + w[2] * x[1])
    torch.testing.assert_close(y[1], x[1] + w[0] * x[1] + w[1] * x[0])
    for first in (0, 4, 5):
        torch.testing.assert_close(y[first], x[first] + w[0] * x[first])
    torch.testing.assert_close(y[6], x[6] + w[0] * x[6] + w[1] * x[5])
    assert made(x[:0], position[:0]).shape == (0, 3)
    torch.testing.assert_close(made(x[:1], position[:1]), y[:1])


@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(p: float) -> None:
    torch.manual_seed(0)
    made = Dropout(p).train()
    x = torch.ones(1000, 130, requires_grad=True)
    out = made(x)
    rounded = min(max(round(p * 256), 1), 255) / 256
    kept = out != 0
    assert abs(float((~kept).float().mean()) - rounded) < 5 * (rounded * (1 - rounded) / 130_000) ** 0.5
    assert out[kept].unique().tolist() == pytest.approx([1 / (1 - rounded)])
    # Everywhere: in all rows and columns.
    spread = 6 * (rounded * (1 - rounded) / 1000) ** 0.5 + 1e-3
    assert ((~kept).float().mean(0) - rounded).abs().max() < spread
    out.sum().backward()
    assert torch.equal(x.grad, out.detach())
    assert not torch.equal(made(x), out), "each call draws a new mask"


def test_dropout_follows_the_generator_and_is_off_in_inference() -> None:
    x = torch.randn(3, 5, 7)
    made = Dropout(0.3)
    torch.manual_seed(1)
    one = made(x)
    torch.manual_seed(1)
    assert torch.equal(made(x), one)
    assert made.eval()(x) is x and Dropout(0.0).train()(x) is x
    assert made.train()(x[:0]).shape == (0, 5, 7)
    assert made(x.bfloat16()).dtype == torch.bfloat16


@pytest.fixture(params=[1, 3, 5], ids="{} threads".format)
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.processor
@pytest.mark.usefixtures("num_threads")
@pytest.mark.parametrize(
    "count", [0, 1, VECTOR - 1, VECTOR, VECTOR + 1, SHARE - 1, SHARE, SHARE + 1, 7 * SHARE + 9, 8 * SHARE]
)
@torch.inference_mode()
def test_silu_gives_a_value_the_same_bits_wherever_it_lies(count: int) -> None:
    values = torch.linspace(-20, 20, 4 * VECTOR)
    alone = torch.stack([silu(value) for value in values])
    torch.testing.assert_close(alone, F.silu(values.double()).float(), rtol=3e-7, atol=0)
    for shift in (0, 1, 5):
        index = (torch.arange(count) + shift) % len(values)
        assert torch.equal(silu(values[index]), alone[index])
    index = torch.arange(count) % len(values)
    strided = values[index].repeat_interleave(3).view(-1, 3)[:, 1:]
    assert torch.equal(silu(strided), alone[index][:, None].expand(-1, 2))


@torch.inference_mode()
def test_silu_of_extreme_values() -> None:
    x = torch.tensor([-1e9, -200.0, 0.0, 200.0, 1e9, float("inf"), float("nan")])
    torch.testing.assert_close(
        silu(x), torch.tensor([0.0, 0.0, 0.0, 200.0, 1e9, float("inf"), float("nan")]), equal_nan=True
    )


def test_silu_has_a_gradient() -> None:
    x = torch.linspace(-4, 4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu, x)


NUM_HEADS, WIDTH, TAIL = 2, 4, 3


@pytest.fixture
def layer() -> PointwiseLayer:
    torch.manual_seed(1)
    config = ModelConfig(
        dim=NUM_HEADS * WIDTH,
        num_heads=NUM_HEADS,
        num_seeds=2,
        tail_len=TAIL,
        target_attention=TargetAttentionKind.pointwise,
    )
    made = target_layer(config)
    assert isinstance(made, PointwiseLayer)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.double().eval()


def exact_silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def expected(layer: PointwiseLayer, x: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The output of one token x [M] that attends to tokens [M] with biases [H]; x may be among them."""
    query, gate = (exact_silu(part) for part in layer.project(x).chunk(4)[:2])
    heads = torch.zeros(NUM_HEADS, WIDTH, dtype=torch.float64)
    for token, bias in seen:
        key, value = (exact_silu(part) for part in layer.project(token).chunk(4)[2:])
        for head in range(NUM_HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            heads[head] += exact_silu(query[part] @ key[part] + bias[head]) * value[part]
    flat = heads.flatten()
    normed = (flat - flat.mean()) / (flat.var(unbiased=False) + layer.head_norm.eps).sqrt() * layer.head_norm.weight
    out: Tensor = x + layer.out.weight @ (normed * gate)
    return out


@torch.no_grad()
def test_context_tokens(layer: PointwiseLayer) -> None:
    """Without a mask all tokens see all. With one, the last token sees two of them, and the others see none."""
    x, bias = torch.randn(1, 3, NUM_HEADS * WIDTH).double(), torch.randn(NUM_HEADS).double()
    query, gate, key, value = layer.parts(x)
    key, value = layer.heads(key), layer.heads(value)
    mask = torch.full((1, NUM_HEADS, 3, 3), MASKED).double()
    mask[0, :, 2, :2] = bias[:, None]
    zero = torch.zeros(NUM_HEADS).double()
    outputs = layer.attend_context(x, query, gate, key, value, None)
    for row in range(3):
        torch.testing.assert_close(outputs[0, row], expected(layer, x[0, row], [(token, zero) for token in x[0]]))
    masked = layer.attend_context(x, query, gate, key, value, mask)[0]
    torch.testing.assert_close(masked[2], expected(layer, x[0, 2], [(token, bias) for token in x[0, :2]]))
    torch.testing.assert_close(masked[:2], x[0, :2])  # tokens that see nothing stay unchanged


@torch.no_grad()
def test_query_tokens(layer: PointwiseLayer) -> None:
    """A query sees the unmasked context and itself, but not the other queries."""
    context, x = torch.randn(1, 5, NUM_HEADS * WIDTH).double(), torch.randn(1, 2, NUM_HEADS * WIDTH).double()
    key, value = layer.keys_values(context)
    bias = torch.randn(1, NUM_HEADS, 1, 5).double()
    seen = torch.tensor([[True, True, False, True, True]])
    outputs = layer.attend_query(x, layer.parts(x), key, value, bias, seen)
    for row in range(2):
        tokens = [(context[0, place], bias[0, :, 0, place]) for place in (0, 1, 3, 4)]
        torch.testing.assert_close(
            outputs[0, row], expected(layer, x[0, row], [*tokens, (x[0, row], layer.bias[:, 0])])
        )


def test_masked_scores_have_no_gradient_and_no_nan(layer: PointwiseLayer) -> None:
    context = torch.randn(1, 5, NUM_HEADS * WIDTH).double().requires_grad_()
    x = torch.randn(1, 2, NUM_HEADS * WIDTH).double().requires_grad_()
    key, value = layer.keys_values(context)
    seen = torch.tensor([[True, False, False, True, True]])
    layer.attend_query(x, layer.parts(x), key, value, torch.zeros(1, NUM_HEADS, 1, 5).double(), seen).sum().backward()
    assert context.grad is not None and x.grad is not None and torch.isfinite(x.grad).all()
    assert not context.grad[0, 1:3].any() and context.grad[0, [0, 3, 4]].all()


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
    monkeypatch.setattr("vista.model.layers.processor", lambda: forced)


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
    block = FeedForward(8, 0.0).eval()
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
@pytest.mark.parametrize(("seeds", "kind"), [(0, TargetAttentionKind.softmax), (5, TargetAttentionKind.pointwise)])
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
