"""Baselines in which each candidate picks events of the user's raw history before the request: DIN, SIM and TWIN.

The candidates of a batch, or of some requests, are queries over packed histories. `find` names the events that a query
reads, `interest` makes one vector of them, and a network ranks. So memory grows with the K events that a query finds,
not with its history. These baselines learn only from labeled impressions. Letters: B histories, T packed events, N
queries, K found events, U events found by any query, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.arrays import Int
from vista.config import DataConfig, OptimConfig
from vista.config.checks import Architecture
from vista.config.model_config import DinConfig, RankingConfig, SimConfig, TwinConfig
from vista.examples.batch import Batch
from vista.log.features import Columns
from vista.log.histories import NUM_GAPS, Histories
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import HistoryModel, PaddedTile, ShownCandidates, in_place, tiles, time_bucket
from vista.model.features import EncodedRows, Schema
from vista.model.inference import newest, user_feature_vectors
from vista.model.item_feature_table import category_codes
from vista.model.layers import Dropout, output_layers, split_heads
from vista.model.losses import Losses, search_unit, task_parts, weighted_losses


@dataclass(frozen=True, slots=True)
class EventQueries:
    """Candidates that read events."""

    vectors: Tensor
    """[N, M]."""
    item: Tensor
    """int64 [N] model rows."""
    history: Tensor
    """int64 [N], sorted."""
    seen: Tensor
    """int64 [N]: how many events of its history a query sees, oldest first."""


@dataclass(frozen=True, slots=True)
class FoundEvents:
    """The events that queries read."""

    index: Tensor
    """int64 [N, K] packed events."""
    valid: Tensor
    """bool [N, K]: False where a query found fewer than K events."""


# Packed histories. Letters: B histories, T packed events, R rows of an item table, N queries, M model dim.


@dataclass(frozen=True, slots=True)
class PackedEvents:
    """The events of all histories."""

    table: Tensor
    """[R, M] item vectors."""
    rows: Tensor
    """int64 [R] model row of each vector."""
    item: Tensor
    """int64 [T] rows of `table`."""
    action: Tensor
    """int64 [T]."""
    rating: Tensor | None
    """float32 [T]."""
    clock: Tensor
    """int64 [T] ms; ages are differences of it."""
    offsets: Tensor
    """int64 [B+1]."""
    features: EncodedRows | None
    """Of the events, as in `BatchEvents`; None for a model that reads none."""

    def newest_clock(self, queries: EventQueries) -> Tensor:
        """int64 [N]: the clock of the newest event that each query sees; arbitrary if it sees none."""
        if len(self.clock) == 0:
            return torch.zeros_like(queries.seen)
        return self.clock[(self.offsets[queries.history] + queries.seen - 1).clamp(min=0)]


HIDDEN = (200, 80)
"""Widths of the networks that DIN and SIM were published with."""


class CandidateModel(HistoryModel):
    """Queries, the network over their interests, losses and requests. An architecture adds how events are picked."""

    found_at_once: int = 1 << 16
    """Found events whose vectors are gathered at once."""

    def __init__(self, config: RankingConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.network = network(3 * config.dim, len(schema.tasks), config.dropout)

    def task_outputs(self) -> list[nn.Linear]:
        return output_layers(self.network)

    def find(self, events: PackedEvents, queries: EventQueries) -> FoundEvents:
        """The events that each query reads, of the newest `history_limit` that it sees."""
        raise NotImplementedError

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> Any:
        """What `interest` reads of the U events that any query found.

        Args:
            items: [U, M] vectors of their items.
            vectors: [U, M] of all their fields except time.
            action: int64 [U].
        """
        raise NotImplementedError

    def interest(self, query: Tensor, memory: Any, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        """One vector [N, M] of the events that each query found; 0 if it found none.

        Args:
            query: [N, M].
            memory: from `memory`.
            place: int64 [N, K] rows of it.
            age: int64 [N, K] log buckets of the time from an event to the newest that the query sees.
            valid: bool [N, K].
        """
        raise NotImplementedError

    def search_logits(self, events: PackedEvents, queries: EventQueries) -> Tensor | None:
        """Task logits [N, num_tasks] of a search that is trained by its own loss; None without one."""
        return None

    def logits(self, events: PackedEvents, queries: EventQueries) -> Tensor:
        """Task logits [N, num_tasks]."""
        picked = self.find(events, queries)
        is_used = torch.zeros(len(events.item), dtype=torch.bool, device=picked.index.device)
        is_used[picked.index] = True
        used = is_used.nonzero().squeeze(-1)
        place = (is_used.cumsum(0) - 1)[picked.index]
        age = time_bucket(events.newest_clock(queries)[:, None] - events.clock[picked.index])
        items, action = events.table[events.item[used]], events.action[used]
        rating = None if events.rating is None else events.rating[used]
        features = None if events.features is None else events.features.select(used)
        # The gap to the event before would depend on where a window begins. Ages depend on the query only.
        vectors = self.encoder(items, action, None, rating, features)
        memory = self.memory(items * self.scale, vectors * self.scale, action)
        parts = [queries.vectors.new_empty(0, len(self.schema.tasks))]
        step = max(1, self.found_at_once // max(1, place.shape[1]))
        for low in range(0, len(place), step):
            part = slice(low, low + step)
            query = queries.vectors[part]
            interest = self.interest(query, memory, place[part], age[part], picked.valid[part])
            parts.append(self.network(torch.cat([interest, query, interest * query], -1)))
        return torch.cat(parts)

    @property
    def scale(self) -> float:
        """Factor of item vectors, which start small."""
        return float(self.config.dim**0.5)

    def clock(self, time: Tensor) -> Tensor:
        """int64 [T] ms. Without times, events are a second apart, so that ages count events."""
        return time if self.encoder.gap is not None else torch.arange(len(time), device=time.device) * 1000

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        self.encoder.check_batch(batch.events.features)
        shown = ShownCandidates.of(batch)
        if len(shown.place) == 0:
            return weighted_losses({}, optim)
        events = PackedEvents(
            table=item_vectors,
            rows=batch.rows,
            item=batch.events.item,
            action=batch.events.action,
            rating=batch.events.rating,
            clock=self.clock(batch.events.clock),
            offsets=batch.events.offsets,
            features=batch.events.features,
        )
        vectors, requests = item_vectors[shown.item], self.request_vectors(shown.gap, shown.features)
        users = self.vectors_of_users(batch)
        vectors = vectors if users is None else vectors + users[shown.chunk]
        vectors = (vectors if requests is None else vectors + requests) * self.scale
        queries = EventQueries(vectors, batch.rows[shown.item], shown.chunk, shown.seen)
        labeled = batch.impressions.label, batch.impressions.mask, batch.impressions.examined
        tasks = self.schema.tasks
        parts = task_parts(tasks, in_place(self.logits(events, queries), shown.place, batch), *labeled)
        search = self.search_logits(events, queries)
        if search is not None:
            parts |= task_parts(map(search_unit, tasks), in_place(search, shown.place, batch), *labeled)
        return weighted_losses(parts, optim)

    @torch.inference_mode()
    def candidate_logits(
        self,
        histories: Histories,
        candidates: Tensor,
        now: Int | None,
        codes: Tensor | None = None,
        features: EncodedRows | None = None,
        users: EncodedRows | None = None,
    ) -> Tensor:
        histories = newest(histories, self.config.history_limit)
        rows, item = torch.unique(self._tensor(histories.item).long(), return_inverse=True)
        events = PackedEvents(
            table=self.item_vectors(rows),
            rows=rows,
            item=item,
            action=self._tensor(histories.action).long(),
            rating=None if histories.rating is None else self._tensor(histories.rating),
            clock=self.clock(self._tensor(np.asarray(histories.timestamp))),
            offsets=self._tensor(histories.offsets),
            features=self.encoded_events(histories.features, histories.num_events),
        )
        vectors, requests = self.item_vectors(candidates), self.vectors_of_requests(histories, now, features)
        user = user_feature_vectors(self, users, histories.num_users)
        vectors = vectors if user is None else vectors + user[:, None]
        vectors = (vectors if requests is None else vectors + requests) * self.scale
        count = candidates.shape[1]
        history = torch.arange(histories.num_users, device=self.device).repeat_interleave(count)
        seen = events.offsets.diff().repeat_interleave(count)
        queries = EventQueries(vectors.flatten(0, 1), candidates.flatten(), history, seen)
        return self.logits(events, queries).view(*candidates.shape, -1)


def network(width: int, num_tasks: int, dropout: float) -> nn.Sequential:
    """[N, width] -> task logits [N, num_tasks]."""
    layers: list[nn.Module] = []
    for hidden in HIDDEN:
        layers += [nn.Linear(width, hidden), nn.PReLU(), Dropout(dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, num_tasks))


def age_table(dim: int) -> nn.Embedding:
    """[NUM_GAPS, dim] by log bucket of an event's age. It starts as small as item vectors times `scale`."""
    table = nn.Embedding(NUM_GAPS, dim)
    nn.init.normal_(table.weight, std=0.02 * dim**0.5)
    return table


# DIN (Zhou et al., KDD 2018, arXiv 1706.06978): a small network weights each recent event for each candidate.
#
# Letters: N queries, K found events, U events found by any query, M model dim.


class DIN(CandidateModel):
    """The interest is sum_j a(q, k_j) k_j over the newest events, a(q, k) a network of [q, k, q - k, q * k]."""

    architecture = Architecture.din

    def __init__(self, config: DinConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
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


# Two-stage baselines: a search over the whole history names K events, and attention reads them: SIM and TWIN.
#
# Letters: n histories of a tile, L events, C queries per history, R distinct items of a tile, N queries, K found
# events, H heads, D head dim, M model dim.


class SearchModel(CandidateModel):
    """The search. An architecture adds what it scores by, and the attention."""

    top_k: int = 100
    """Number of events that the search finds per candidate and that the attention reads."""
    scores_at_once: int = 1 << 22
    """Scores of a search that are held at once (those of one query always are)."""

    def search_query(self, query: Tensor) -> Tensor:
        """[..., M] queries -> [..., M], whose products with keys are scores."""
        raise NotImplementedError

    def search_key(self, items: Tensor) -> Tensor:
        """[..., M] vectors of items -> [..., M]."""
        raise NotImplementedError

    def search_bias(self, action: Tensor, age_ms: Tensor) -> Tensor | None:
        """Added to scores [n, C, L], of action int64 [n, 1, L] and age int64 [n, C, L]; None adds nothing."""
        return None

    def find(self, events: PackedEvents, queries: EventQueries) -> FoundEvents:
        """The events that `search` names, a tile of histories at a time."""
        longest = int(events.offsets.diff().max())
        index = queries.seen.new_zeros(len(queries.seen), min(self.top_k, longest))
        valid = torch.zeros_like(index, dtype=torch.bool)
        for tile in tiles(events.offsets.cpu().numpy(), index.device, self.tile_tokens):
            entries = tile.entries(queries.history)
            if entries is None or tile.index.shape[1] == 0:
                continue
            row, real = entries
            local, visible = self.search(events, tile, queries, row)
            packed = tile.index[:, None].expand(-1, row.shape[1], -1).gather(2, local)
            index[row[real], : local.shape[2]] = torch.where(visible, packed, 0)[real]
            valid[row[real], : local.shape[2]] = visible[real]
        return FoundEvents(index, valid)

    @torch.no_grad()
    def search(
        self, events: PackedEvents, tile: PaddedTile, queries: EventQueries, row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The events with the highest scores, the highest first.

        Args:
            row: int64 [n, C] queries of each of the tile's histories.

        Returns:
            (places int64 [n, C, k] in the tile's histories, bool [n, C, k]: False for events that the query must not
            see). k is `top_k`, or the tile's length if that is less.
        """
        n, length = tile.index.shape
        count = min(self.top_k, length)
        # The first part of a score depends on the item only, so events of one item share it, bit for bit.
        distinct, place = torch.unique(events.item[tile.index], return_inverse=True)
        newest_clock, places, visible = events.newest_clock(queries), [], []
        # Under autocast, training would pick events by bfloat16 scores and serving by float32 scores.
        with torch.autocast(row.device.type, enabled=False):
            key = self.search_key(events.table[distinct] * self.scale)
            for part in torch.split(row, max(1, self.scores_at_once // (n * max(length, len(distinct)))), 1):
                hidden = self.hidden(queries.seen[part], length)
                score = (self.search_query(queries.vectors[part]) @ key.t()).gather(2, place[:, None].expand_as(hidden))
                age = newest_clock[part][..., None] - events.clock[tile.index][:, None]
                bias = self.search_bias(events.action[tile.index][:, None], age)
                score = (score if bias is None else score + bias).masked_fill(hidden, -torch.inf)
                places.append(newest_of_highest(score, count))
                visible.append(~hidden.gather(2, places[-1]))
        return torch.cat(places, 1), torch.cat(visible, 1)

    def hidden(self, seen: Tensor, length: int) -> Tensor:
        """bool [n, C, L]: events after the first `seen` int64 [n, C], or before the newest `history_limit` of these."""
        step, seen = torch.arange(length, device=seen.device), seen[..., None]
        late = step >= seen
        return late | (step < seen - self.config.history_limit) if self.config.history_limit else late


def newest_of_highest(score: Tensor, count: int) -> Tensor:
    """int64 [..., count]: places of the highest scores [..., L], in float32; of equal scores the last ones."""
    bits = score.float().view(torch.int32)
    # As integers, positive floats have their own order, and negative ones the reverse.
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).long()
    unequal = (ordered << 32) | torch.arange(score.shape[-1], device=score.device)
    return unequal.topk(count).indices


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, valid: Tensor, num_heads: int) -> Tensor:
    """Multi-head target attention [N, M]; 0 if a query found no events. `query`: [N, M]; key, value: [N, K, M]; bias:
    [N, K, H], added to the scores; valid: bool [N, K]."""
    query, key, value = (split_heads(each, num_heads) for each in (query, key, value))
    score = torch.einsum("nhd,nkhd->nkh", query, key) * query.shape[-1] ** -0.5
    score = (score if bias is None else score + bias).masked_fill(~valid[..., None], torch.finfo(score.dtype).min)
    weight = torch.softmax(score, 1) * valid[..., None]
    return torch.einsum("nkh,nkhd->nhd", weight.to(value.dtype), value).flatten(1)


# SIM (Pi et al., CIKM 2020, arXiv 2006.05639), with either of its searches.
#
# Letters: n histories of a tile, L events, C queries per history, R distinct items of a tile, U events found by any
# query, H heads, M model dim, V items of the vocabulary.

NO_CATEGORY = 0
SIMMemory = tuple[Tensor, Tensor]
"""Keys and values [U, M]."""


class SIM(SearchModel):
    """A search, then multi-head target attention over the events that it found. Soft search: by inner products of
    projected items, trained by its own loss. Hard search: events of the candidate's category."""

    config: SimConfig
    architecture = Architecture.sim

    def __init__(self, config: SimConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        hard = config.search_category is not None
        self.register_buffer("category", torch.zeros(1 + len(items)) if hard else None)
        """[1 + V] codes of the items' categories; float32, like all tensors in a model's file."""
        self.category: Tensor | None
        if not hard:
            self.of_candidate, self.of_event = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
            self.search_network = network(2 * dim, len(schema.tasks), config.dropout)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.age_key, self.age_value = age_table(dim), age_table(dim)

    def read_item_table(self, features: Columns) -> None:
        if self.category is not None and (name := self.config.search_category) is not None:
            self.category.copy_(torch.from_numpy(category_codes(features, name, "model.search_category")))

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
        rank = end[..., None] - 1 - torch.arange(min(self.top_k, length), device=row.device)
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

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> SIMMemory:
        return self.key(vectors), self.value(vectors)

    def interest(self, query: Tensor, memory: SIMMemory, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        key, value = (F.embedding(place, each) for each in memory)
        # A matrix times [event, age] is the sum of a matrix times each.
        key, value = key + self.age_key(age), value + self.age_value(age)
        return attend(self.query(query), key, value, None, valid, self.config.num_heads)


# TWIN (Chang et al., KDD 2023, arXiv 2302.02352): the search scores events as the attention that reads them does.
#
# Letters: n histories of a tile, L events, C queries per history, N queries, K found events, U events found by any
# query, H heads, D head dim, M model dim.

TWINMemory = tuple[Tensor, Tensor, Tensor]
"""Keys and values [U, M], and actions int64 [U]."""


class TWIN(SearchModel):
    """Scores q . k(item) / sqrt(D) + b(age) + b(action) per head. Keys depend on items only, so they could be kept."""

    config: TwinConfig
    architecture = Architecture.twin

    def __init__(self, config: TwinConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
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

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> TWINMemory:
        return self.key(items), self.value(vectors), action

    def interest(self, query: Tensor, memory: TWINMemory, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        key, value, action = memory
        key, value = F.embedding(place, key), F.embedding(place, value) + self.age_value(age)
        bias = self.age_bias(age)
        bias = bias if self.action_bias is None else bias + self.action_bias(action[place])
        mixed: Tensor = self.out(attend(self.query(query), key, value, bias, valid, self.config.num_heads))
        return mixed
