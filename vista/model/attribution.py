"""What a score consists of: a share of each summary token, each tail event and the query token itself.

If attention weights, gates (in pointwise layers the query token's own value is gated too) and the spreads of norms are
held fixed, stage 2 is a linear function of its inputs: the query token's vector, and the values of the context in each
layer. A linear function is the sum of its gradients times its arguments
(Euler), and these products are the shares. Only the head's bias has no share. Shares say what the score consists of,
not what it would be without a token, because attention weights and gates would change too. A token in a later layer's
context includes what it read from others.

Letters: C queries of one request, S seeds, L tail length, H heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.model.layers import split_heads
from vista.model.target_attention import MASKED, PointwiseLayer, SoftmaxLayer, TargetAttention, TargetContext


@dataclass(frozen=True, slots=True)
class Attribution:
    """Shares of the C scores of one request, float32."""

    summary: Tensor
    """[C, S]."""
    tail: Tensor
    """[C, L]; 0 in the padding."""
    query: list[Tensor]
    """[C] for each part of the query token's vector; the first one includes the vector of the request and
    the features of the user."""
    counters: Tensor
    """[C] what the user's counters of the candidates add; 0 without them."""


def attribute(
    stage: TargetAttention,
    parts: Sequence[Tensor],
    request: Tensor | None,
    context: TargetContext,
    head: Callable[[Tensor], Tensor],
    counters: tuple[Tensor, Tensor] | None = None,
) -> Attribution:
    """Attribution of the scores of query tokens that see the whole tail.

    Args:
        parts: [C, M] each; their sum is the query tokens' vectors.
        request: [1, M] vector of the request, or [C, M] if its features differ between candidates; or None.
        context: of one request.
        head: a linear function with a bias, [C, M] -> [C] scores.
        counters: what counters add to the vectors, [C, M], and to their projections in layer 1, [C, 4M]; or None.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = torch.stack([part.clone() for part in parts]).sum(0).requires_grad_()
        added = []
        if request is not None:
            added = [(request.expand_as(x), stage.request_projection(request).expand(len(x), -1))]
        if context.user is not None:
            user = context.user.expand(len(x), -1)
            added.append((user[:, : x.shape[1]], user[:, x.shape[1] :]))
        added += [] if counters is None else [counters]
        # In layer 1 requests, users, and counters do not pass the norm of the vector (`TargetAttention.query`).
        vectors = [vector.clone().requires_grad_() for vector, _ in added]
        first_values = [projected[:, -x.shape[1] :].clone().requires_grad_() for _, projected in added]
        sources = [x, *vectors, *first_values]
        hidden = sum(vectors, x) * stage.scale
        mixed, weights, values = [], [], []
        for index, layer in enumerate(stage.layers):
            projected = layer.project(x if index == 0 else hidden)
            if index == 0:
                projected = sum((part for _, part in added), projected)
            normed = _frozen(layer.norm, x if index == 0 else hidden)
            value = F.linear(normed, layer.projections.weight[-x.shape[1] :])
            value = sum(first_values, value) if index == 0 else value
            weight = _attention(stage, layer, projected.detach(), context, index)
            seen = context.values[index][0].clone()
            value = value * value.detach().sigmoid() if isinstance(layer, PointwiseLayer) else value
            own = split_heads(value, layer.num_heads).transpose(0, 1)
            from_context = (weight[..., :-1] @ seen).requires_grad_()
            heads = (from_context + weight[..., -1:] * own).transpose(0, 1)
            hidden = _mixed(layer, hidden, heads, projected.detach().chunk(4, -1)[1])
            hidden = hidden + stage.steering[index] if stage.steering else hidden  # the same for all queries
            mixed.append(from_context)
            weights.append(weight[..., :-1])
            values.append(seen)
        score = head(_frozen(stage.final_norm, hidden))
        gradients = torch.autograd.grad(score.sum(), [*sources, *mixed])
    of_parts = [(gradients[0] * part).sum(-1) for part in parts]
    of_added = [
        (gradient * source.detach()).sum(-1)
        for gradient, source in zip(gradients[1 : len(sources)], sources[1:], strict=True)
    ]
    of_added = [of_added[index] + of_added[index + len(added)] for index in range(len(added))]
    of_counters = torch.zeros_like(of_parts[0]) if counters is None else of_added.pop()
    of_parts[0] = sum(of_added, of_parts[0])
    of_context = torch.stack(
        [
            (weight * (gradient @ value.transpose(-1, -2))).sum(0)
            for weight, gradient, value in zip(weights, gradients[len(sources) :], values, strict=True)
        ]
    ).sum(0)
    return Attribution(of_context[:, : stage.num_seeds], of_context[:, stage.num_seeds :], of_parts, of_counters)


def _frozen(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """The norm with its spread held fixed: linear in x, with the same value."""
    centered = x - x.mean(-1, keepdim=True)
    spread = (centered.detach().square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return centered / spread * norm.weight


def _mixed(layer: SoftmaxLayer | PointwiseLayer, hidden: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
    """The rest of a layer, linear in the residual stream [C, M] and the heads [C, H, D]; gate: its projection."""
    if isinstance(layer, PointwiseLayer):
        linear: Tensor = hidden + layer.out(_frozen(layer.head_norm, heads.flatten(-2)) * F.silu(gate))
        return linear
    hidden = hidden + layer.output.out(_frozen(layer.output.head_norm, heads).flatten(-2) * gate.sigmoid())
    block = layer.feed_forward
    inner, value = block.up(_frozen(block.norm, hidden)).chunk(2, -1)
    linear = hidden + block.down(F.silu(inner).detach() * value)
    return linear


def _attention(
    stage: TargetAttention, layer: SoftmaxLayer | PointwiseLayer, projected: Tensor, context: TargetContext, index: int
) -> Tensor:
    """Weights [H, C, S+L+1] of query tokens with projections [C, 4M]; the last is of the token itself."""
    is_pointwise = isinstance(layer, PointwiseLayer)
    own = F.silu(projected) if is_pointwise else projected
    query, _, own_key, _ = (split_heads(part, layer.num_heads).transpose(0, 1) for part in own.chunk(4, -1))
    scale = 1.0 if is_pointwise else layer.head_dim**-0.5
    bias = stage.query_bias(layer, torch.full((1,), stage.tail_len, device=projected.device))
    scores = query @ context.keys[index][0].clone().transpose(-1, -2) * scale + bias
    scores = scores.masked_fill(~F.pad(context.tail_valid[0], (stage.num_seeds, 0), value=True), MASKED)
    own_score = (query * own_key).sum(-1) * scale + layer.bias[:, :1]
    scores = torch.cat([scores, own_score.unsqueeze(-1)], -1).detach()
    return F.silu(scores) if is_pointwise else torch.softmax(scores, -1)
