"""FuXi-Linear (Ye et al., 2026, arXiv 2602.23671): linear attention in three channels: semantic, temporal, positional.

Letters: n histories, L events, H heads, D head dim, M model dim, N `history_limit`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.decayed_attention import decayed_attention
from vista.model.baselines.sequence_model import SequenceModel, state_head
from vista.model.layers import Dropout, module_list, norm, split_heads
from vista.model.schema import Schema

HOUR_MS, YEAR_MS = 3_600_000.0, 31_557_600_000.0
"""The shortest and the longest period of the temporal channel."""
POSITION_DIM = 32


class FuXiLinear(SequenceModel):
    """Layers of gated channels and a feed-forward network."""

    architecture = Architecture.fuxi_linear

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        has_time = self.encoder.gap is not None
        self.layers = module_list([FuXiLinearLayer(config, has_time=has_time) for _ in range(config.num_layers)])
        self.task_head = state_head(config, schema)

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, None]:
        for layer in self.layers:
            x = layer(x, time)
        return x, None


class FuXiLinearLayer(nn.Module):
    """Three channels side by side, each normed; a gate; and a feed-forward network."""

    def __init__(self, config: ModelConfig, *, has_time: bool) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.num_heads, self.num_channels = heads, 3 if has_time else 2
        self.norm, self.network_norm = norm(dim), norm(dim)
        self.channel_norms = module_list([norm(dim) for _ in range(self.num_channels)])
        self.projection = nn.Linear(dim, (3 + self.num_channels) * dim, bias=False)
        self.rate = nn.Parameter(torch.randn(heads) * 0.02)
        """[H]: events decay by exp(-Σ_{h' <= h} softplus(rate_h')) per later event in the semantic channel."""
        self.temporal = nn.Linear(dim, dim, bias=False) if has_time else None
        self.time_rate = nn.Parameter(torch.zeros(heads)) if has_time else None
        """[H]: events decay by sigmoid(time_rate) per radian of the head's period."""
        self.positional = nn.Linear(dim, dim, bias=False)
        self.position_query = nn.Parameter(torch.randn(config.history_limit, POSITION_DIM) * POSITION_DIM**-0.5)
        self.position_key = nn.Parameter(torch.randn(config.history_limit, POSITION_DIM) * POSITION_DIM**-0.5)
        self.out = nn.Linear(self.num_channels * dim, dim)
        hidden = int(dim * config.feed_forward_ratio)
        self.up, self.down = nn.Linear(dim, 2 * hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x [n, L, M], time int64 [n, L] ms -> [n, L, M]."""
        normed = self.norm(x)
        sizes = [x.shape[-1]] * 3 + [self.num_channels * x.shape[-1]]
        query, key, value, gate = torch.split(F.silu(self.projection(normed)), sizes, -1)
        channels = [self.semantic_channel(query, key, value)]
        if self.temporal is not None:
            channels.append(self.temporal_channel(self.temporal(normed), time))
        channels.append(self.positional_channel(self.positional(normed)))
        mixed = torch.cat([own(each) for own, each in zip(self.channel_norms, channels, strict=True)], -1)
        x = x + self.out(self.dropout(mixed * gate))
        open_, wide = self.up(self.network_norm(x)).chunk(2, -1)
        out: Tensor = x + self.down(self.dropout(F.silu(open_) * wide))
        return out

    def semantic_channel(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Retention: q · k with a decay by position."""
        step = torch.arange(query.shape[1], device=query.device, dtype=query.dtype)
        clock = (step[:, None] * F.softplus(self.rate).cumsum(0)).expand(len(query), -1, -1)
        query, key, value = (split_heads(each, self.num_heads) for each in (query, key, value))
        return decayed_attention(query, key, value, clock).flatten(2)

    def temporal_channel(self, value: Tensor, time: Tensor) -> Tensor:
        """cos and sin of the time between two events, as a phase of each head's period, with a decay by time."""
        assert self.time_rate is not None
        # Differences of int64 first: milliseconds since 1970 have more digits than a float32.
        since = (time - time[:, :1]).double()[..., None] * self.frequency(time.device)
        phase = torch.remainder(since, 2 * math.pi).to(value.dtype)
        key = torch.stack([phase.cos(), phase.sin()], -1)
        shifted = torch.stack([phase.sin(), -phase.cos()], -1)
        query, key = torch.cat([key, shifted], 2), torch.cat([key, key], 2)
        clock = since.to(value.dtype) * -F.logsigmoid(self.time_rate)
        out = decayed_attention(query, key, split_heads(value, 2 * self.num_heads), clock.repeat(1, 1, 2))
        return out.flatten(2)

    def positional_channel(self, value: Tensor) -> Tensor:
        """Products of learned vectors of the two positions, the same for all users."""
        length = value.shape[1]
        query, key = (
            table[:length, None].expand(len(value), -1, 1, -1) for table in (self.position_query, self.position_key)
        )
        return decayed_attention(query, key, value[:, :, None], value.new_zeros(len(value), length, 1)).flatten(2)

    def frequency(self, device: torch.device) -> Tensor:
        """Radians per ms of each head, float64 [H]: periods from an hour to a year, at equal ratios."""
        exponent = torch.linspace(0, 1, self.num_heads, dtype=torch.float64, device=device)
        return 2 * math.pi / (HOUR_MS * (YEAR_MS / HOUR_MS) ** exponent)
