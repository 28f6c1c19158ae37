"""A pointwise layer of stage 2 against its formula, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vista.config import ModelConfig
from vista.config.choices import TargetAttentionKind
from vista.model.target_layers import MASKED, PointwiseLayer, target_layer

HEADS, WIDTH, TAIL = 2, 4, 3


@pytest.fixture
def layer() -> PointwiseLayer:
    torch.manual_seed(1)
    config = ModelConfig(
        dim=HEADS * WIDTH, num_heads=HEADS, num_seeds=2, tail_len=TAIL, target_attention=TargetAttentionKind.pointwise
    )
    made = target_layer(config)
    assert isinstance(made, PointwiseLayer)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return made.double().eval()


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def expected(layer: PointwiseLayer, x: Tensor, seen: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The output of one token x [M] that attends to tokens [M] with biases [H]; x may be among them."""
    query, gate = (silu(part) for part in layer.project(x).chunk(4)[:2])
    heads = torch.zeros(HEADS, WIDTH, dtype=torch.float64)
    for token, bias in seen:
        key, value = (silu(part) for part in layer.project(token).chunk(4)[2:])
        for head in range(HEADS):
            part = slice(head * WIDTH, (head + 1) * WIDTH)
            heads[head] += silu(query[part] @ key[part] + bias[head]) * value[part]
    flat = heads.flatten()
    normed = (flat - flat.mean()) / (flat.var(unbiased=False) + layer.head_norm.eps).sqrt() * layer.head_norm.weight
    out: Tensor = x + layer.out.weight @ (normed * gate)
    return out


@torch.no_grad()
def test_context_tokens(layer: PointwiseLayer) -> None:
    """Without a mask all tokens see all. With one, the last token sees two of them, and the others see none."""
    x, bias = torch.randn(1, 3, HEADS * WIDTH).double(), torch.randn(HEADS).double()
    query, gate, key, value = layer.parts(x)
    key, value = layer.heads(key), layer.heads(value)
    mask = torch.full((1, HEADS, 3, 3), MASKED).double()
    mask[0, :, 2, :2] = bias[:, None]
    zero = torch.zeros(HEADS).double()
    outputs = layer.attend_context(x, query, gate, key, value, None)
    for row in range(3):
        torch.testing.assert_close(outputs[0, row], expected(layer, x[0, row], [(token, zero) for token in x[0]]))
    masked = layer.attend_context(x, query, gate, key, value, mask)[0]
    torch.testing.assert_close(masked[2], expected(layer, x[0, 2], [(token, bias) for token in x[0, :2]]))
    torch.testing.assert_close(masked[:2], x[0, :2])  # tokens that see nothing stay unchanged


@torch.no_grad()
def test_query_tokens(layer: PointwiseLayer) -> None:
    """A query sees the unmasked context and itself, but not the other queries."""
    context, x = torch.randn(1, 5, HEADS * WIDTH).double(), torch.randn(1, 2, HEADS * WIDTH).double()
    key, value = layer.keys_values(context)
    bias = torch.randn(1, HEADS, 1, 5).double()
    seen = torch.tensor([[True, True, False, True, True]])
    outputs = layer.attend_query(x, layer.parts(x), key, value, bias, seen)
    for row in range(2):
        tokens = [(context[0, place], bias[0, :, 0, place]) for place in (0, 1, 3, 4)]
        torch.testing.assert_close(
            outputs[0, row], expected(layer, x[0, row], [*tokens, (x[0, row], layer.bias[:, 0])])
        )


def test_masked_scores_have_no_gradient_and_no_nan(layer: PointwiseLayer) -> None:
    context = torch.randn(1, 5, HEADS * WIDTH).double().requires_grad_()
    x = torch.randn(1, 2, HEADS * WIDTH).double().requires_grad_()
    key, value = layer.keys_values(context)
    seen = torch.tensor([[True, False, False, True, True]])
    layer.attend_query(x, layer.parts(x), key, value, torch.zeros(1, HEADS, 1, 5).double(), seen).sum().backward()
    assert context.grad is not None and x.grad is not None and torch.isfinite(x.grad).all()
    assert not context.grad[0, 1:3].any() and context.grad[0, [0, 3, 4]].all()
