"""VISTA: stage 1, decoder, stage 2 and heads.

Letters: T packed events, R item rows of a batch, NC cuts, NW windows, W positions and I impressions per window, S
seeds, L tail length, Q query tokens, M model dim, M' width of retrieval vectors, V items of the vocabulary.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from torch import Tensor, nn

from vista.arrays import Float32s, Int
from vista.config import DataConfig, ModelConfig, OptimConfig
from vista.config.checks import Architecture, Mixing, Precision, planned
from vista.examples.batch import Batch, BatchEvents
from vista.log.histories import UNKNOWN_GAP
from vista.log.vocabulary import Vocabulary
from vista.model.features import EncodedRows, Schema
from vista.model.item_projections import save_item_projections
from vista.model.layers import (
    CandidateHead,
    FeedForward,
    GatedOutput,
    frozen,
    module_list,
    norm,
    output_layers,
    restored,
    split_heads,
    with_bias,
)
from vista.model.losses import (
    Losses,
    LossPart,
    anchor_losses,
    attention_alone,
    next_loss,
    reconstruction_loss,
    task_parts,
    weighted_losses,
)
from vista.model.ranking_model import RankingModel
from vista.model.saved_model import ModelDescription
from vista.model.serving_model import EMPTY_FILE, input_scale
from vista.model.summarizer import Summarizer
from vista.model.target_attention import TargetAttention, TargetContext
from vista_kernels import causal_linear_attention

# Reconstruction of a history from its summary (VISTA, generative reconstruction loss).
#
# A causal decoder without softmax reads the K summary tokens, a start token that carries the age of the window, and the
# window's events u_1 .. u_{m-1}. Its outputs are trained to match u_1 .. u_m, or to rank their items first. Letters: NR
# windows, S seeds, M model dim, T packed events of windows.

NUM_AGES = 24
"""Log2 buckets of a window's age in events."""


class ReconstructionLayer(nn.Module):
    """Causal linear attention with gated output, then a feed-forward block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm = norm(config.dim)
        self.projections = nn.Linear(config.dim, 4 * config.dim, bias=False)
        self.output = GatedOutput(config.dim, config.num_heads, 0.0)
        self.feed_forward = FeedForward(config.dim, 0.0)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        *qkv, gate = self.projections(self.norm(x)).chunk(4, -1)
        query, key, value = (split_heads(part, self.num_heads) for part in qkv)
        heads, _ = causal_linear_attention(query, key, value, offsets)
        mixed: Tensor = self.feed_forward(self.output(x, heads, gate))
        return mixed


class ReconstructionDecoder(nn.Module):
    """Predicts the events of a window from a summary and the window's earlier events."""

    def __init__(self, config: ModelConfig, num_layers: int = 1) -> None:
        super().__init__()
        self.summary_projection = nn.Linear(config.dim, config.dim, bias=False)
        self.start = nn.Embedding(NUM_AGES, config.dim)
        self.layers = module_list([ReconstructionLayer(config) for _ in range(num_layers)])
        self.final = nn.Sequential(norm(config.dim), nn.Linear(config.dim, config.dim, bias=False))

    def forward(self, summary: Tensor, event_vectors: Tensor, offsets: Tensor, age: Tensor) -> Tensor:
        """Teacher-forced predictions.

        Args:
            summary: [NR, S, M].
            event_vectors: [T, M] embeddings of the windows' events, packed, oldest first.
            offsets: int64 [NR+1]; no window may be empty.
            age: int64 [NR] events from the window's first event to the summary's cut.

        Returns:
            [T, M]: the prediction of each event from the summary and the window's events before it.
        """
        count, num_seeds, dim = summary.shape
        lengths = offsets.diff()
        all_offsets = offsets + torch.arange(count + 1, device=offsets.device) * num_seeds
        event_slot = torch.arange(len(event_vectors), device=offsets.device)
        window = torch.arange(count, device=offsets.device).repeat_interleave(lengths)
        event_slot = event_slot + (window + 1) * num_seeds
        seed_slot = (all_offsets[:-1, None] + torch.arange(num_seeds, device=offsets.device)).flatten()
        bucket = torch.log2(age.clamp(min=1).float()).long().clamp(max=NUM_AGES - 1)
        # Inputs are the events shifted by one. A window's first input is its start token.
        inputs = torch.cat([event_vectors[:1], event_vectors[:-1]]).index_copy(0, offsets[:-1], self.start(bucket))
        x = inputs.new_zeros(int(all_offsets[-1]), dim)
        x = x.index_copy(0, event_slot, inputs)
        x = x.index_copy(0, seed_slot, self.summary_projection(summary).flatten(0, 1).to(x.dtype))
        for layer in self.layers:
            x = layer(x, all_offsets)
        predicted: Tensor = self.final(x[event_slot])
        return predicted


def packed_ranges(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of N ranges [start, stop), end to end; positions within their range; and offsets int64 [N+1]."""
    lengths = stop - start
    offsets = F.pad(lengths.cumsum(0), (1, 0))
    position = torch.arange(int(offsets[-1]), device=start.device) - offsets[:-1].repeat_interleave(lengths)
    return position + start.repeat_interleave(lengths), position, offsets


STAGE1_WEIGHTS = ("item_table", "id_mask", "item_space", "features.", "encoder.", "summarizer.")
"""Prefixes of the names of the weights that a summary depends on."""


class VistaModel(RankingModel):
    """VISTA: a summarizer of histories, a reconstruction decoder, target attention, and the heads."""

    architecture = Architecture.vista
    config: ModelConfig
    user_parts = 5  # `TargetContext.user`

    def __init__(self, config: ModelConfig, schema: Schema, items: Vocabulary, data: DataConfig) -> None:
        super().__init__(config, schema, items, data)
        dim = config.dim
        self.target_attention = TargetAttention(config)
        self.request = nn.Parameter(torch.randn(dim) * dim**-0.5 / self.target_attention.scale)
        """The retrieval head's query token, to which the newest event is added."""
        spec, tasks, inputs = self.counter_spec, len(schema.tasks), self._input_scale()
        self.task_head = nn.Linear(dim, tasks) if tasks else None
        if self.task_head is not None and inputs:
            nn.init.zeros_(self.task_head.weight)  # what is known without attention is fitted first
        self.candidate_head = CandidateHead(spec, 5 * dim, tasks, inputs) if tasks and (spec or inputs) else None
        """Added to candidates' vectors, projections in layer 1, and logits; None without tasks, or without counters and
        pooled vectors."""
        self.attention_head = None if self.candidate_head is None else nn.Linear(dim, tasks)
        """Predicts labels from attention's outputs alone, for a loss in training. Without it, attention only learns
        what is left by `candidate_head`, which is fitted first, and item vectors learn little of what items share."""
        # Last, so that from the same seed, a model without a summary starts with the same weights.
        nn.init.normal_(self.target_attention.summary_kind, std=0.02)
        self.summarizer = Summarizer(self.stage1, config.dropout) if config.num_seeds else None
        self.decoder = ReconstructionDecoder(config) if schema.has_decoder else None
        self._identified = b"", b""
        """Hash of the inputs that `summarizer_id` was last computed from, and the id."""

    def _input_scale(self) -> list[float]:
        """Factors of the inputs that labeled tasks read (`candidate_inputs`); none without pooled vectors."""
        if not self.stage1.pooled_dim or not self.schema.tasks:
            return []
        return input_scale(self.item_statistics.shape[1], self.item_rates.shape[1])

    def losses(self, batch: Batch, item_vectors: Tensor, optim: OptimConfig) -> Losses:
        encoded, summaries, context = self._contexts(batch, item_vectors)
        alone = self._learns_alone(optim)
        parts = self._head_losses(
            batch,
            item_vectors,
            optim,
            users=lambda: self.window_users(batch, context),
            askers=lambda: self._users_at_anchors(batch, context, trains=not alone),
            logits=lambda: self.window_logits(batch, item_vectors, context),
        )
        if alone:
            users, units = self.window_outputs(batch, context), F.normalize(item_vectors, dim=-1)
            parts[attention_alone("next")] = self._next_loss(batch, units, F.normalize(users, dim=-1))
        if self.decoder is not None and optim.reconstruction_weight > 0 and len(batch.reconstruction.cut):
            parts["reconstruction"] = self._reconstruction(batch, item_vectors, encoded, summaries)
        return weighted_losses(parts, optim)

    def wide_losses(self, batch: Batch, optim: OptimConfig) -> Losses:
        """The losses within `wide_alone`, without computing contexts."""
        labels, anchors, shown, dim = batch.labels, batch.anchors, batch.impressions, self.config.dim

        def outputs(place: Tensor) -> Tensor:
            """0 for each place."""
            return torch.zeros(*place.shape, dim, device=place.device)

        def askers() -> Tensor:
            assert anchors is not None
            return self.retrieval_users(outputs(anchors.window), anchors.pooled)

        def logits() -> tuple[Tensor, None]:
            return self.logits_of(outputs(shown.item), shown.codes, shown.inputs), None

        parts = self._head_losses(
            batch,
            outputs(batch.rows),
            optim,
            users=lambda: self.retrieval_users(outputs(labels.item), labels.pooled),
            askers=askers,
            logits=logits,
        )
        return weighted_losses(parts, optim)

    def _learns_alone(self, optim: OptimConfig) -> bool:
        """Whether attention learns next items by itself, at all positions, and the loss at anchors only trains what is
        added to it (`TrainConfig.learns_alone`). Else attention would not learn what the added parts explain."""
        asked = self.data.exclude_seen and optim.next_weight and not optim.window_weight
        return self.counted is not None and bool(asked) and self.request.requires_grad  # not in `vista adapt`

    @property
    def has_wide(self) -> bool:
        """Whether scores read anything without attention."""
        return self.statistics is not None or self.candidate_head is not None

    @property
    def reads_attention(self) -> bool:
        """Whether scores read outputs of stage 2: not within `wide_alone`, nor does the model of epoch 0."""
        return bool(self.target_attention.final_norm.weight.any())

    @contextmanager
    def wide_alone(self) -> Iterator[None]:
        """In this block, scores read nothing by attention: outputs of stage 2 are 0, as their norm has the scale 0."""
        scale = self.target_attention.final_norm.weight
        with restored([scale]):
            nn.init.zeros_(scale)
            yield

    def _head_losses(
        self,
        batch: Batch,
        item_vectors: Tensor,
        optim: OptimConfig,
        *,
        users: Callable[[], Tensor],
        askers: Callable[[], Tensor],
        logits: Callable[[], tuple[Tensor, Tensor | None]],
    ) -> dict[str, LossPart]:
        """Losses of all heads, as far as they are trained. `users`: gives the `window_users`; askers: the user vectors
        at the anchors; logits: the `window_logits`."""
        shown, parts = batch.impressions, dict[str, LossPart]()
        if planned(optim.next_weight, "optim.next_weight") and self.counted is None:
            parts["next"] = self._next_loss(batch, self.training_items(batch, item_vectors), users())
        if batch.anchors is not None:
            vectors = item_vectors.detach() if self._learns_alone(optim) else item_vectors
            parts |= anchor_losses(self, batch, askers(), vectors, optim)
        if self.task_head is not None and optim.task_weight > 0 and shown.item.shape[1]:
            tasks, labeled = self.schema.tasks, (shown.label, shown.mask, shown.examined)
            of_all, of_attention = logits()
            parts |= task_parts(tasks, of_all, *labeled)
            if of_attention is not None:
                parts |= task_parts(map(attention_alone, tasks), of_attention, *labeled)
        return parts

    def anchor_users(self, batch: Batch, item_vectors: Tensor) -> Tensor:
        return self._users_at_anchors(batch, self._contexts(batch, item_vectors)[2])

    def _contexts(self, batch: Batch, item_vectors: Tensor) -> tuple[Tensor, Tensor, TargetContext]:
        """Event embeddings [T, M], summaries of the cuts, and contexts of the windows."""
        events = batch.events
        self.encoder.check_batch(events.features)
        shown = self.shown_vectors(events, item_vectors)
        encoded = self.encoder(shown, events.action, events.gap, events.rating, events.features)
        summaries = self.cut_summaries(batch, encoded)
        return encoded, summaries, self.window_context(batch, shown, summaries)

    def cut_summaries(self, batch: Batch, encoded: Tensor) -> Tensor:
        """[NC, S, M] summaries at the cuts of a batch, from event embeddings [T, M]; or the store's [B, S, M]."""
        if batch.stored_summary is not None:
            return batch.stored_summary
        events, cuts = batch.events, batch.cuts
        if self.summarizer is None:
            return encoded.new_zeros(len(cuts.segment), 0, self.config.dim)
        if self.stage1.mixing is Mixing.bidirectional:
            index, position, offsets = packed_ranges(cuts.start, cuts.stop)
            return self.summarizer.summarize_set(self.summarizer.tokens(encoded[index], position), offsets)
        position = torch.arange(len(encoded), device=encoded.device)
        position = position - events.offsets[:-1].repeat_interleave(events.offsets.diff())
        tokens = self.summarizer.tokens(encoded, position)
        segments = self.summarizer.segment_states(tokens, events.clock, cuts.segment_offsets)
        states = self.summarizer.prefix_states(segments, cuts.chunk_offsets)
        return self.summarizer.read_at(states, cuts.segment)

    def window_context(self, batch: Batch, shown: Tensor, summaries: Tensor) -> TargetContext:
        """Keys and values of every window's summary and tail; shown [T, M] from `shown_vectors`."""
        events, windows = batch.events, batch.windows
        index, valid = windows.tail_index.clamp(min=0), windows.tail_index >= 0
        # The first event that stage 2 sees has an unknown gap, as it has in a stored tail.
        first = valid & ~F.pad(valid[:, :-1], (1, 0))
        if len(events.item):
            gap = torch.where(first, UNKNOWN_GAP, events.gap[index])
            tail = self.encoder(shown[index], events.action[index], gap, features=self._tail_inputs(events, index))
        else:
            tail = shown.new_zeros(*index.shape, self.config.dim)
        by_cut = self.target_attention.encode_summary(summaries)
        summary = [(key.index_select(0, windows.cut), value.index_select(0, windows.cut)) for key, value in by_cut]
        context = self.target_attention.encode_context(summary, tail, valid)
        if self.user_encoder is None:
            return context
        assert batch.user_features is not None
        users = self.user_encoder(batch.user_features)
        return replace(context, user=users.index_select(0, windows.chunk))

    def _tail_inputs(self, events: BatchEvents, index: Tensor) -> EncodedRows | None:
        """The features [NW, L] that stage 2 reads of events int64 [NW, L]."""
        columns = self.schema.tail_features
        if events.features is None or not columns:
            return None
        rows, num_dense = events.features.select(index), sum(column.num_dense for column in columns)
        return EncodedRows(rows.entry[..., : len(columns)], rows.dense[..., :num_dense])

    def window_users(self, batch: Batch, context: TargetContext) -> Tensor:
        """User vectors [NW, W, M'] at the positions of the windows, at the times of their labels."""
        return self.retrieval_users(self.window_outputs(batch, context), batch.labels.pooled)

    def window_outputs(self, batch: Batch, context: TargetContext) -> Tensor:
        """Attention's outputs [NW, W, M] of request tokens at the positions of the windows."""
        labels = batch.labels
        num_positions = labels.item.shape[1]
        seen = self.config.tail_len - num_positions + 1 + torch.arange(num_positions, device=labels.item.device)
        return self.user_outputs(self.encoder.gap_vectors(labels.gap), seen.clamp(min=0), context)

    def _users_at_anchors(self, batch: Batch, context: TargetContext, *, trains: bool = True) -> Tensor:
        """User vectors [NA, M'] of the anchors, at the times of their requests. `trains`: attention."""
        anchors = batch.anchors
        assert anchors is not None
        seen = self.config.tail_len - batch.labels.item.shape[1] + 1 + anchors.position
        gap = self.encoder.gap_vectors(anchors.gap.unsqueeze(1))
        pooled = None if anchors.pooled is None else anchors.pooled.unsqueeze(1)
        outputs = self.user_outputs(gap, seen.clamp(min=0).unsqueeze(1), context.select(anchors.window))
        return self.retrieval_users(outputs if trains else outputs.detach(), pooled).squeeze(1)

    def window_logits(self, batch: Batch, item_vectors: Tensor, context: TargetContext) -> tuple[Tensor, Tensor | None]:
        """Task logits [NW, I, num_tasks] of the windows' impressions, and those of `attention_head` if it is trained;
        item_vectors [R, M]."""
        seen = self.config.tail_len - batch.labels.item.shape[1] + 1 + batch.impressions.position
        shown = batch.impressions
        vectors, requests = item_vectors[shown.item], self.request_vectors(shown.gap, shown.features)
        seen = seen.clamp(min=0)
        outputs = self.candidate_outputs(vectors, requests, seen, context, codes=shown.codes)
        logits = self.logits_of(outputs, shown.codes, shown.inputs)
        if self.attention_head is None or not self.attention_head.weight.requires_grad:  # as in `vista adapt`
            return logits, None
        return logits, self.attention_head(outputs)

    def _next_loss(self, batch: Batch, items: Tensor, users: Tensor) -> LossPart:
        label = batch.labels.item.flatten()
        known = (label >= 0).nonzero().squeeze(-1)
        weight = None if batch.labels.weight is None else batch.labels.weight.flatten()[known]
        mean = next_loss(batch, items, users.flatten(0, 1)[known], label[known], self.temperature, weight)
        return LossPart(mean, len(known))

    def _reconstruction(self, batch: Batch, item_vectors: Tensor, encoded: Tensor, summaries: Tensor) -> LossPart:
        assert self.decoder is not None
        events, part = batch.events, batch.reconstruction
        index, _, offsets = packed_ranges(part.start, part.start + part.length)
        target = encoded[index]
        # The decoder reconstructs the events themselves, hidden items included, but not their features, which tell how
        # an event came about, such as the device, rather than what the user is interested in.
        if events.hidden is not None or events.features is not None:
            rating = None if events.rating is None else events.rating[index]
            target = self.encoder(item_vectors[events.item[index]], events.action[index], events.gap[index], rating)
        age = batch.cuts.stop[part.cut] - part.start
        predicted = self.decoder(summaries[part.cut], target, offsets, age)
        return LossPart(reconstruction_loss(predicted, target), len(target))

    def user_outputs(self, gap: Tensor | None, seen: Tensor, context: TargetContext) -> Tensor:
        """Attention's outputs [B, Q, M] of request tokens over contexts of B rows.

        Args:
            gap: [B, Q, M] embeddings of the requests' gaps, or None.
            seen: int64 [Q] or [B, Q] tail columns that a token sees.
        """
        stage, x = self.target_attention, self.request_tokens(seen, context)
        return stage.query(x, stage.layers[0].project(x), gap, seen, context)

    def request_tokens(self, seen: Tensor, context: TargetContext) -> Tensor:
        """The sums of `request_parts`, [B, Q, M]."""
        request, newest = self.request_parts(seen, context)
        return request + newest

    def request_parts(self, seen: Tensor, context: TargetContext) -> tuple[Tensor, Tensor]:
        """What request tokens are the sum of: the token itself [M], and the newest event [B, Q, M]. The residual stream
        leads from these vectors to those of next items, in one space without a projection."""
        return self.request, context.newest(seen)

    def candidate_logits(
        self,
        vectors: Tensor,
        request: Tensor | None,
        seen: Tensor,
        context: TargetContext,
        projections: Tensor | None = None,
        codes: Tensor | None = None,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, C, num_tasks] of candidates.

        Args:
            vectors: [B, C, M] item vectors.
            request: [B, C, M] `request_vectors`, or None.
            seen: int64 [C], [1] or [B, C] tail columns that a candidate sees.
            context: of the B rows.
            projections: [B, C, 4M] of the vectors in layer 1 (`ItemProjections`); None computes them.
            codes: uint8 [B, C, G * F + 1] the users' counters of the candidates (`UserCounters.of_pairs`). None without
                counters, or if the caller has added what they add.
            inputs: float32 [B, C, I] of users and candidates (`candidate_inputs`). None without pooled vectors, or if
                the caller adds what `candidate_head` adds to logits.
        """
        return self.logits_of(
            self.candidate_outputs(vectors, request, seen, context, projections, codes), codes, inputs
        )

    def candidate_outputs(
        self,
        vectors: Tensor,
        request: Tensor | None,
        seen: Tensor,
        context: TargetContext,
        projections: Tensor | None = None,
        codes: Tensor | None = None,
    ) -> Tensor:
        """Attention's outputs [B, C, M] of candidates; arguments as of `candidate_logits`."""
        stage = self.target_attention
        own = stage.layers[0].project(vectors) if projections is None else projections
        if self.candidate_head is not None and codes is not None:
            of_vectors, of_projections = self.candidate_head(codes).split([self.config.dim, own.shape[-1]], -1)
            vectors, own = vectors + of_vectors, own + of_projections
        return stage.query(vectors, own, request, seen, context)

    def logits_of(self, outputs: Tensor, codes: Tensor | None, inputs: Tensor | None) -> Tensor:
        """Task logits [..., num_tasks] from attention's outputs [..., M], counters, and inputs of the candidates."""
        assert self.task_head is not None
        logits: Tensor = self.task_head(outputs)
        if self.candidate_head is None or (codes is None and inputs is None):
            return logits
        return logits + self.candidate_head.logits(codes, inputs)

    def candidate_inputs(self, cosines: Tensor, rows: Tensor) -> Tensor:
        """What labeled tasks read of users and items, float32 [..., I], with the statistics and rates of serving.
        `cosines`: float32 [..., J] with the pooled vectors; rows: int64 [...] model rows."""
        return torch.cat([cosines, self.item_statistics[rows], self.item_rates[rows]], -1)

    @torch.inference_mode()
    def project_items(self, rows: Int) -> tuple[Float32s | None, Float32s | None]:
        """What scoring reads of items (`ItemProjections`), float32.

        Args:
            rows: int64 [N] model rows.

        Returns:
            (vectors [N, M'] of `retrieval_items`, or None without the retrieval head;
             [N, 5M] vector, query, gate, key and value of the first layer of stage 2, or None without labeled tasks).
        """
        index = torch.from_numpy(rows).to(self.device)
        vectors = self.item_vectors(index).float()
        retrieval = self.retrieval_items(vectors, index).cpu().numpy() if self.has_retrieval else None
        if not self.schema.tasks:
            return retrieval, None
        return retrieval, torch.cat([vectors, self.target_attention.layers[0].project(vectors)], -1).cpu().numpy()

    @torch.inference_mode()
    def empty_summary(self) -> Tensor:
        """float32 [1, S, M] summary of an empty history, which is also that of unknown users."""
        if self.summarizer is None:
            return torch.zeros(1, 0, self.config.dim, device=self.device)
        return self.summarizer.of_nothing().float()

    def with_tail(self, tail_len: int) -> VistaModel:
        """The same model with a shorter tail: cheaper to score, and no training needed. The two share their weights.

        Training with label_spacing W shows stage 2 tails of tail_len - W + 1 to tail_len events, so these lengths are
        trained. Summaries do not change, and a store with longer tails serves this model too.

        Args:
            tail_len: newest events that stage 2 reads alongside the summary.

        Raises:
            ValueError: if `tail_len` is below 1, or longer than what was trained.
        """
        if not 1 <= tail_len <= self.config.tail_len:
            raise ValueError(f"tail_len={tail_len}: must lie in 1 … {self.config.tail_len}, the trained length")
        with torch.random.fork_rng(devices=[]):
            shorter = VistaModel(replace(self.config, tail_len=tail_len), self.schema, self.items, self.data)
        weights = self.state_dict()
        for index in range(len(self.target_attention.layers)):
            name = f"target_attention.layers.{index}.bias"
            weights[name] = weights[name][:, : tail_len + 1]  # by distance; longer distances do not occur
        # A unified table is small, and its features refer to the table that the model was built with.
        shorter.load_state_dict(weights, assign=self.config.embedding_rows == 0)
        shorter.take_catalog(self)
        return shorter.to(self.device).train(self.training)

    def with_frozen(self, part: Literal["summarizer", "target_attention"], precision: Precision) -> VistaModel:
        """The same model for inference. It shares everything except one stage, which is `frozen` in `precision`. Later
        training does not change that stage."""
        other = copy.copy(self)
        other._modules = dict(self._modules)
        dtype = torch.bfloat16 if precision is Precision.bfloat16 else torch.float32
        if (stage := getattr(self, part)) is not None:
            setattr(other, part, frozen(stage, dtype))
        return other

    def with_adapter(self, values: Tensor | Float32s | None) -> VistaModel:
        """The same model for another surface, country, or task. It shares its weights with this one.

        Args:
            values: of an `Adapter`; None returns this model.
        """
        if values is None:
            return self
        given, other, stage = torch.as_tensor(values).to(self.device), copy.copy(self), copy.copy(self.target_attention)
        count = len(stage.layers) * self.config.dim
        stage.steering = torch.split(given[:count], self.config.dim)
        other._modules = {**self._modules, "target_attention": stage}
        if self.task_head is not None:
            other._modules["task_head"] = with_bias(self.task_head, given[count:])
            count += self.task_head.out_features
        if self.candidate_head is not None:
            network, head = self.candidate_head.network, copy.copy(self.candidate_head)
            added = dict(zip("02", given[count:].chunk(2), strict=True))  # of the hidden layers
            moved = {name: with_bias(network.get_submodule(name), own) for name, own in added.items()}
            head._modules = {**head._modules, "network": copy.copy(network)}
            head.network._modules = {**network._modules, **moved}
            other._modules["candidate_head"] = head
        return other

    def save_serving_tables(self, folder: Path) -> None:
        if self.target_attention.steering:
            raise ValueError(f"{folder}: a model with an adapter is not saved; save the base, and serve with adapter=…")
        save_item_projections(self, folder)
        training = self.training
        np.save(folder / EMPTY_FILE, self.eval().empty_summary()[0].cpu().numpy())
        self.train(training)

    def task_outputs(self) -> list[nn.Linear]:
        return output_layers(self.task_head, None if self.candidate_head is None else self.candidate_head.network)

    def description(self) -> ModelDescription:
        return replace(super().description(), summarizer_id=self.summarizer_id().hex())

    def summarizer_id(self) -> bytes:
        """SHA-256 over everything that a summary depends on: stage 1, event encoder, item table, features, vocabulary.

        Downstream models freeze all of these, so they have the id of their base, and stores are checked against it.
        Items that were added later (`vista.model.registry`) do not count.
        """
        count = self.num_trained_items
        settings = json.dumps(self.stage1.to_dict(), sort_keys=True)
        parts: list[Any] = [settings.encode() + self.items.part(0, count).digest().encode()]
        for name, tensor in sorted(self.state_dict().items()):
            if name.startswith(STAGE1_WEIGHTS):
                by_item = (
                    "id_mask",
                    "item_space",
                    "item_space_weights",
                    *(() if self.stage1.embedding_rows else ("item_table",)),
                )
                if name in by_item:
                    tensor = tensor[: 1 + count]
                parts.append(name.encode() + str(tuple(tensor.shape)).encode())
                parts.append(tensor.detach().cpu().contiguous().numpy().reshape(-1))
        if self.feature_table is not None:
            parts += self.feature_table.content(1 + count)
        if self.event_features is not None:
            categories = [known for known in self.event_features.values.values() if known is not None]
            parts += [known.digest().encode() for known in categories]
        # SHA-256 takes half a second at 10^6 items, 30 times as long as the check whether anything has changed.
        quick = xxhash.xxh3_128()
        for part in parts:
            quick.update(part)
        if self._identified[0] != quick.digest():
            digest = hashlib.sha256()
            for part in parts:
                # A step of an optimizer turns -0 into 0, and summaries do not change.
                is_float = isinstance(part, np.ndarray) and part.dtype.kind == "f"
                digest.update(part + 0.0 if is_float else part)
            self._identified = quick.digest(), digest.digest()
        return self._identified[1]
