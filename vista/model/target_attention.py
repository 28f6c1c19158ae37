"""Stage 2: candidates attend to a cached summary and a short tail (VISTA, target-aware attention).

Letters: B rows (requests, or windows in training), S seeds, L tail length, Q query tokens (requests and candidates),
H heads, D head dim, M model dim.

Summary tokens attend to one another; tail tokens causally to the tail, and to the summary; a query token to the context
(summary and tail) and to itself, never to another query. So the context's keys and values are computed once a request,
and a query's output does not depend on the others. Tail and queries see relative positions by a learned bias a head and
distance.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.model.layers import Dropout, FeedForward, GatedOutput, module_list, norm, split_heads
from vista_kernels import target_attention

MASKED = -1e9
"""Additive mask; finite, so that a row with nothing to see stays finite."""


@dataclass(frozen=True, slots=True)
class Context:
    """Keys and values of summary and tail, a layer each: [B, H, S+L, D]; tail_valid: bool [B, L]; tail: [B, L, M]."""

    keys: list[Tensor]
    values: list[Tensor]
    tail_valid: Tensor
    tail: Tensor
    """The events' embeddings, right-aligned."""

    def select(self, rows: Tensor) -> Context:
        """The context of some rows, in a new order; int64 [B'] rows."""
        keys = [k.index_select(0, rows) for k in self.keys]
        values = [v.index_select(0, rows) for v in self.values]
        return Context(keys, values, self.tail_valid.index_select(0, rows), self.tail.index_select(0, rows))

    def newest(self, seen: Tensor) -> Tensor:
        """[B, Q, M] embeddings of the newest of the first `seen` int64 [Q] columns of the tail; 0 without an event."""
        column = (seen - 1).clamp(min=0)
        known = self.tail_valid[:, column] & (seen > 0)
        return torch.where(known.unsqueeze(-1), self.tail[:, column], 0.0)


class TargetLayer(nn.Module):
    """Projections, relative bias, gated output and feed-forward of one layer, shared by all kinds of tokens."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.head_dim = config.dim // config.num_heads
        self.norm = norm(config.dim)
        self.query_gate = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.key_value = nn.Linear(config.dim, 2 * config.dim, bias=False)
        self.bias = nn.Parameter(torch.zeros(config.num_heads, config.tail_len + 1))
        """[H, L+1] by distance in events; distance 0 is the token itself."""
        self.output = GatedOutput(config.dim, config.num_heads, config.dropout)
        self.feed_forward = FeedForward(config.dim, config.feed_forward_ratio, config.dropout)

    def project_context(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, N, M] -> keys and values [B, H, N, D]."""
        key, value = self.key_value(self.norm(x)).chunk(2, -1)
        return self._heads(key), self._heads(value)

    def _heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads).transpose(1, 2)

    def attend_context(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """A context layer: tokens x [B, N, M] attend to key/value [B, H, K, D] under an additive mask [B, H, N, K]."""
        query, gate = self.query_gate(self.norm(x)).chunk(2, -1)
        scores = self._heads(query) @ key.transpose(-1, -2) * self.head_dim**-0.5
        scores = scores if mask is None else scores + mask
        heads = (torch.softmax(scores, -1).to(value.dtype) @ value).transpose(1, 2)
        mixed: Tensor = self.feed_forward(self.output(x, heads, gate.sigmoid()))
        return mixed

    def attend_query(
        self, x: Tensor, qgkv: Tensor, key: Tensor, value: Tensor, bias: Tensor, context_mask: Tensor
    ) -> Tensor:
        """A query layer.

        Args:
            x: [B, Q, M]; qgkv: [B, Q, 4M] its projections.
            key, value: [B, H, S+L, D] of the context.
            bias: additive, broadcastable to [B, H, Q, S+L].
            context_mask: bool [B, S+L]; False where there is no event.
        """
        query, gate, own_key, own_value = qgkv.chunk(4, -1)
        query, own_key, own_value = self._heads(query), self._heads(own_key), self._heads(own_value)
        heads = target_attention(
            query, key, value, own_key, own_value, bias=bias, own_bias=self.bias[:, 0], context_mask=context_mask
        )
        mixed: Tensor = self.feed_forward(self.output(x, heads.transpose(1, 2), gate.sigmoid()))
        return mixed

    def project_query(self, x: Tensor) -> Tensor:
        """x [..., M] -> query, gate, key and value [..., 4M] of query tokens."""
        h = self.norm(x)
        return torch.cat([self.query_gate(h), self.key_value(h)], -1)


class TargetAttention(nn.Module):
    """The layers of stage 2 over a context of summary and tail."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.tail_len = config.tail_len
        self.num_seeds = config.num_seeds
        self.layers = module_list([TargetLayer(config) for _ in range(config.num_target_layers)])
        self.summary_norm = norm(config.dim)
        self.summary_kind = nn.Parameter(torch.randn(config.num_seeds, config.dim) * 0.02)
        self.query_gap = nn.Linear(config.dim, 4 * config.dim, bias=False)
        """Gap of the request into layer 1's projections, apart from the item's, which can be computed beforehand."""
        self.dropout = Dropout(config.dropout)
        self.final_norm = norm(config.dim)
        seen = torch.arange(config.tail_len + 1)[:, None]
        distance = seen - torch.arange(config.tail_len)
        self.register_buffer("distance", distance, persistent=False)
        """int64 [L+1, L]: from a query that sees the first `seen` columns of the tail to column c; < 1 is not seen."""
        self.distance: Tensor

    def encode_summary(self, summary: Tensor) -> list[tuple[Tensor, Tensor]]:
        """summary [B, S, M] -> keys and values [B, H, S, D] of its tokens, a layer each."""
        x = self.dropout(self.summary_norm(summary) + self.summary_kind)
        projected = []
        for index, layer in enumerate(self.layers):
            key, value = layer.project_context(x)
            projected.append((key, value))
            if index + 1 < len(self.layers) and x.shape[1]:
                x = layer.attend_context(x, key, value, None)
        return projected

    def encode_context(self, summary: list[tuple[Tensor, Tensor]], tail: Tensor, tail_valid: Tensor) -> Context:
        """Keys and values of the whole context.

        Args:
            summary: from `encode_summary`.
            tail: [B, L, M] embeddings of the newest events, oldest first, right-aligned.
            tail_valid: bool [B, L]; False where the user has fewer events.
        """
        x = self.dropout(tail)
        keys, values = [], []
        # A tail token always sees itself, so a padded one stays finite.
        hidden = ~(tail_valid[:, None, :] | torch.eye(self.tail_len, dtype=torch.bool, device=tail.device))
        for index, (layer, (key, value)) in enumerate(zip(self.layers, summary, strict=True)):
            tail_key, tail_value = layer.project_context(x)
            key, value = torch.cat([key, tail_key], 2), torch.cat([value, tail_value], 2)
            keys.append(key)
            values.append(value)
            if index + 1 < len(self.layers):
                causal = self._position_bias(layer, self.distance[:-1], own=True)
                mask = causal.masked_fill(hidden[:, None], MASKED)
                x = layer.attend_context(x, key, value, F.pad(mask, (self.num_seeds, 0)))
        return Context(keys, values, tail_valid, tail)

    def _position_bias(self, layer: TargetLayer, distance: Tensor, *, own: bool) -> Tensor:
        """[H, rows, L] learned bias by distance, MASKED where a column is not seen (`own`: distance 0 is)."""
        bias = layer.bias[:, distance.clamp(min=0)]
        return bias.masked_fill(distance < (0 if own else 1), MASKED)

    def query_bias(self, layer: TargetLayer, seen: Tensor) -> Tensor:
        """Bias [H, Q, S+L] of queries that see the first `seen` int64 [Q] columns ([B, H, Q, S+L] of [B, Q])."""
        bias = self._position_bias(layer, self.distance, own=False)[:, seen]
        return F.pad(bias if seen.dim() == 1 else bias.transpose(0, 1), (self.num_seeds, 0))

    def query(self, x: Tensor, qgkv: Tensor, gap: Tensor | None, seen: Tensor, context: Context) -> Tensor:
        """Query tokens through all layers.

        Args:
            x: [B, Q, M] candidates' item vectors, or request tokens; qgkv: [B, Q, 4M] layer 1's projections of x
                (`layers[0].project_query`), which may be computed beforehand.
            gap: [B, Q, M] embeddings of the request's gap, or None.
            seen: int64 [Q] or [B, Q]: how many columns of the tail a query sees (all: L); [1] if all see alike.
            context: of the same B rows.

        Returns:
            [B, Q, M], normed.
        """
        if gap is not None:
            x, qgkv = x + gap, qgkv + self.query_gap(gap)
        x = self.dropout(x)
        context_mask = F.pad(context.tail_valid, (self.num_seeds, 0), value=True)
        for index, layer in enumerate(self.layers):
            bias = self.query_bias(layer, seen)
            projections = qgkv if index == 0 else layer.project_query(x)
            x = layer.attend_query(x, projections, context.keys[index], context.values[index], bias, context_mask)
        normed: Tensor = self.final_norm(x)
        return normed
