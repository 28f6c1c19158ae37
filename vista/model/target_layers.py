"""Layers of stage 2.

Letters: B rows, N tokens, Q query tokens, S seeds, L tail length, H heads, D head dim, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.choices import TargetAttentionKind
from vista.model.layers import Dropout, FeedForward, GatedOutput, linear_parts, norm, silu, split_heads
from vista_kernels import candidate_attention

MASKED = -1e9
"""Additive mask; finite, so that a row that sees nothing stays finite."""


class TargetLayer(nn.Module):
    """Projections and relative bias, shared by all tokens. A kind of layer adds the attention and what follows it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.norm = norm(config.dim)
        self.projections = nn.Linear(config.dim, 4 * config.dim, bias=False)
        """To query, gate, key and value, in this order."""
        self.bias = nn.Parameter(torch.zeros(config.num_heads, config.tail_len + 1))
        """[H, L+1] by distance in events; distance 0 is the token itself."""

    def activated(self, projections: Tensor) -> Tensor:
        """Projections as attention reads them."""
        return projections

    def attend_context(
        self, x: Tensor, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        """A context layer: tokens x, query, gate [B, N, M] attend to key and value [B, H, K, D] under an additive mask
        [B, H, N, K]."""
        raise NotImplementedError

    def attend_query(
        self, x: Tensor, own: Sequence[Tensor], key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        """A query layer.

        Args:
            x: [B, Q, M].
            own: its query, gate, key and value, [B, Q, M] each.
            key, value: [B, H, S+L, D] of the context.
            bias: additive, broadcastable to [B, H, Q, S+L].
            context_mask: bool [B, S+L]; False where there is no event.
        """
        raise NotImplementedError

    def project(self, x: Tensor) -> Tensor:
        """x [..., M] -> query, gate, key and value, concatenated, [..., 4M], before `activated`."""
        projected: Tensor = self.projections(self.norm(x))
        return projected

    def parts(self, x: Tensor, first: int = 0) -> Sequence[Tensor]:
        """x [..., M] -> query, gate, key and value from number `first` on, activated, [..., M] each."""
        return linear_parts(self.norm(x), self.projections, 4, first, self.activated)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, M] -> keys and values [B, H, N, D], which is all that a context needs of the last layer."""
        key, value = self.parts(x, first=2)
        return self.heads(key), self.heads(value)

    def attend_request(
        self, x: Tensor, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        """`attend_context` for inference."""
        return self.attend_context(x, query, gate, key, value, mask)

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, M] -> [B, H, N, D], a view."""
        return split_heads(x, self.num_heads).transpose(1, 2)


class SoftmaxLayer(TargetLayer):
    """Softmax attention, gated output and feed-forward network (VISTA, target-aware attention)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.output = GatedOutput(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.feed_forward_ratio, config.dropout)

    def mix(self, x: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
        """The rest of a layer: residual stream x [B, N, M], attention's outputs [B, H, N, D], gate [B, N, M]."""
        mixed: Tensor = self.feed_forward(self.output(x, heads.transpose(1, 2), gate.sigmoid()))
        return mixed

    def attend_context(
        self, x: Tensor, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        scores, scale = self.heads(query) @ key.transpose(-1, -2), self.head_dim**-0.5
        scores = scores * scale if mask is None else torch.add(mask, scores, alpha=scale)
        return self.mix(x, torch.softmax(scores, -1).to(value.dtype) @ value, gate)

    def attend_request(
        self, x: Tensor, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, mask: Tensor
    ) -> Tensor:
        # On a CPU fused attention takes twice as long in bfloat16.
        if query.dtype is torch.bfloat16 and query.device.type == "cpu":
            return self.attend_context(x, query, gate, key, value, mask)
        mask, scale = mask.to(query.dtype), self.head_dim**-0.5
        return self.mix(x, F.scaled_dot_product_attention(self.heads(query), key, value, mask, scale=scale), gate)

    def attend_query(
        self, x: Tensor, own: Sequence[Tensor], key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        query, gate, own_key, own_value = own
        query, own_key, own_value = self.heads(query), self.heads(own_key), self.heads(own_value)
        heads = candidate_attention(
            query, key, value, own_key, own_value, bias=bias, own_bias=self.bias[:, 0], context_mask=context_mask
        )
        return self.mix(x, heads, gate)


class PointwiseLayer(TargetLayer):
    """U * norm(SiLU(Q K^T + bias) V), where U, Q, K and V pass SiLU too (HSTU, Zhai et al., ICML 2024)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.head_norm = norm(config.dim)
        self.out = nn.Linear(config.dim, config.dim, bias=False)
        self.dropout = Dropout(config.dropout)

    def activated(self, projections: Tensor) -> Tensor:
        return silu(projections)

    def mix(self, x: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
        """The rest of a layer: residual stream x [B, N, M], sums over tokens [B, H, N, D], gate [B, N, M]."""
        heads = heads.transpose(1, 2).flatten(2)  # no division by their number, because of the norm
        # On a GPU torch normalizes bfloat16 only with bfloat16 weights; autocast widens the norm there too.
        heads = heads if x.device.type == "cpu" else heads.to(x.dtype)
        update: Tensor = self.out(self.dropout(self.head_norm(heads) * gate))
        return x + update

    def attend_context(
        self, x: Tensor, query: Tensor, gate: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        scores = self.heads(query) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores + mask.to(scores.dtype)
        return self.mix(x, silu(scores) @ value, gate)

    def attend_query(
        self, x: Tensor, own: Sequence[Tensor], key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        query, gate, own_key, own_value = own
        query, own_key, own_value = self.heads(query), self.heads(own_key), self.heads(own_value)
        seen = bias.to(query.dtype) + torch.where(context_mask, 0.0, MASKED).to(query.dtype)[:, None, None]
        own_score = (query * own_key).sum(-1, keepdim=True) + self.bias[:, :1, None].to(query.dtype)
        heads = silu(query @ key.transpose(-1, -2) + seen) @ value + silu(own_score) * own_value
        return self.mix(x, heads, gate)


def target_layer(config: ModelConfig) -> SoftmaxLayer | PointwiseLayer:
    """A layer of the configured kind."""
    return SoftmaxLayer(config) if config.target_attention is TargetAttentionKind.softmax else PointwiseLayer(config)
