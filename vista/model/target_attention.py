"""Stage 2: candidates attend to a cached summary and a short tail (VISTA, target-aware attention).

Letters: B rows (requests, or windows in training), S seeds, L tail length, Q query tokens (requests and candidates),
H heads, D head dim, M model dim.

Summary tokens attend to one another. Tail tokens attend to the summary, and causally to the tail. A query token attends
to the context (summary and tail) and to itself, never to another query. So the context's keys and values are computed
once per request, and a query's output does not depend on the others. Tail and queries see relative positions by a
learned bias per head and distance. Features of the user are added to every query token and to its projections in layer
1, which are precomputed for items; so a candidate reads them from the first layer on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.checks import TargetAttentionKind
from vista.model.layers import Dropout, FeedForward, GatedOutput, linear_parts, module_list, norm, silu, split_heads
from vista_kernels import candidate_attention

# Layers of stage 2.
#
# Letters: B rows, N tokens, Q query tokens, S seeds, L tail length, H heads, D head dim, M model dim.

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
        self.feed_forward = FeedForward(config.dim, config.dropout)

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


@dataclass(frozen=True, slots=True)
class TargetContext:
    """Keys and values of summary and tail, which all queries of a row attend to."""

    keys: list[Tensor]
    """[B, H, S+L, D] for each layer."""
    values: list[Tensor]
    """[B, H, S+L, D] for each layer."""
    tail_valid: Tensor
    """bool [B, L]: False in the padding."""
    tail: Tensor
    """[B, L, M] embeddings of the events, right-aligned."""
    user: Tensor | None = None
    """[B, 5M] what features of the user add to query tokens: to their vectors [M] and to the projections of these in
    layer 1 [4M]; None without them."""

    def select(self, rows: slice | Tensor) -> TargetContext:
        """The context of adjacent rows, a view; or of rows int64 [N], a copy."""
        return TargetContext(
            [k[rows] for k in self.keys],
            [v[rows] for v in self.values],
            self.tail_valid[rows],
            self.tail[rows],
            None if self.user is None else self.user[rows],
        )

    def newest(self, seen: Tensor) -> Tensor:
        """[B, Q, M] embeddings of the newest event in the first `seen` int64 [Q] or [B, Q] columns of the tail; 0
        without one."""
        column = (seen - 1).clamp(min=0)
        rows = slice(None) if seen.dim() == 1 else torch.arange(len(seen), device=seen.device)[:, None]
        known = self.tail_valid[rows, column] & (seen > 0)
        return torch.where(known.unsqueeze(-1), self.tail[rows, column], 0.0)


class TargetAttention(nn.Module):
    """The layers of stage 2 over a context of summary and tail."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tail_len = config.tail_len
        self.num_seeds = config.num_seeds
        self.layers = module_list([target_layer(config) for _ in range(config.num_target_layers)])
        self.scale = 1.0 if config.target_attention is TargetAttentionKind.softmax else config.dim**0.5
        """Factor of tail and query tokens, whose vectors start small; pointwise layers keep HSTU's inputs."""
        self.summary_norm = norm(config.dim)
        self.summary_kind = nn.Parameter(torch.zeros(config.num_seeds, config.dim))
        self.request_projection = nn.Linear(config.dim, 4 * config.dim, bias=False)
        """Projections of the request's vector in layer 1, apart from the item's, which are precomputed."""
        self.dropout = Dropout(config.dropout)
        self.final_norm = norm(config.dim)
        seen = torch.arange(config.tail_len + 1)[:, None]
        distance = seen - torch.arange(config.tail_len)
        self.register_buffer("distance", distance, persistent=False)
        """int64 [L+1, L] distance from a query that sees the first `seen` tail columns to column c; < 1 is unseen."""
        self.distance: Tensor
        self.steering: Sequence[Tensor] = ()
        """[M] that are added to query tokens after each layer (`VistaModel.with_adapter`); none without an adapter."""

    def encode_summary(self, summary: Tensor) -> list[tuple[Tensor, Tensor]]:
        """summary [B, S, M] -> keys and values [B, H, S, D] of its tokens, for each layer. Other rows of a record may
        follow, which are not read."""
        x = self.dropout(self.summary_norm(summary[:, : self.num_seeds]) + self.summary_kind)
        encoded = []
        for layer in self.layers[:-1]:
            query, gate, key, value = layer.parts(x)
            encoded.append((layer.heads(key), layer.heads(value)))
            if x.shape[1]:
                x = layer.attend_context(x, query, gate, *encoded[-1], None)
        return [*encoded, self.layers[-1].keys_values(x)]

    def encode_context(self, summary: list[tuple[Tensor, Tensor]], tail: Tensor, tail_valid: Tensor) -> TargetContext:
        """Keys and values of the whole context.

        Args:
            summary: from `encode_summary`.
            tail: [B, L, M] embeddings of the newest events, oldest first, right-aligned.
            tail_valid: bool [B, L]; False where the user has fewer events.
        """
        x = self.dropout(self._scaled(tail))
        keys, values = [], []
        for layer, (key, value) in zip(self.layers[:-1], summary, strict=False):
            query, gate, tail_key, tail_value = layer.parts(x)
            keys.append(torch.cat([key, layer.heads(tail_key)], 2))
            values.append(torch.cat([value, layer.heads(tail_value)], 2))
            x = layer.attend_context(x, query, gate, keys[-1], values[-1], self._tail_mask(layer, tail_valid))
        for of_all, own, of_tail in zip((keys, values), summary[-1], self.layers[-1].keys_values(x), strict=True):
            of_all.append(torch.cat([own, of_tail], 2))
        return TargetContext(keys, values, tail_valid, tail)

    def encode_request(
        self, summary: Tensor, tail: Tensor, tail_valid: Tensor, masks: list[Tensor] | None = None
    ) -> TargetContext:
        """`encode_summary` and `encode_context` in one pass, for inference, with half the operators.

        Args:
            summary: [B, S, M]. Other rows of a record may follow, which are not read.
            tail: [B, L, M].
            tail_valid: bool [B, L].
            masks: of `request_masks`; None computes them.
        """
        tokens = self.summary_norm(summary[:, : self.num_seeds]) + self.summary_kind
        x = torch.cat([tokens, self._scaled(tail)], 1)
        masks = self.request_masks() if masks is None else masks
        padding = F.pad(torch.where(tail_valid, 0.0, MASKED), (self.num_seeds, 0))[:, None, None]
        keys, values = [], []
        for layer, mask in zip(self.layers[:-1], masks, strict=True):
            query, gate, key, value = layer.parts(x)
            key, value = layer.heads(key), layer.heads(value)
            keys.append(key)
            values.append(value)
            # A padded event sees the summary, or without one nothing. Its output is finite and never read.
            x = layer.attend_request(x, query, gate, key, value, mask + padding)
        key, value = self.layers[-1].keys_values(x)
        return TargetContext([*keys, key], [*values, value], tail_valid, tail)

    def request_masks(self) -> list[Tensor]:
        """Additive masks [H, S+L, S+L] of `encode_request` for all layers except the last, equal for all requests."""
        everything = torch.ones(1, self.tail_len, dtype=torch.bool, device=self.distance.device)
        # The summary does not see the tail.
        summary = F.pad(self.summary_kind.new_full((self.num_seeds, self.tail_len), MASKED), (self.num_seeds, 0))
        return [
            torch.cat([summary.expand(layer.num_heads, -1, -1), self._tail_mask(layer, everything)[0]], 1)
            for layer in self.layers[:-1]
        ]

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale

    def _tail_mask(self, layer: TargetLayer, tail_valid: Tensor) -> Tensor:
        """Additive mask [B, H, L, S+L] of the tail's tokens: causal, without padding. Each token sees itself, so that
        padded ones stay finite."""
        known = tail_valid[:, None, :] | torch.eye(self.tail_len, dtype=torch.bool, device=tail_valid.device)
        causal = self._position_bias(layer, self.distance[:-1], own=True)
        # Added, because masked_fill is slow on CPUs.
        hidden = torch.where(known, 0.0, MASKED).to(causal.dtype)
        return F.pad(causal, (self.num_seeds, 0)) + F.pad(hidden, (self.num_seeds, 0))[:, None]

    def _position_bias(self, layer: TargetLayer, distance: Tensor, *, own: bool) -> Tensor:
        """[H, rows, L] learned bias by distance, MASKED where a column is not seen (`own`: distance 0 is seen)."""
        bias = layer.bias[:, distance.clamp(min=0)]
        return bias.masked_fill(distance < (0 if own else 1), MASKED)

    def query_bias(self, layer: TargetLayer, seen: Tensor) -> Tensor:
        """Bias [H, Q, S+L] of queries that see the first `seen` int64 [Q] columns; [B, H, Q, S+L] for seen [B, Q]."""
        bias = self._position_bias(layer, self.distance, own=False)[:, seen]
        return F.pad(bias if seen.dim() == 1 else bias.transpose(0, 1), (self.num_seeds, 0))

    def query_biases(self, seen: Tensor) -> list[Tensor]:
        """`query_bias` of every layer."""
        return [self.query_bias(layer, seen) for layer in self.layers]

    def with_request(self, x: Tensor, projections: Tensor, request: Tensor | None) -> tuple[Tensor, Tensor]:
        """x and projections with what the vectors of requests add to them; arguments as in `query`."""
        return (x, projections) if request is None else (x + request, projections + self.request_projection(request))

    def query(
        self,
        x: Tensor,
        projections: Tensor,
        request: Tensor | None,
        seen: Tensor,
        context: TargetContext,
        biases: list[Tensor] | None = None,
    ) -> Tensor:
        """Outputs of query tokens after all layers.

        Args:
            x: [B, Q, M] candidates' item vectors, or request tokens.
            projections: [B, Q, 4M] of x in layer 1 (`layers[0].project`), which may be precomputed.
            request: [B, Q, M] vectors of the requests (`RankingModel.request_vectors`), or None.
            seen: int64 [Q] or [B, Q] number of tail columns that a query sees (L for all); [1] if all see the same.
            context: of the same B rows.
            biases: `query_biases` of `seen`; None computes them.

        Returns:
            [B, Q, M], normalized.
        """
        x, projections = self.with_request(x, projections, request)
        if context.user is not None:
            user = context.user.unsqueeze(1)
            x, projections = x + user[..., : x.shape[-1]], projections + user[..., x.shape[-1] :].to(projections.dtype)
        x = self.dropout(self._scaled(x))
        context_mask = F.pad(context.tail_valid, (self.num_seeds, 0), value=True)
        biases = self.query_biases(seen) if biases is None else biases
        for index, layer in enumerate(self.layers):
            own = layer.activated(projections).chunk(4, -1) if index == 0 else layer.parts(x)
            x = layer.attend_query(x, own, context.keys[index], context.values[index], biases[index], context_mask)
            x = x + self.steering[index].to(x.dtype) if self.steering else x
        normed: Tensor = self.final_norm(x)
        return normed
