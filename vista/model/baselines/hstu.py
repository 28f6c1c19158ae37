"""HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): point-wise SiLU attention with relative position and time bias.

Letters: n histories, L events, C candidates, H heads, D head dim, M model dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture
from vista.log.histories import NUM_GAPS
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import time_bucket
from vista.model.baselines.sequence_model import SequenceModel
from vista.model.layers import Dropout, module_list, norm, split_heads
from vista.model.schema import Schema
from vista.model.target_layers import MASKED

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values [n, H, L, D] of each layer."""


class HSTU(SequenceModel):
    """Layers of U * norm(SiLU(Q K^T + bias) V / N): no softmax, no feed-forward network."""

    architecture = Architecture.hstu
    queries_at_once: int = 256
    """Events of a history that attend at once, so that a long history needs no matrix of all pairs for every head."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.layers = module_list(
            [HSTULayer(config, has_time=self.encoder.gap is not None) for _ in range(config.num_layers)]
        )
        self.task_head = nn.Linear(config.dim, len(schema.tasks)) if schema.tasks else None

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Memory, Tensor]]:
        length = x.shape[1]
        step = torch.arange(length, device=x.device)
        size = self.queries_at_once
        blocks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        buckets: list[Tensor | None] = [None] * len(blocks)
        if self.encoder.gap is not None:
            # One byte each: nothing else grows with the square of a history's length.
            gaps = (time[:, rows, None] - time[:, None, : rows.stop] for rows in blocks)
            buckets = [time_bucket(gap).to(torch.uint8) for gap in gaps]
        memory: Memory = []
        for layer in self.layers:
            query, key, value, gate = layer.project(x)
            memory.append((key, value))
            heads = []
            for rows, bucket in zip(blocks, buckets, strict=True):
                seen = slice(0, rows.stop)
                distance = step[rows, None] - step[seen]
                bias = layer.bias(distance.clamp(min=0), bucket)
                heads.append(layer.attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], bias, distance < 0))
            x = layer.output(x, torch.cat(heads, 2), gate)
        return x, (memory, time)

    def impression_logits(
        self, states: Tensor, memory: tuple[Memory, Tensor] | None, candidates: Tensor, seen: Tensor
    ) -> Tensor:
        """A candidate passes through the layers like an event after those that it sees, and also sees itself."""
        assert self.task_head is not None
        length = states.shape[1] - 1
        x = candidates * self.config.dim**0.5
        layers, time = ([None] * len(self.layers), None) if memory is None else memory
        step = torch.arange(length, device=x.device)
        distance = seen[:, :, None] - step
        hidden = distance < 1
        bucket = None
        if time is not None and self.encoder.gap is not None:
            # The candidate carries the gap to the request. Events are dated from the newest that it sees.
            newest_time = time.gather(1, (seen - 1).clamp(min=0))
            bucket = time_bucket(newest_time[:, :, None] - time[:, None])
        for layer, held in zip(self.layers, layers, strict=True):
            query, key, value, gate = layer.project(x)
            own_bias = layer.bias(seen.new_zeros(1, 1), seen.new_ones(1, 1, 1))
            own = F.silu((query * key).sum(-1, keepdim=True) + own_bias) * value / layer.limit
            if held is not None:
                own = own + layer.attend(query, *held, layer.bias(distance.clamp(min=0), bucket), hidden)
            x = layer.output(x, own, gate)
        logits: Tensor = self.task_head(x)
        return logits


class HSTULayer(nn.Module):
    """Projections, biases and output of one layer."""

    def __init__(self, config: ModelConfig, *, has_time: bool) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.num_heads, self.limit = heads, config.history_limit
        self.norm, self.head_norm = norm(dim), norm(dim)
        self.projection = nn.Linear(dim, 4 * dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(heads, config.history_limit + 1))
        """[H, N+1] by distance in events."""
        self.time_bias = nn.Parameter(torch.zeros(heads, NUM_GAPS)) if has_time else None
        """[H, NUM_GAPS] by log bucket of the time between two events."""
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [n, L, M] -> query, key, value [n, H, L, D] and gate [n, L, M]."""
        gate, *heads = F.silu(self.projection(self.norm(x))).chunk(4, -1)
        value, query, key = (split_heads(each, self.num_heads).transpose(1, 2) for each in heads)
        return query, key, value, gate

    def bias(self, distance: Tensor, bucket: Tensor | None) -> Tensor:
        """Bias [n, H, Q, L] of distance int64 [n, Q, L] and bucket uint8 or int64 [n, Q, L]; n may be missing."""
        bias = _look_up(self.position_bias, distance)
        if self.time_bias is not None and bucket is not None:
            bias = bias + _look_up(self.time_bias, bucket.long())
        return bias

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        """[n, H, Q, D] of Q queries over L events; hidden bool [Q, L] or [n, Q, L]."""
        mask = torch.where(hidden, MASKED, 0.0).to(bias.dtype)  # added, because masked_fill is slow on CPUs
        bias = bias + (mask if hidden.dim() == 2 else mask[:, None])
        return F.silu(query @ key.transpose(2, 3) + bias) @ value / self.limit

    def output(self, x: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
        """Gate, projection and residual: x [n, L, M], heads [n, H, L, D], gate [n, L, M]."""
        update: Tensor = self.out(self.dropout(self.head_norm(heads.transpose(1, 2).flatten(2)) * gate))
        return x + update


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """[..., H, Q, L] entries of a table [H, N] at int64 [..., Q, L]."""
    *batch, num_queries, length = index.shape
    heads = len(table)
    flat = index.reshape(*batch, 1, -1).expand(*batch, heads, -1)
    return table.expand(*batch, -1, -1).gather(-1, flat).view(*batch, heads, num_queries, length)
