"""TWIN (Chang et al., KDD 2023, arXiv 2302.02352): the search scores events as the attention that reads them does.

Letters: n histories of a tile, L events, C queries per history, N queries, K found events, U events found by any query,
H heads, D head dim, M model dim.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture
from vista.log.histories import NUM_GAPS
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.candidate_model import age_table
from vista.model.baselines.history_model import time_bucket
from vista.model.baselines.search_model import SearchModel, attend
from vista.model.schema import Schema

Memory = tuple[Tensor, Tensor, Tensor]
"""Keys and values [U, M], and actions int64 [U]."""


class TWIN(SearchModel):
    """Scores q . k(item) / sqrt(D) + b(age) + b(action) per head. Keys depend on items only, so they could be kept."""

    architecture = Architecture.twin

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim, heads = config.dim, config.num_heads
        self.query, self.out = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.age_value = age_table(dim)
        self.age_bias = nn.Embedding(NUM_GAPS, heads)
        self.action_bias = nn.Embedding(len(schema.actions), heads) if self.encoder.action is not None else None
        for table in (self.age_bias, self.action_bias):
            if table is not None:
                nn.init.zeros_(table.weight)

    def search_query(self, query: Tensor) -> Tensor:
        """A product over the whole width is the sum over all heads."""
        projected: Tensor = self.query(query) * (self.config.dim // self.config.num_heads) ** -0.5
        return projected

    def search_key(self, items: Tensor) -> Tensor:
        projected: Tensor = self.key(items)
        return projected

    def search_bias(self, action: Tensor, age_ms: Tensor) -> Tensor:
        bias: Tensor = self.age_bias.weight.sum(1)[time_bucket(age_ms)]
        if self.action_bias is not None:
            bias = bias + self.action_bias.weight.sum(1)[action]
        return bias

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> Memory:
        return self.key(items), self.value(vectors), action

    def interest(self, query: Tensor, memory: Memory, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        key, value, action = memory
        key, value = F.embedding(place, key), F.embedding(place, value) + self.age_value(age)
        bias = self.age_bias(age)
        bias = bias if self.action_bias is None else bias + self.action_bias(action[place])
        mixed: Tensor = self.out(attend(self.query(query), key, value, bias, valid, self.config.num_heads))
        return mixed
