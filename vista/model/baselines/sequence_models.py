"""Baselines that encode a whole history once, causally, so that each position is a training example.

They are SASRec, HSTU, and FuXi-Linear.

Histories are encoded in padded tiles [n, L] of similar length. The padding lies after a history's last event, where a
causal model cannot see it. Letters: n histories of a tile, L events, C candidates, M model dim.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.arrays import Int
from vista.config import DataConfig, OptimConfig
from vista.config.checks import Architecture, planned
from vista.config.model_config import NextItemConfig
from vista.examples.batch import Batch
from vista.log.histories import NUM_GAPS, Histories, history_gaps
from vista.log.vocabulary import Vocabulary
from vista.model.baselines.history_model import (
    HistoryModel,
    PaddedTile,
    ShownCandidates,
    in_place,
    seen_in_chunk,
    tiles,
    time_bucket,
)
from vista.model.features import EncodedRows, Schema
from vista.model.inference import newest, user_feature_vectors
from vista.model.layers import FEED_FORWARD_RATIO, CandidateHead, Dropout, module_list, norm, output_layers, split_heads
from vista.model.losses import Losses, LossPart, anchor_losses, next_loss, task_parts, weighted_losses
from vista.model.target_attention import MASKED


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


def state_head(config: NextItemConfig, schema: Schema) -> nn.Sequential | None:
    """The network of the default `impression_logits`."""
    dim, num_tasks = config.dim, len(schema.tasks)
    return nn.Sequential(nn.Linear(3 * dim, dim), nn.ReLU(), nn.Linear(dim, num_tasks)) if num_tasks else None


class SequenceModel(HistoryModel):
    """A causal encoder over the newest `history_limit` events, and the heads of retrieval and ranking."""

    config: NextItemConfig
    task_head: nn.Module | None
    """Made by each architecture; None without tasks."""
    gap_scale: Tensor
    """Factor √M of the request's gap, which is added to a state; events and candidates have the same factor."""

    def __init__(self, config: NextItemConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.position = nn.Parameter(torch.randn(config.history_limit, dim) * 0.02)
        self.start = nn.Parameter(torch.randn(dim) * dim**-0.5)
        """State before the first event."""
        self.dropout = Dropout(config.dropout)
        spec = self.counter_spec
        tasks = len(schema.tasks)
        self.candidate_head = CandidateHead(spec, dim, tasks) if spec and tasks else None
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

    def task_outputs(self) -> list[nn.Linear]:
        return output_layers(self.task_head, None if self.candidate_head is None else self.candidate_head.network)

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
            requests = self.request_vectors(shown.gap, shown.features)
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
                if self.candidate_head is not None and batch.impressions.codes is not None:
                    codes = batch.impressions.codes.flatten(0, 1)[shown.place[index]]
                    vector = vector + self.candidate_head(codes)
                # Padding may name an impression that sees more events than the tile has.
                seen = torch.where(valid, shown.seen[index], 0)
                logit = self.impression_logits(states, memory, vector, seen)
                if self.candidate_head is not None and codes is not None:
                    logit = logit + self.candidate_head.logits(codes)
                logits.append(logit[valid])
                places.append(shown.place[index][valid])
        parts: dict[str, LossPart] = {}
        if users:
            label, items = torch.cat(labels), F.normalize(item_vectors, dim=-1)
            mean = next_loss(batch, items, torch.cat(users), label, self.temperature)
            parts["next"] = LossPart(mean, len(label))
        if askers:
            parts |= anchor_losses(self, batch, _in_order(askers), item_vectors, optim)
        if logits:
            shown_logits = in_place(torch.cat(logits), torch.cat(places), batch)
            given = batch.impressions
            parts |= task_parts(self.schema.tasks, shown_logits, given.label, given.mask, given.examined)
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
        self.encoder.check_batch(events.features)
        shown, user = self.shown_vectors(events, item_vectors), self.vectors_of_users(batch)
        vectors = self.encoder(shown, events.action, events.gap, events.rating, events.features)
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
        """States [n, L+1, M] before each event and after the last, and the histories' memory (None without events). L
        is at most `history_limit`. An event beyond it is only a label."""
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
        vectors = self.encoder(vectors, action, self._tensor(gap), rating, features)
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
            counted = self.candidate_head if codes is not None else None
            if counted is not None and codes is not None:
                vectors = vectors + counted(codes[tile.rows])
            seen = tile.valid.sum(1, keepdim=True).expand(-1, candidates.shape[1])
            out[tile.rows] = self.impression_logits(states, memory, vectors, seen)
            if counted is not None and codes is not None:
                out[tile.rows] += counted.logits(codes[tile.rows])
        return out


# SASRec (Kang and McAuley, ICDM 2018, arXiv 1808.09781), trained by sampled softmax over cosines.
#
# Letters: n histories, L events, C candidates, M model dim.

LONGEST_HELD = 1024
"""Longest history whose attention scores are all held at once."""


class SASRec(SequenceModel):
    """Blocks of causal softmax attention and a point-wise network of two layers. The publication ranks candidates by
    their inner product with the state."""

    architecture = Architecture.sasrec

    def __init__(self, config: NextItemConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
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

    def __init__(self, config: NextItemConfig) -> None:
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


# HSTU (Zhai et al., ICML 2024, arXiv 2402.17152): point-wise SiLU attention with relative position and time bias.
#
# Letters: n histories, L events, C candidates, H heads, D head dim, M model dim.

Memory = list[tuple[Tensor, Tensor]]
"""Keys and values [n, H, L, D] of each layer."""


class HSTU(SequenceModel):
    """Layers of U * norm(SiLU(Q K^T + bias) V / N): no softmax, no feed-forward network."""

    architecture = Architecture.hstu
    queries_at_once: int = 256
    """Events of a history that attend at once, so that a long history needs no matrix of all pairs for every head."""

    def __init__(self, config: NextItemConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        self.layers = module_list(
            [HSTULayer(config, has_time=self.encoder.gap is not None) for _ in range(config.num_layers)]
        )
        self.task_head = nn.Linear(config.dim, len(schema.tasks)) if schema.tasks else None

    def states(self, x: Tensor, time: Tensor) -> tuple[Tensor, tuple[Memory, Tensor]]:
        length = x.shape[1]
        step = torch.arange(length, device=x.device)
        size = self.queries_at_once
        blocks = [slice(start, min(start + size, length)) for start in range(0, length, size)]
        buckets: list[Tensor | None] = [None] * len(blocks)
        if self.encoder.gap is not None:
            # One byte each: nothing else grows with the square of a history's length.
            gaps = (time[:, rows, None] - time[:, None, : rows.stop] for rows in blocks)
            buckets = [time_bucket(gap).to(torch.uint8) for gap in gaps]
        memory: Memory = []
        for layer in self.layers:
            query, key, value, gate = layer.project(x)
            memory.append((key, value))
            heads = []
            for rows, bucket in zip(blocks, buckets, strict=True):
                seen = slice(0, rows.stop)
                distance = step[rows, None] - step[seen]
                bias = layer.bias(distance.clamp(min=0), bucket)
                heads.append(layer.attend(query[:, :, rows], key[:, :, seen], value[:, :, seen], bias, distance < 0))
            x = layer.output(x, torch.cat(heads, 2), gate)
        return x, (memory, time)

    def impression_logits(
        self, states: Tensor, memory: tuple[Memory, Tensor] | None, candidates: Tensor, seen: Tensor
    ) -> Tensor:
        """A candidate passes through the layers like an event after those that it sees, and also sees itself."""
        assert self.task_head is not None
        length = states.shape[1] - 1
        x = candidates * self.config.dim**0.5
        layers, time = ([None] * len(self.layers), None) if memory is None else memory
        step = torch.arange(length, device=x.device)
        distance = seen[:, :, None] - step
        hidden = distance < 1
        bucket = None
        if time is not None and self.encoder.gap is not None:
            # The candidate carries the gap to the request. Events are dated from the newest that it sees.
            newest_time = time.gather(1, (seen - 1).clamp(min=0))
            bucket = time_bucket(newest_time[:, :, None] - time[:, None])
        for layer, held in zip(self.layers, layers, strict=True):
            query, key, value, gate = layer.project(x)
            own_bias = layer.bias(seen.new_zeros(1, 1), seen.new_ones(1, 1, 1))
            own = F.silu((query * key).sum(-1, keepdim=True) + own_bias) * value / layer.limit
            if held is not None:
                own = own + layer.attend(query, *held, layer.bias(distance.clamp(min=0), bucket), hidden)
            x = layer.output(x, own, gate)
        logits: Tensor = self.task_head(x)
        return logits


class HSTULayer(nn.Module):
    """Projections, biases and output of one layer."""

    def __init__(self, config: NextItemConfig, *, has_time: bool) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        self.num_heads, self.limit = heads, config.history_limit
        self.norm, self.head_norm = norm(dim), norm(dim)
        self.projection = nn.Linear(dim, 4 * dim, bias=False)
        self.position_bias = nn.Parameter(torch.zeros(heads, config.history_limit + 1))
        """[H, N+1] by distance in events."""
        self.time_bias = nn.Parameter(torch.zeros(heads, NUM_GAPS)) if has_time else None
        """[H, NUM_GAPS] by log bucket of the time between two events."""
        self.out = nn.Linear(dim, dim)
        self.dropout = Dropout(config.dropout)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [n, L, M] -> query, key, value [n, H, L, D] and gate [n, L, M]."""
        gate, *heads = F.silu(self.projection(self.norm(x))).chunk(4, -1)
        value, query, key = (split_heads(each, self.num_heads).transpose(1, 2) for each in heads)
        return query, key, value, gate

    def bias(self, distance: Tensor, bucket: Tensor | None) -> Tensor:
        """Bias [n, H, Q, L] of distance int64 [n, Q, L] and bucket uint8 or int64 [n, Q, L]; n may be missing."""
        bias = _look_up(self.position_bias, distance)
        if self.time_bias is not None and bucket is not None:
            bias = bias + _look_up(self.time_bias, bucket.long())
        return bias

    def attend(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor, hidden: Tensor) -> Tensor:
        """[n, H, Q, D] of Q queries over L events; hidden bool [Q, L] or [n, Q, L]."""
        mask = torch.where(hidden, MASKED, 0.0).to(bias.dtype)  # added, because masked_fill is slow on CPUs
        bias = bias + (mask if hidden.dim() == 2 else mask[:, None])
        return F.silu(query @ key.transpose(2, 3) + bias) @ value / self.limit

    def output(self, x: Tensor, heads: Tensor, gate: Tensor) -> Tensor:
        """Gate, projection and residual: x [n, L, M], heads [n, H, L, D], gate [n, L, M]."""
        update: Tensor = self.out(self.dropout(self.head_norm(heads.transpose(1, 2).flatten(2)) * gate))
        return x + update


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """[..., H, Q, L] entries of a table [H, N] at int64 [..., Q, L]."""
    *batch, num_queries, length = index.shape
    heads = len(table)
    flat = index.reshape(*batch, 1, -1).expand(*batch, heads, -1)
    return table.expand(*batch, -1, -1).gather(-1, flat).view(*batch, heads, num_queries, length)


# Causal linear attention with decay, in chunks: linear in the length of a history.
#
# Letters: n histories, L events, H heads, D width of keys, E width of values.

CHUNK = 64
"""Events whose pairs are held at once."""


def decayed_attention(query: Tensor, key: Tensor, value: Tensor, clock: Tensor) -> Tensor:
    """o_t = Σ_{s <= t} exp(c_s - c_t) (q_t · k_s) v_s.

    Args:
        query, key: [n, L, H, D]; value: [n, L, H, E].
        clock: [n, L, H] c, not falling within a history. Where it falls, as in padding, the difference counts as 0.

    Returns:
        [n, L, H, E].
    """
    n, length, heads, width = key.shape
    state = key.new_zeros(n, heads, width, value.shape[-1])
    before = clock[:, :1]
    out = []
    for start in range(0, length, CHUNK):
        part = slice(start, start + CHUNK)
        q, k, v, c = query[:, part], key[:, part], value[:, part], clock[:, part]
        # All exponents are at most 0, so nothing overflows.
        apart = torch.exp(-(c[:, :, None] - c[:, None]).clamp(min=0))
        causal = torch.ones(c.shape[1], c.shape[1], dtype=torch.bool, device=c.device).tril()
        score = torch.einsum("nqhd,nshd->nqsh", q, k) * apart * causal[..., None]
        carried = torch.exp(-(c - before).clamp(min=0))[..., None] * torch.einsum("nqhd,nhde->nqhe", q, state)
        out.append(torch.einsum("nqsh,nshe->nqhe", score, v) + carried)
        last = c[:, -1:]
        kept = torch.exp(-(last - before).clamp(min=0))[:, 0, :, None, None]
        fading = torch.exp(-(last - c).clamp(min=0))[..., None]
        state = state * kept + torch.einsum("nshd,nshe->nhde", k * fading, v)
        before = last
    return torch.cat(out, 1)


# FuXi-Linear (Ye et al., 2026, arXiv 2602.23671): linear attention in three channels: semantic, temporal, positional.
#
# Letters: n histories, L events, H heads, D head dim, M model dim, N `history_limit`.

HOUR_MS, YEAR_MS = 3_600_000.0, 31_557_600_000.0
"""The shortest and the longest period of the temporal channel."""
POSITION_DIM = 32


class FuXiLinear(SequenceModel):
    """Layers of gated channels and a feed-forward network."""

    architecture = Architecture.fuxi_linear

    def __init__(self, config: NextItemConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
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

    def __init__(self, config: NextItemConfig, *, has_time: bool) -> None:
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
        hidden = int(dim * FEED_FORWARD_RATIO)
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
