"""DIN (Zhou et al., KDD 2018, arXiv 1706.06978): a small network weights each recent event for each candidate.

Letters: N queries, K found events, U events found by any query, M model dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.candidate_model import CandidateModel, age_table
from vista.model.baselines.event_queries import EventQueries
from vista.model.baselines.found_events import FoundEvents
from vista.model.baselines.packed_events import PackedEvents
from vista.model.schema import Schema


class DIN(CandidateModel):
    """The interest is sum_j a(q, k_j) k_j over the newest events, a(q, k) a network of [q, k, q - k, q * k]."""

    architecture = Architecture.din

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.age = age_table(dim)
        self.activation_in = nn.Linear(4 * dim, dim)
        self.activation = nn.PReLU()
        self.activation_out = nn.Linear(dim, 1)

    def find(self, events: PackedEvents, queries: EventQueries) -> FoundEvents:
        width = min(self.config.history_limit, int(events.offsets.diff().max()))
        local = queries.seen[:, None] - width + torch.arange(width, device=queries.seen.device)
        valid = local >= 0
        return FoundEvents(torch.where(valid, events.offsets[queries.history][:, None] + local, 0), valid)

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> Tensor:
        return vectors

    def interest(self, query: Tensor, memory: Tensor, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        key = F.embedding(place, memory) + self.age(age)
        of_query, of_key, of_difference, of_product = self.activation_in.weight.chunk(4, 1)
        # Linear in the key, apart from the query's own part: one matrix [M, M] per query instead of [N, K, 4 M].
        matrix = (of_product * query[:, None] + (of_key - of_difference)).transpose(1, 2)
        own = F.linear(query, of_query + of_difference, self.activation_in.bias)
        weight = self.activation_out(self.activation(key @ matrix + own[:, None])).squeeze(-1)
        weight = weight.masked_fill(~valid, 0.0)
        interest: Tensor = (weight[:, None] @ key).squeeze(1)
        return interest
