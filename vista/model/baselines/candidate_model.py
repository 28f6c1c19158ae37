"""Baselines in which each candidate picks events of the user's raw history before the request: DIN, SIM and TWIN.

The candidates of a batch, or of some requests, are queries over packed histories. `find` names the events that a query
reads, `interest` makes one vector of them, and a network ranks. So memory grows with the K events that a query finds,
not with its history. These baselines learn only from labeled impressions. Letters: B histories, T packed events, N
queries, K found events, U events found by any query, C candidates, M model dim.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vista.arrays import Int
from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.examples.batch import Batch
from vista.log.histories import NUM_GAPS, Histories
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.event_queries import EventQueries
from vista.model.baselines.found_events import FoundEvents
from vista.model.baselines.history_model import HistoryModel, time_bucket
from vista.model.baselines.packed_events import PackedEvents
from vista.model.baselines.shown_candidates import ShownCandidates, in_place
from vista.model.inference import newest, user_feature_vectors
from vista.model.layers import Dropout
from vista.model.losses import Losses, search_unit, task_parts, weighted_losses
from vista.model.row_feature_reader import EncodedRows
from vista.model.schema import Schema

HIDDEN = (200, 80)
"""Widths of the networks that DIN and SIM were published with."""


class CandidateModel(HistoryModel):
    """Queries, the network over their interests, losses and requests. An architecture adds how events are picked."""

    found_at_once: int = 1 << 16
    """Found events whose vectors are gathered at once."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.network = network(3 * config.dim, len(schema.tasks), config.dropout)

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
        rating, entry, dense = (
            None if part is None else part[used] for part in (events.rating, events.entry, events.dense)
        )
        # The gap to the event before would depend on where a window begins. Ages depend on the query only.
        vectors = self.encoder(items, action, None, rating, entry, dense)
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
        self.encoder.check_batch(batch.events.entry)
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
            entry=batch.events.entry,
            dense=batch.events.dense,
        )
        vectors, requests = item_vectors[shown.item], self.request_vectors(shown.gap, shown.entry, shown.dense)
        users = self.vectors_of_users(batch)
        vectors = vectors if users is None else vectors + users[shown.chunk]
        vectors = (vectors if requests is None else vectors + requests) * self.scale
        queries = EventQueries(vectors, batch.rows[shown.item], shown.chunk, shown.seen)
        label, mask = batch.impressions.label, batch.impressions.mask
        tasks = self.schema.tasks
        parts = task_parts(tasks, in_place(self.logits(events, queries), shown.place, batch), label, mask)
        search = self.search_logits(events, queries)
        if search is not None:
            parts |= task_parts(map(search_unit, tasks), in_place(search, shown.place, batch), label, mask)
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
        entry, dense = self.encoded_events(histories.features, histories.num_events)
        events = PackedEvents(
            table=self.item_vectors(rows),
            rows=rows,
            item=item,
            action=self._tensor(histories.action).long(),
            rating=None if histories.rating is None else self._tensor(histories.rating),
            clock=self.clock(self._tensor(np.asarray(histories.timestamp))),
            offsets=self._tensor(histories.offsets),
            entry=entry,
            dense=dense,
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
