"""SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781), trained by sampled softmax over cosines.

Letters: n histories, L events, C candidates, M model dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.sequence_model import SequenceModel, state_head
from vista.model.layers import Dropout, module_list, norm, split_heads
from vista.model.schema import Schema

LONGEST_HELD = 1024
"""Longest history whose attention scores are all held at once."""


class SASRec(SequenceModel):
    """Blocks of causal softmax attention and a point-wise network of two layers.

    The publication ranks candidates by their inner product with the state.
    """

    architecture = Architecture.sasrec

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.blocks = module_list([SASRecBlock(config) for _ in range(config.num_layers)])
        self.final_norm = norm(dim)
        self.task_head = state_head(config, schema)

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, None]:
        for block in self.blocks:
            x = block(x)
        normed: Tensor = self.final_norm(x)
        return normed, None


def attend_causally(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Softmax attention of [n, H, L, D], each position over itself and those before it.

    On a CPU the backward pass of torch's fused attention takes 5 times as long, at 200 events and heads of 16. But it
    does not hold [n, H, L, L], so it is used for long histories and on GPUs.
    """
    length = query.shape[2]
    if length > LONGEST_HELD or query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = (query * query.shape[3] ** -0.5) @ key.transpose(2, 3)
    future = torch.full((length, length), -torch.inf, dtype=scores.dtype).triu_(1)
    return torch.softmax(scores + future, -1).to(value.dtype) @ value


class SASRecBlock(nn.Module):
    """x = h + attention(h, x) with h = norm(x), then x = h + network(h) with h = norm(x)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.attention_norm, self.network_norm = norm(dim), norm(dim)
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, L, M] -> [n, L, M]."""
        h = self.attention_norm(x)
        key, value = self.key_value(x).chunk(2, -1)
        query, key, value = (split_heads(each, self.num_heads).transpose(1, 2) for each in (self.query(h), key, value))
        mixed = attend_causally(query, key, value).transpose(1, 2).flatten(2)
        x = h + self.dropout(self.out(mixed))
        h = self.network_norm(x)
        update: Tensor = self.dropout(self.down(self.dropout(F.relu(self.up(h)))))
        x = h + update
        return x
