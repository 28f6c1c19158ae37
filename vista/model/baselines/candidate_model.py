"""Baselines in which each candidate picks among the user's raw events before the request: DIN, SIM and TWIN.

All candidates of a batch, or of its requests, are queries over packed histories: `find` names the events that a query
reads, `interest` makes one vector of them, and a network ranks. So nothing holds more of a query than the K events that
it found. They learn from labelled impressions alone. Letters: B histories, T packed events, R rows of an item table, N
queries, K found events, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.examples.batch import Batch
from vista.log.gaps import NUM_GAPS
from vista.log.histories import Histories
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import (
    HistoryModel,
    Int,
    ShownCandidates,
    in_place,
    time_bucket,
    weighted_losses,
)
from vista.model.inference import newest
from vista.model.layers import Dropout
from vista.model.losses import Losses, task_losses
from vista.model.schema import Schema

HIDDEN = (200, 80)
"""Widths of the networks that DIN and SIM were published with."""
FOUND_AT_ONCE = 1 << 16
"""Found events whose vectors are gathered in one piece."""


@dataclass(frozen=True, slots=True)
class PackedEvents:
    """Packed histories: item int64 [T] rows of table [R, M], the vectors of items, and of rows int64 [R], the model's;
    action int64 [T]; rating float32 [T] or None; clock int64 [T] what ages are differences of, ms; offsets int64 [B+1].
    """

    table: Tensor
    rows: Tensor
    item: Tensor
    action: Tensor
    rating: Tensor | None
    clock: Tensor
    offsets: Tensor

    def newest_clock(self, queries: Queries) -> Tensor:
        """int64 [N]: the clock of the newest event that each query sees; any number where it sees none."""
        if len(self.clock) == 0:
            return torch.zeros_like(queries.seen)
        return self.clock[(self.offsets[queries.history] + queries.seen - 1).clamp(min=0)]


@dataclass(frozen=True, slots=True)
class Queries:
    """Candidates that ask: vectors [N, M] and model rows item int64 [N]; history int64 [N], sorted; seen int64 [N] of
    its events, the oldest ones."""

    vectors: Tensor
    item: Tensor
    history: Tensor
    seen: Tensor


@dataclass(frozen=True, slots=True)
class FoundEvents:
    """Events that queries read: index int64 [N, K] into the packed events; valid bool [N, K]."""

    index: Tensor
    valid: Tensor


class CandidateModel(HistoryModel):
    """Queries, the network over their interests, losses and requests; an architecture adds how events are picked."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.network = network(3 * config.dim, len(schema.tasks), config.dropout)

    # What an architecture adds -----------------------------------------------------------------------------------

    def find(self, events: PackedEvents, queries: Queries) -> FoundEvents:
        """The events that each query reads, of the newest `history_limit` that it sees."""
        raise NotImplementedError

    def memory(self, items: Tensor, vectors: Tensor, action: Tensor) -> Any:
        """What `interest` reads of U events, found by whichever query.

        Args:
            items: [U, M] vectors of their items; vectors: [U, M] of all their fields but time; action: int64 [U].
        """
        raise NotImplementedError

    def interest(self, query: Tensor, memory: Any, place: Tensor, age: Tensor, valid: Tensor) -> Tensor:
        """One vector [N, M] of what each query found; 0 where it found nothing.

        Args:
            query: [N, M]; memory: from `memory`; place: int64 [N, K] rows of it.
            age: int64 [N, K] log buckets of the time from an event to the newest that the query sees.
            valid: bool [N, K].
        """
        raise NotImplementedError

    def search_logits(self, events: PackedEvents, queries: Queries) -> Tensor | None:
        """Task logits [N, num_tasks] of a search that is trained by a loss of its own; None without one."""
        return None

    # Both ----------------------------------------------------------------------------------------------------------

    def logits(self, events: PackedEvents, queries: Queries) -> Tensor:
        """Task logits [N, num_tasks]."""
        found = self.find(events, queries)
        is_used = torch.zeros(len(events.item), dtype=torch.bool, device=found.index.device)
        is_used[found.index] = True
        used = is_used.nonzero().squeeze(-1)
        place = (is_used.cumsum(0) - 1)[found.index]
        age = time_bucket(events.newest_clock(queries)[:, None] - events.clock[found.index])
        items, rating = events.table[events.item[used]], None if events.rating is None else events.rating[used]
        # An event's gap to the one before would depend on where a window begins; ages, per query, do not.
        vectors = self.encoder(items, events.action[used], None, rating)
        memory = self.memory(items * self.scale, vectors * self.scale, events.action[used])
        parts = [queries.vectors.new_empty(0, len(self.schema.tasks))]
        step = max(1, FOUND_AT_ONCE // max(1, place.shape[1]))
        for low in range(0, len(place), step):
            part = slice(low, low + step)
            query = queries.vectors[part]
            interest = self.interest(query, memory, place[part], age[part], found.valid[part])
            parts.append(self.network(torch.cat([interest, query, interest * query], -1)))
        return torch.cat(parts)

    @property
    def scale(self) -> float:
        """Of item vectors, which start small."""
        return float(self.config.dim**0.5)

    def clock(self, time: Tensor) -> Tensor:
        """int64 [T]: times in ms; without times the order of events, a second each, so that ages count events."""
        return time if self.encoder.gap is not None else torch.arange(len(time), device=time.device) * 1000

    # Training ------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        shown = ShownCandidates.of(batch)
        if len(shown.place) == 0:
            return weighted_losses(self, batch, optim, None, None)
        events = PackedEvents(
            table=item_vectors,
            rows=batch.rows,
            item=batch.events.item,
            action=batch.events.action,
            rating=batch.events.rating,
            clock=self.clock(batch.events.clock),
            offsets=batch.events.offsets,
        )
        vectors, gap = item_vectors[shown.item], self.encoder.gap_vectors(shown.gap)
        vectors = (vectors if gap is None else vectors + gap) * self.scale
        queries = Queries(vectors, batch.rows[shown.item], shown.chunk, shown.seen)
        found = weighted_losses(self, batch, optim, None, in_place(self.logits(events, queries), shown.place, batch))
        search = self.search_logits(events, queries)
        if search is None:
            return found
        losses = task_losses(
            in_place(search, shown.place, batch), batch.impressions.label, batch.impressions.mask
        ).sum()
        return Losses(found.total + optim.task_weight * losses, {**found.parts, "search_unit": losses})

    # Requests ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def candidate_logits(self, histories: Histories, candidates: Tensor, now: Int | None) -> Tensor:
        histories = newest(histories, self.config.history_limit)
        rating = None if histories.rating is None else self._tensor(histories.rating)
        clock = self.clock(self._tensor(np.asarray(histories.timestamp)))
        rows, item = torch.unique(self._tensor(histories.item).long(), return_inverse=True)
        action, offsets = self._tensor(histories.action).long(), self._tensor(histories.offsets)
        events = PackedEvents(self.item_vectors(rows), rows, item, action, rating, clock, offsets)
        vectors, gap = self.item_vectors(candidates), self.request_gap(histories, now)
        vectors = (vectors if gap is None else vectors + gap[:, None]) * self.scale
        count = candidates.shape[1]
        history = torch.arange(histories.num_users, device=self.device).repeat_interleave(count)
        seen = events.offsets.diff().repeat_interleave(count)
        queries = Queries(vectors.flatten(0, 1), candidates.flatten(), history, seen)
        return self.logits(events, queries).view(*candidates.shape, -1)


def network(width: int, num_tasks: int, dropout: float) -> nn.Sequential:
    """[N, width] -> task logits [N, num_tasks]."""
    layers: list[nn.Module] = []
    for hidden in HIDDEN:
        layers += [nn.Linear(width, hidden), nn.PReLU(), Dropout(dropout)]
        width = hidden
    return nn.Sequential(*layers, nn.Linear(width, num_tasks))


def age_table(dim: int) -> nn.Embedding:
    """[NUM_GAPS, dim] by log bucket of an event's age; small, as vectors of items times `scale` are."""
    table = nn.Embedding(NUM_GAPS, dim)
    nn.init.normal_(table.weight, std=0.02 * dim**0.5)
    return table
