"""SIM (Pi et al., CIKM 2020, arXiv 2006.05639), with either of its searches.

Letters: n histories of a tile, L events, C queries per history, R distinct items of a tile, U events found by any
query, H heads, M model dim, V items of the vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.arrays import Int
from vista.config import DataConfig, ModelConfig
from vista.config.choices import Architecture, Search
from vista.errors import ConfigError
from vista.log.item_features import CategoryColumn, ItemFeatures
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.candidate_model import age_table, network
from vista.model.baselines.event_queries import EventQueries
from vista.model.baselines.packed_events import PackedEvents
from vista.model.baselines.padded_tiles import PaddedTile, tiles
from vista.model.baselines.search_model import SearchModel, attend
from vista.model.schema import Schema

NO_CATEGORY = 0
Memory = tuple[Tensor, Tensor]
"""Keys and values [U, M]."""


class SIM(SearchModel):
    """A search, then multi-head target attention over the events that it found.

    Soft search: by inner products of projected items, trained by its own loss. Hard search: events of the candidate's
    category.
    """

    architecture = Architecture.sim

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        hard = config.search is Search.hard
        self.register_buffer("category", torch.zeros(1 + len(items)) if hard else None)
        """[1 + V] codes of the items' categories; float32, like all tensors in a model's file."""
        self.category: Tensor | None
        if not hard:
            self.of_candidate, self.of_event = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.search_network = network(2 * dim, len(schema.tasks), config.dropout)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.age_key, self.age_value = age_table(dim), age_table(dim)

    def read_item_table(self, data: DataConfig, features: ItemFeatures | None) -> None:
        if self.category is None:
            return
        if data.item_categories is None:
            codes = _category_codes(features, data.category_column)
        else:
            from vista.log.ingest.source_parser import read_categories  # imports Polars, an optional package

            codes = read_categories(Path(data.item_categories), data.category_column, self.items)
        self.category.copy_(torch.from_numpy(codes))

    def search_query(self, query: Tensor) -> Tensor:
        projected: Tensor = self.of_candidate(query)
        return projected

    def search_key(self, items: Tensor) -> Tensor:
        projected: Tensor = self.of_event(items)
        return projected

    @torch.no_grad()
    def search(
        self, events: PackedEvents, tile: PaddedTile, queries: EventQueries, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.category is None:
            return super().search(events, tile, queries, row)
        # A history sorted by category and place: a candidate's events are adjacent there, the newest last.
        length = tile.index.shape[1]
        step = torch.arange(length, device=row.device)
        listed = (self.category[events.rows[events.item[tile.index]]].long() * length + step).sort(1).values
        wanted, seen = self.category[queries.item[row]].long(), queries.seen[row]
        oldest = (seen - (self.config.history_limit or length)).clamp(min=0)
        first, end = (torch.searchsorted(listed, wanted * length + bound) for bound in (oldest, seen))
        rank = end[..., None] - 1 - torch.arange(self.most_found(length), device=row.device)
        is_match = (rank >= first[..., None]) & (wanted != NO_CATEGORY)[..., None]
        places = listed[:, None].expand(-1, row.shape[1], -1).gather(2, rank.clamp(min=0)) % length
        return places, is_match

    def search_logits(self, events: PackedEvents, queries: EventQueries) -> Tensor | None:
        """A network over the candidate and the mean of (relevance * item) over all events that it sees."""
        if self.category is not None:
            return None
        places, interests = [], []
        for tile in tiles(events.offsets.cpu().numpy(), queries.seen.device, self.tile_tokens):
            entries = tile.entries(queries.history)
            if entries is None or tile.index.shape[1] == 0:
                continue
            row, real = entries
            items = events.table[events.item[tile.index]] * self.scale
            relevance = self.search_query(queries.vectors[row]) @ self.search_key(items).transpose(1, 2)
            relevance = relevance.masked_fill(self.hidden(queries.seen[row], tile.index.shape[1]), 0.0)
            count = queries.seen[row].clamp(min=1, max=self.config.history_limit or None)
            interests.append(((relevance @ items.to(relevance.dtype)) / count[..., None])[real])
            places.append(row[real])
        interest = torch.zeros_like(queries.vectors)
        if places:
            interest = interest.index_copy(0, torch.cat(places), torch.cat(interests).to(interest.dtype))
        logits: Tensor = self.search_network(torch.cat([interest, queries.vectors], -1))
        return logits

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> Memory:
        return self.key(vectors), self.value(vectors)

    def interest(self, query: Tensor, memory: Memory, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        key, value = (F.embedding(place, each) for each in memory)
        # A matrix times [event, age] is the sum of a matrix times each.
        key, value = key + self.age_key(age), value + self.age_value(age)
        return attend(self.query(query), key, value, None, valid, self.config.num_heads)


def _category_codes(features: ItemFeatures | None, name: str) -> Int:
    """Codes int64 [1 + V] of a category of the log's items, from 1; NO_CATEGORY for items without a value."""
    columns = {} if features is None else features.columns
    column = columns.get(name)
    if not isinstance(column, CategoryColumn):
        known = ", ".join(each for each, own in columns.items() if isinstance(own, CategoryColumn))
        raise ConfigError(
            f"data.category_column={name}: is not a category of the log's items, which have "
            f"{known or 'none'}; name one, or a table of categories with data.item_categories"
        )
    counts = np.diff(column.offsets)
    if counts.max(initial=0) > 1:
        raise ConfigError(
            f"data.category_column={name}: some items have several values; name a category with one value per item"
        )
    codes = np.full(1 + len(counts), NO_CATEGORY, np.int64)
    codes[1:][counts == 1] = 1 + column.codes
    return codes
