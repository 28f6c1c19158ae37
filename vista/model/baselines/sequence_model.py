"""Baselines that encode a whole history once, causally, so that each position is a training example.

They are SASRec, HSTU, and FuXi-Linear.

Histories are encoded in padded tiles [n, L] of similar length. The padding lies after a history's last event, where a
causal model cannot see it. Letters: n histories of a tile, L events, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vista.arrays import Int
from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.config.checks import planned
from vista.examples.batch import Batch
from vista.log.histories import Histories, history_gaps
from vista.log.vocabulary import Vocabulary
from vista.model.anchor_losses import anchor_losses
from vista.model.baselines.history_model import HistoryModel
from vista.model.baselines.padded_tiles import PaddedTile, tiles
from vista.model.baselines.shown_candidates import ShownCandidates, in_place, seen_in_chunk
from vista.model.candidate_counters import CandidateCounters
from vista.model.inference import newest, user_feature_vectors
from vista.model.layers import Dropout
from vista.model.loss_part import LossPart
from vista.model.losses import Losses, next_loss, task_parts, weighted_losses
from vista.model.row_feature_reader import EncodedRows
from vista.model.schema import Schema


@dataclass(frozen=True, slots=True)
class EmbeddedSequences:
    """Embedded histories."""

    vectors: Tensor
    """[T, M]."""
    time: Tensor
    """int64 [T] ms, or positions in a log without times."""
    offsets: Int
    """int64 [B+1], on the host."""
    user: Tensor | None = None
    """[B, M] features of the users, which are added to every token; None without them."""


@dataclass(frozen=True, slots=True)
class _AskedAnchors:
    """The anchors of a batch, sorted by chunk; int64 [NA] each."""

    chunk: Tensor
    seen: Tensor
    """Events of the chunk before the request."""
    gap: Tensor

    @classmethod
    def of(cls, batch: Batch) -> _AskedAnchors | None:
        if batch.anchors is None:
            return None
        return cls(*seen_in_chunk(batch, batch.anchors.window, batch.anchors.position), batch.anchors.gap)


def _encoded_impressions(batch: Batch, limit: int) -> tuple[Batch, ShownCandidates]:
    """Drop the labels of impressions after a chunk of limit + 1 events, because its last event is not encoded."""
    shown = ShownCandidates.of(batch)
    late = shown.place[shown.seen > limit]
    if not len(late):
        return batch, shown
    mask = batch.impressions.mask.flatten(0, 1).index_fill(0, late, False)
    impressions = replace(batch.impressions, mask=mask.view_as(batch.impressions.mask))
    batch = replace(batch, impressions=impressions)
    return batch, ShownCandidates.of(batch)


def _in_order(askers: list[tuple[Tensor, Tensor]]) -> Tensor:
    """[NA, M'] user vectors of all anchors, from those of each tile."""
    users, order = zip(*askers, strict=True)
    return torch.cat(users)[torch.cat(order).argsort()]


def state_head(config: ModelConfig, schema: Schema) -> nn.Sequential | None:
    """The network of the default `impression_logits`."""
    dim, num_tasks = config.dim, len(schema.tasks)
    return nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, num_tasks)) if num_tasks else None


class SequenceModel(HistoryModel):
    """A causal encoder over the newest `history_limit` events, and the heads of retrieval and ranking."""

    task_head: nn.Module | None
    """Made by each architecture; None without tasks."""
    gap_scale: Tensor
    """Factor √M of the request's gap, which is added to a state; events and candidates have the same factor."""

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.position = nn.Parameter(torch.randn(config.history_limit, dim) * 0.02)
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        """State before the first event."""
        self.dropout = Dropout(config.dropout)
        spec = self.counter_spec
        tasks = len(schema.tasks)
        self.candidate_counters = CandidateCounters(spec, dim, tasks) if spec and tasks else None
        """Added to the vectors of candidates; None without counters or tasks."""
        if self.encoder.gap is not None:
            # A buffer, so that weights trained without it do not load.
            self.register_buffer("gap_scale", torch.tensor(dim**0.5))

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, Any]:
        """Causal states after each event.

        Args:
            x: [n, L, M] events, positions added; time: int64 [n, L].

        Returns:
            ([n, L, M], what `impression_logits` reads of the histories).
        """
        raise NotImplementedError

    def impression_logits(self, states: Tensor, memory: Any, candidates: Tensor, seen: Tensor) -> Tensor:
        """Task logits [n, C, num_tasks].

        Args:
            states: [n, L+1, M], first the start.
            memory: from `states`; None without events.
            candidates: [n, C, M], including the vector of their request.
            seen: int64 [n, C] events that a candidate sees.

        By default, `task_head` reads the state, the candidate, and their product.
        """
        assert self.task_head is not None
        user = states.gather(1, seen[..., None].expand(-1, -1, states.shape[2]))
        candidates = candidates * self.config.dim**0.5  # scaled like events
        logits: Tensor = self.task_head(torch.cat([user, candidates, user * candidates], -1))
        return logits

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        packed, events = batch.events, self._embedded(batch, item_vectors)
        shown = requests = None
        if self.schema.tasks and optim.task_weight > 0:
            batch, shown = _encoded_impressions(batch, self.config.history_limit)
            requests = self.request_vectors(shown.gap, shown.entry, shown.dense)
        asked = _AskedAnchors.of(batch)
        users, labels, logits, places, askers = [], [], [], [], []
        for tile in tiles(events.offsets, self.device, self.tile_tokens):
            states, memory = self._encode(events, tile)
            if planned(optim.next_weight, "optim.next_weight") and self.counted is None:
                labeled = self._labeled(tile)
                gap = self.encoder.gap_vectors(packed.gap[tile.index][labeled])
                users.append(self._user(states[:, : labeled.shape[1]][labeled], gap))
                labels.append(packed.item[tile.index][labeled])
            askers += self._asked_users(states, tile, asked)
            if shown is not None and (part := tile.entries(shown.chunk)) is not None:
                index, valid = part
                vector = item_vectors[shown.item[index]]
                vector = vector if requests is None else vector + requests[index]
                vector = vector if events.user is None else vector + events.user[tile.rows, None]
                codes = None
                if self.candidate_counters is not None and batch.impressions.codes is not None:
                    codes = batch.impressions.codes.flatten(0, 1)[shown.place[index]]
                    vector = vector + self.candidate_counters(codes)
                # Padding may name an impression that sees more events than the tile has.
                seen = torch.where(valid, shown.seen[index], 0)
                logit = self.impression_logits(states, memory, vector, seen)
                if self.candidate_counters is not None and codes is not None:
                    logit = logit + self.candidate_counters.logits(codes)
                logits.append(logit[valid])
                places.append(shown.place[index][valid])
        parts: dict[str, LossPart] = {}
        items = self.retrieval_items(item_vectors, batch.rows)
        if users:
            label = torch.cat(labels)
            mean = next_loss(batch, items, torch.cat(users), label, self.config.softmax_temperature)
            parts["next"] = LossPart(mean, len(label))
        if askers:
            parts |= anchor_losses(self, batch, _in_order(askers), items, optim)
        if logits:
            shown_logits = in_place(torch.cat(logits), torch.cat(places), batch)
            parts |= task_parts(self.schema.tasks, shown_logits, batch.impressions.label, batch.impressions.mask)
        return weighted_losses(parts, optim)

    def anchor_users(self, batch: Batch, item_vectors: Tensor) -> Tensor:
        events, asked = self._embedded(batch, item_vectors), _AskedAnchors.of(batch)
        askers = []
        for tile in tiles(events.offsets, self.device, self.tile_tokens):
            askers += self._asked_users(self._encode(events, tile)[0], tile, asked)
        return _in_order(askers)

    def _embedded(self, batch: Batch, item_vectors: Tensor) -> EmbeddedSequences:
        """The events of a batch."""
        events = batch.events
        self.encoder.check_batch(events.entry)
        shown, user = self.shown_vectors(events, item_vectors), self.vectors_of_users(batch)
        vectors = self.encoder(shown, events.action, events.gap, events.rating, events.entry, events.dense)
        return EmbeddedSequences(vectors, events.clock, events.offsets.cpu().numpy(), user)

    def _asked_users(
        self, states: Tensor, tile: PaddedTile, asked: _AskedAnchors | None
    ) -> list[tuple[Tensor, Tensor]]:
        """User vectors [n, M'] of the anchors in a tile, and which anchors these are, int64 [n]; empty without any."""
        if asked is None or (part := tile.entries(asked.chunk)) is None:
            return []
        index, valid = part
        row, index = valid.nonzero()[:, 0], index[valid]
        return [(self._user(states[row, asked.seen[index]], self.encoder.gap_vectors(asked.gap[index])), index)]

    def _labeled(self, tile: PaddedTile) -> Tensor:
        """Which events of the tile are labels of the next-item loss: bool [n, L]."""
        return tile.valid

    def _encode(self, events: EmbeddedSequences, tile: PaddedTile) -> tuple[Tensor, Any]:
        """States [n, L+1, M] before each event and after the last, and the histories' memory (None without events).

        L is at most `history_limit`. An event beyond it is only a label.
        """
        index = tile.index[:, : self.config.history_limit]
        n, length = index.shape
        start, vectors = self.start.expand(n, 1, -1), events.vectors[index]
        if events.user is not None:
            user = events.user[tile.rows, None]
            start, vectors = start + user * self.config.dim**0.5, vectors + user
        if length == 0:
            return start, None
        x = self.dropout(vectors * self.config.dim**0.5 + self.position[:length])
        states, memory = self.states(x, events.time[index])
        return torch.cat([start.to(states.dtype), states], 1), memory

    def _user(self, states: Tensor, gap: Tensor | None) -> Tensor:
        # No projection: states lie in the space of item vectors, where the residual stream starts.
        return self.retrieval_users(states if gap is None else states + self.gap_scale * gap)

    def embed(self, histories: Histories, users: EncodedRows | None = None) -> EmbeddedSequences:
        """The newest `history_limit` events of each history, and the features of its user; None if all are missing."""
        histories = newest(histories, self.config.history_limit)
        time = np.asarray(histories.timestamp)
        gap = history_gaps(time, histories.offsets) if self.encoder.gap is not None else np.zeros(len(time), np.int64)
        rating = None if histories.rating is None else self._tensor(histories.rating)
        vectors = self.item_vectors(self._tensor(histories.item).long())
        action = self._tensor(histories.action).long()
        features = self.encoded_events(histories.features, histories.num_events)
        vectors = self.encoder(vectors, action, self._tensor(gap), rating, *features)
        user = user_feature_vectors(self, users, histories.num_users)
        return EmbeddedSequences(vectors, self._tensor(time), histories.offsets, user)

    @torch.inference_mode()
    def user_vectors(self, histories: Histories, now: Int | None, users: EncodedRows | None = None) -> Tensor:
        events, gap = self.embed(histories, users), self.request_gap(histories, now)
        out = events.vectors.new_empty(histories.num_users, self.retrieval_dim)
        for tile in tiles(events.offsets, self.device, self.tile_tokens):
            states, _ = self._encode(events, tile)
            last = states[torch.arange(len(states)), tile.valid.sum(1)]
            out[tile.rows] = self._user(last, None if gap is None else gap[tile.rows])
        return out

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
        events, requests = self.embed(histories, users), self.vectors_of_requests(histories, now, features)
        out = events.vectors.new_empty(*candidates.shape, len(self.schema.tasks))
        for tile in tiles(events.offsets, self.device, self.tile_tokens):
            states, memory = self._encode(events, tile)
            vectors = self.item_vectors(candidates[tile.rows])
            vectors = vectors if requests is None else vectors + requests[tile.rows]
            vectors = vectors if events.user is None else vectors + events.user[tile.rows, None]
            counted = self.candidate_counters if codes is not None else None
            if counted is not None and codes is not None:
                vectors = vectors + counted(codes[tile.rows])
            seen = tile.valid.sum(1, keepdim=True).expand(-1, candidates.shape[1])
            out[tile.rows] = self.impression_logits(states, memory, vectors, seen)
            if counted is not None and codes is not None:
                out[tile.rows] += counted.logits(codes[tile.rows])
        return out
