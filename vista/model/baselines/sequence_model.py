"""Rivals that encode a whole history once, causally, so that each position is a training example: SASRec and HSTU.

Histories run in padded tiles [n, L] of like length: padding lies after a history's last event, where a causal model
cannot see it. Letters: n histories of a tile, L events, C candidates, M model dim.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.data.cuts import Batch
from vista.data.histories import Histories
from vista.data.vocabulary import Vocabulary
from vista.model.baselines.history_model import Events, HistoryModel, next_loss, weighted_losses
from vista.model.layers import Dropout
from vista.model.ranking_model import Losses, Schema

Int = NDArray[np.int64]
TILE_TOKENS = 2048
"""Tokens of a tile at most (a longer history is a tile of its own): what stays in the cache."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Histories of like length: rows int64 [n]; index int64 [n, L] into the packed events, repeated after the last;
    valid bool [n, L]."""

    rows: Tensor
    index: Tensor
    valid: Tensor


def tiles(offsets: Int, device: torch.device) -> Iterator[Tile]:
    """Tiles that cover all histories; those without events are in tiles [n, 0]."""
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = lengths[order[first:]]
        fits = longest * np.arange(1, len(longest) + 1) <= TILE_TOKENS
        last = first + max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        rows = order[first:last]
        steps = np.arange(int(lengths[rows].max()))
        index = offsets[rows][:, None] + np.minimum(steps, lengths[rows][:, None] - 1)
        valid = steps < lengths[rows][:, None]
        yield Tile(*(torch.from_numpy(x).to(device) for x in (rows, np.where(valid, index, 0), valid)))
        first = last


class SequenceModel(HistoryModel):
    """A causal encoder over the newest `history_limit` events, and the heads of retrieval and ranking."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.position = nn.Parameter(torch.randn(config.history_limit, dim) * 0.02)
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        """State before the first event."""
        self.dropout = Dropout(config.dropout)
        self.user_projection = nn.Linear(dim, dim, bias=False)

    # What an architecture adds -----------------------------------------------------------------------------------

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, Any]:
        """Causal states after each event.

        Args:
            x: [n, L, M] events, positions added; time: int64 [n, L].

        Returns:
            ([n, L, M], what `impression_logits` reads of the history).
        """
        raise NotImplementedError

    def impression_logits(self, states: Tensor, memory: Any, candidates: Tensor, seen: Tensor) -> Tensor:
        """Task logits [n, C, num_tasks].

        Args:
            states: [n, L+1, M], the first of which is the start.
            memory: from `states`.
            candidates: [n, C, M] with their request's gap; seen: int64 [n, C], events that a candidate sees.
        """
        raise NotImplementedError

    # Training ------------------------------------------------------------------------------------------------------

    def losses(self, batch: Batch, item_vectors: Tensor, data: DataConfig, optim: OptimConfig) -> Losses:
        vectors = self.encoder(item_vectors[batch.item], batch.action, batch.gap, batch.rating)
        events = Events(vectors, batch.clock, batch.offsets.cpu().numpy())
        shown = _Impressions.of(batch) if self.schema.tasks and optim.task_weight > 0 else None
        users, labels, logits, places = [], [], [], []
        for tile in tiles(events.offsets, vectors.device):
            states, memory = self._encode(events, tile)
            if optim.next_weight > 0:
                gap = self.encoder.gap_vectors(batch.gap[tile.index][tile.valid])
                users.append(self._user(states[:, :-1][tile.valid], gap))
                labels.append(batch.item[tile.index][tile.valid])
            if shown is not None and (part := shown.of_tile(tile)) is not None:
                vector = item_vectors[part.item]
                gap = self.encoder.gap_vectors(part.gap)
                vector = vector if gap is None else vector + gap
                logits.append(self.impression_logits(states, memory, vector, part.seen)[part.valid])
                places.append(part.place[part.valid])
        loss = None
        if users:
            loss = next_loss(batch, item_vectors, torch.cat(users), torch.cat(labels), self.config.temperature)
        if not logits:
            return weighted_losses(self, batch, optim, loss, None)
        flat = logits[0].new_zeros(batch.candidate.numel(), len(self.schema.tasks))
        flat = flat.index_copy(0, torch.cat(places), torch.cat(logits))
        return weighted_losses(self, batch, optim, loss, flat.view(*batch.candidate.shape, -1))

    def _encode(self, events: Events, tile: Tile) -> tuple[Tensor, Any]:
        """States [n, L+1, M] before each event and after the last, and the history's memory (None without events)."""
        n, length = tile.index.shape
        start = self.start.expand(n, 1, -1)
        if length == 0:
            return start, None
        x = self.dropout(events.vectors[tile.index] * self.config.dim**0.5 + self.position[:length])
        states, memory = self.states(x, events.time[tile.index])
        return torch.cat([start.to(states.dtype), states], 1), memory

    def _user(self, states: Tensor, gap: Tensor | None) -> Tensor:
        return F.normalize(self.user_projection(states if gap is None else states + gap), dim=-1)

    # Requests ------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def user_vectors(self, histories: Histories, now: Int | None) -> Tensor:
        events, gap = self.embed(histories), self.request_gap(histories, now)
        out = events.vectors.new_empty(histories.num_users, self.config.dim)
        for tile in tiles(events.offsets, self.device):
            states, _ = self._encode(events, tile)
            last = states[torch.arange(len(states)), tile.valid.sum(1)]
            out[tile.rows] = self._user(last, None if gap is None else gap[tile.rows])
        return out

    @torch.inference_mode()
    def candidate_logits(self, histories: Histories, candidates: Tensor, now: Int | None) -> Tensor:
        events, gap = self.embed(histories), self.request_gap(histories, now)
        out = events.vectors.new_empty(*candidates.shape, len(self.schema.tasks))
        for tile in tiles(events.offsets, self.device):
            states, memory = self._encode(events, tile)
            vectors = self.item_vectors(candidates[tile.rows])
            vectors = vectors if gap is None else vectors + gap[tile.rows, None]
            seen = tile.valid.sum(1, keepdim=True).expand(-1, candidates.shape[1])
            out[tile.rows] = self.impression_logits(states, memory, vectors, seen)
        return out


@dataclass(frozen=True, slots=True)
class _Impressions:
    """Labelled impressions of a batch, or of a tile [n, C]: chunk and place only of a batch, valid only of a tile."""

    item: Tensor
    gap: Tensor
    seen: Tensor
    place: Tensor
    """Flat index into the batch's [NW, I]."""
    chunk: Tensor
    valid: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _Impressions:
        """The impressions [N] of a batch, sorted by chunk."""
        place = batch.candidate_mask.any(-1).flatten().nonzero().squeeze(-1)
        window = place // max(batch.candidate.shape[1], 1)
        chunk_start = batch.cut_start[batch.window_cut[window]]
        # The tail's last W columns are the events before each position of its window.
        column = batch.tail_index.shape[1] - batch.label.shape[1] + batch.candidate_position.flatten()[place]
        last = batch.tail_index[window, column]
        seen = torch.where(last >= 0, last + 1 - chunk_start, 0)
        chunk = torch.searchsorted(batch.offsets, chunk_start, right=True) - 1
        return cls(
            batch.candidate.flatten()[place], batch.candidate_gap.flatten()[place], seen, place, chunk, seen >= 0
        )

    def of_tile(self, tile: Tile) -> _Impressions | None:
        """The tile's impressions, padded to [n, C]; None where it has none."""
        first = torch.searchsorted(self.chunk, tile.rows)
        count = torch.searchsorted(self.chunk, tile.rows, right=True) - first
        width = int(count.max())
        if width == 0:
            return None
        steps = torch.arange(width, device=tile.rows.device)
        valid = steps < count[:, None]
        index = torch.where(valid, first[:, None] + steps, 0)
        return _Impressions(
            self.item[index], self.gap[index], self.seen[index], self.place[index], self.chunk[index], valid
        )
