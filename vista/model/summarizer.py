"""Stage 1: a user's history into K summary tokens (VISTA, section on UIH summarization; docs/design/decisions.md).

Letters: T packed events, B histories, NC cuts, S seeds, L layers, H heads, D head dim, M model dim.

`separable` mixing: only events write and only seeds read. An event's token at layer l+1 depends only on its token at
layer l, so every layer's state is a sum over events, computed in one pass.
`bidirectional` mixing (the paper): events and seeds are one set. All write and all read at every layer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.checks import Decay, Mixing
from vista.config.model_config import EMBEDDING_HASHES, NextItemConfig, RankingConfig
from vista.counters.counters import CounterSpec
from vista.log.histories import DAY_MS
from vista.model.features import FeatureSpec, Schema
from vista.model.layers import (
    FEED_FORWARD_RATIO,
    CausalConvolution,
    Dropout,
    FeedForward,
    GatedOutput,
    module_list,
    norm,
    split_heads,
)
from vista_kernels import accumulate_state, quasi_linear_attention, read_state, scan_states

PHI = "silu"
"""Activation of queries, keys, and states, as in the paper."""
CONSTANTS = {
    "activation": PHI,
    "normalization_alpha": 1.0,
    "feed_forward_ratio": FEED_FORWARD_RATIO,
    "embedding_hashes": EMBEDDING_HASHES,
}
"""Settings of stage 1 that are the same in all models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage1Config:
    """All settings that a summary depends on. `VistaModel.summarizer_id` hashes every field.

    The modules of stage 1 and the event encoder get these settings and no others, so a setting that summaries depend on
    is a field here, and what all models share is in `CONSTANTS`: a change of either changes the id.
    """

    dim: int
    num_heads: int
    num_seeds: int
    num_layers: int
    mixing: Mixing
    conv_width: int
    decay: Decay
    decay_horizons: tuple[float, ...]
    """One per head, in days or events; empty without decay."""
    history_limit: int
    embedding_rows: int
    pooled_dim: int
    """Dimensions of the item space that the pooled vector of a record lies in; 0 without pooled vectors."""
    has_gap: bool
    """Whether event embeddings have the gap to the previous event."""
    actions: tuple[str, ...]
    rating_range: tuple[float, float] | None
    """Smallest and largest rating; None if event embeddings have no ratings."""
    item_features: tuple[FeatureSpec, ...]
    event_features: tuple[FeatureSpec, ...]
    counters: CounterSpec | None
    """What the counters in a record count; None without counters."""

    @classmethod
    def of(cls, config: RankingConfig, schema: Schema) -> Stage1Config:
        """The part of a model's settings, and of what it reads of a log, that summaries depend on. Of a baseline, that
        is what its event embeddings depend on."""
        counters = None
        if isinstance(config, NextItemConfig):
            counters = CounterSpec.of(config, has_time=schema.has_time, actions=schema.actions)
        if not isinstance(config, ModelConfig):
            kept = {name: getattr(config, name) for name in ("dim", "history_limit", "embedding_rows", "ignore")}
            config = ModelConfig(num_heads=1, num_seeds=0, pooled_dim=0, **kept)
        return cls(
            dim=config.dim,
            num_heads=config.num_heads,
            num_seeds=config.num_seeds,
            num_layers=config.num_layers,
            mixing=config.mixing,
            conv_width=config.conv_width,
            decay=config.decay,
            decay_horizons=() if config.decay is Decay.none else tuple(map(float, config.decay_horizons)),
            history_limit=config.history_limit,
            embedding_rows=config.embedding_rows,
            pooled_dim=config.space_dim,
            has_gap=config.reads("times") and schema.has_time,
            actions=tuple(schema.actions),
            rating_range=schema.rating_range,
            item_features=tuple(schema.item_features),
            event_features=tuple(schema.event_features),
            counters=counters,
        )

    def to_dict(self) -> dict[str, Any]:
        """All settings as JSON values, which `VistaModel.summarizer_id` hashes."""
        own = {name: value.value if isinstance(value, Enum) else value for name, value in asdict(self).items()}
        return own | CONSTANTS | {"normalization": self.normalization}

    @property
    def normalization(self) -> str:
        """Scale c of the state before its activation: "length" for 1 / max(n, 1), so a mean, and "none" for 1."""
        return "length" if self.mixing is Mixing.separable else "none"


# States of separable mixing: sums over events that append, merge and forget (docs/design/decisions.md).
#
# Letters: N histories, L layers, H heads, D head dim.
#
# A state is what a set of events wrote, seen from one time (`clock`): z = sum_s w_s phi(k_s) v_s^T with
# w_s = exp(-(clock - t_s) / tau). So the state of a union of disjoint sets is the sum of their states, once both are
# seen from the same time. `vista.model.history_states` computes the states of histories.

DRIFT_LIMIT = 0.999
"""A state must be recomputed if this share of all the weight that it ever held, seen from now, was removed."""
LARGEST_EXPONENT = 60.0
"""Largest exponent of the growth when a state is seen from an earlier time. Beyond it a state is past DRIFT_LIMIT."""


@dataclass(frozen=True, slots=True)
class SummaryState:
    """The states of N histories (separable mixing)."""

    z: Tensor
    """float32 [N, L, H, D, D]."""
    n: Tensor
    """float32 [N, H] sum of the events' weights."""
    removed: Tensor
    """float32 [N, H] weight removed since the state was last computed from events."""
    clock: Tensor
    """int64 [N] time that weights are seen from, that of the newest event (0 for an empty history)."""
    num_events: Tensor
    """int64 [N]."""

    @classmethod
    def empty(
        cls, count: int, num_layers: int, num_heads: int, head_dim: int, device: torch.device | str
    ) -> SummaryState:
        """The state of `count` empty histories: zeros."""
        n = torch.zeros(count, num_heads, device=device)
        z = torch.zeros(count, num_layers, num_heads, head_dim, head_dim, device=device)
        clock = torch.zeros(count, dtype=torch.int64, device=device)
        return cls(z, n, torch.zeros_like(n), clock, torch.zeros_like(clock))

    def __getitem__(self, rows: Tensor | slice) -> SummaryState:
        return SummaryState(self.z[rows], self.n[rows], self.removed[rows], self.clock[rows], self.num_events[rows])

    def seen_from(self, clock: Tensor, decay_rate: Tensor) -> SummaryState:
        """The same events seen from another time, by one multiplication.

        Args:
            clock: int64 [N].
            decay_rate: float64 [H], 1 / tau.
        """
        age = torch.where(self.num_events > 0, clock - self.clock, 0)
        exponent = (-age.unsqueeze(-1).double() * decay_rate).clamp(max=LARGEST_EXPONENT)
        factor = torch.exp(exponent).to(self.n.dtype)
        return SummaryState(
            self.z * factor[:, None, :, None, None], self.n * factor, self.removed * factor, clock, self.num_events
        )

    def total(self) -> SummaryState:
        """The sum of N states of disjoint events that are all seen from one time (N = 1 in the result)."""
        return SummaryState(
            self.z.sum(0, keepdim=True),
            self.n.sum(0, keepdim=True),
            self.removed.sum(0, keepdim=True),
            self.clock[:1],
            self.num_events.sum(0, keepdim=True),
        )

    def needs_recomputation(self) -> Tensor:
        """bool [N]: whether, in some head, so much weight was removed that subtraction has lost too many digits."""
        total: Tensor = self.removed + self.n.clamp(min=0)
        return (self.removed > DRIFT_LIMIT * total).any(-1)


def merge_states(a: SummaryState, b: SummaryState, decay_rate: Tensor) -> SummaryState:
    """State of the union of disjoint events, seen from the later of the two times. With a reach r > 0 (convolution,
    gaps), the terms of `b` must have been computed with the r events before them."""
    clock = torch.where(
        a.num_events == 0, b.clock, torch.where(b.num_events == 0, a.clock, torch.maximum(a.clock, b.clock))
    )
    a, b = a.seen_from(clock, decay_rate), b.seen_from(clock, decay_rate)
    return SummaryState(a.z + b.z, a.n + b.n, a.removed + b.removed, clock, a.num_events + b.num_events)


def exchange(
    state: SummaryState, old: SummaryState, new: SummaryState, newest: Tensor, decay_rate: Tensor
) -> SummaryState:
    """Replace the terms of some events, to forget events or to insert late ones.

    Args:
        state: of the whole history.
        old: terms of the forgotten events and of the up to r events after them (late events: of the latter only).
        new: terms of those followers without the forgotten events (late events: with them, and of the late events).
        newest: int64 [N] time of the newest event afterwards, which the result is seen from (0 if none remains).
        decay_rate: float64 [H].
    """
    clock = torch.where(new.num_events > 0, torch.maximum(state.clock, new.clock), state.clock)
    state, old, new = (part.seen_from(clock, decay_rate) for part in (state, old, new))
    left = SummaryState(
        state.z - old.z + new.z,
        state.n - old.n + new.n,
        state.removed + old.n,
        clock,
        state.num_events - old.num_events + new.num_events,
    )
    gone = left.num_events == 0
    left = left.seen_from(torch.where(gone, left.clock, newest), decay_rate)
    # Filled rather than multiplied by 0: rounding may leave infinities behind.
    return SummaryState(
        left.z.masked_fill(gone[:, None, None, None, None], 0),
        left.n.masked_fill(gone[:, None], 0),
        left.removed.masked_fill(gone[:, None], 0),
        torch.where(gone, 0, left.clock),
        left.num_events,
    )


class SummarizerLayer(nn.Module):
    """One layer: key, value, query and gate projections, gated output and feed-forward.

    In separable mixing, events use only keys, values and the feed-forward block. Seeds use queries, gate, output and a
    feed-forward block of their own.
    """

    def __init__(self, config: Stage1Config, dropout: float) -> None:
        super().__init__()
        dim = config.dim
        self.num_heads = config.num_heads
        self.norm = norm(dim)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.query_gate = nn.Linear(dim, 2 * dim, bias=False)
        self.output = GatedOutput(dim, config.num_heads, dropout)
        self.feed_forward = FeedForward(dim, dropout)
        self.separable = config.mixing is Mixing.separable
        if self.separable:
            self.seed_norm = norm(dim)
            self.seed_feed_forward = FeedForward(dim, dropout)

    def heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class Summarizer(nn.Module):
    """Summaries of packed histories, at one or at many cuts."""

    def __init__(self, config: Stage1Config, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, config.dim))
        self.convolution = CausalConvolution(config.dim, config.conv_width) if config.conv_width > 1 else None
        self.layers = module_list([SummarizerLayer(config, dropout) for _ in range(config.num_layers)])
        self.final_norm = norm(config.dim)
        self.dropout = Dropout(dropout)
        self.register_buffer("decay_rate", _decay_rate(config), persistent=False)
        self.decay_rate: Tensor

    def tokens(self, event_vectors: Tensor, position: Tensor) -> Tensor:
        """Bottom of the stack: event embeddings [T, M] and their positions int64 [T] -> tokens [T, M]."""
        x: Tensor = self.dropout(event_vectors)
        if self.convolution is not None:
            x = self.convolution(x, position)
        return x

    def segment_states(self, tokens: Tensor, clock: Tensor, offsets: Tensor) -> SummaryState:
        """State of each packed segment alone (separable mixing), seen from its last event.

        Args:
            tokens: [T, M] from `tokens`.
            clock: int64 [T] milliseconds or positions.
            offsets: int64 [N+1] of the segments.
        """
        lengths = offsets.diff()
        reference = torch.where(lengths > 0, clock[(offsets[1:] - 1).clamp(min=0)], 0) if len(clock) else lengths * 0
        weight = None
        if self.config.decay is not Decay.none:
            weight = self.decay_weight(reference.repeat_interleave(lengths) - clock)
        x, states, n = tokens, [], None
        for index, layer in enumerate(self.layers):
            key, value = (layer.heads(part) for part in layer.key_value(layer.norm(x)).chunk(2, -1))
            z, n = self._accumulate(key, value, offsets, weight=weight)
            states.append(z)
            if index + 1 < len(self.layers):
                x = layer.feed_forward(x)
        assert n is not None
        return SummaryState(torch.stack(states, 1), n, torch.zeros_like(n), reference, lengths)

    def decay_weight(self, age: Tensor) -> Tensor:
        """Weights exp(-age / tau) of events: int64 [N] ages (differences taken in int64) -> float32 [N, H]."""
        return torch.exp(-(age.unsqueeze(-1).double() * self.decay_rate)).float()

    def prefix_states(self, segments: SummaryState, user_offsets: Tensor) -> SummaryState:
        """States of all events up to the end of each segment: segments [NS], user_offsets int64 [B+1] -> [NS]."""
        starts = user_offsets[:-1][user_offsets.diff() > 0]
        age = torch.zeros_like(segments.clock)
        age[1:] = segments.clock.diff()
        age[starts] = 0
        log_decay = -(age.unsqueeze(-1).double() * self.decay_rate).float()
        # One scan for all layers: it costs a few operators per segment, however wide states are.
        layers, heads = self.config.num_layers, self.config.num_heads
        z, n = scan_states(
            segments.z.flatten(1, 2), segments.n.repeat(1, layers), log_decay.repeat(1, layers), user_offsets
        )
        total = segments.num_events.cumsum(0)
        before = (total - segments.num_events)[starts]
        num_events = total - before.repeat_interleave(user_offsets.diff()[user_offsets.diff() > 0])
        return SummaryState(
            z.view_as(segments.z), n[:, :heads], torch.zeros_like(n[:, :heads]), segments.clock, num_events
        )

    def read_at(self, states: SummaryState, index: Tensor) -> Tensor:
        """Summaries [NC, S, M] of the states at int64 [NC] indices; -1 is the empty history."""
        empty = self.empty_state(1)
        row = torch.where(index < 0, len(states.n), index)
        return self.read(torch.cat([states.z, empty.z])[row], torch.cat([states.n, empty.n])[row])

    def empty_state(self, count: int) -> SummaryState:
        """The state of `count` empty histories: zeros."""
        H, D = self.config.num_heads, self.config.dim // self.config.num_heads
        return SummaryState.empty(count, self.config.num_layers, H, D, device=self.seeds.device)

    def read(self, z: Tensor, n: Tensor) -> Tensor:
        """Summaries [N, S, M] that the seeds read from states (separable mixing), z [N, L, H, D, D] and n [N, H]."""
        count, num_seeds = len(n), len(self.seeds)
        offsets = torch.arange(count + 1, device=n.device) * num_seeds
        x = self.seeds.repeat(count, 1)
        for index, layer in enumerate(self.layers):
            query, gate = layer.query_gate(layer.seed_norm(x)).chunk(2, -1)
            heads = self._read(layer.heads(query), z[:, index].contiguous(), n, offsets)
            x = layer.seed_feed_forward(layer.output(x, heads, gate))
        summary: Tensor = self.final_norm(x)
        return summary.view(count, num_seeds, self.config.dim)

    def of_nothing(self) -> Tensor:
        """Summary [1, S, M] of an empty history."""
        if self.config.mixing is Mixing.separable:
            state = self.empty_state(1)
            return self.read(state.z, state.n)
        nothing = self.seeds.new_empty(0, self.config.dim)
        return self.summarize_set(nothing, torch.zeros(2, dtype=torch.int64, device=self.seeds.device))

    def summarize_set(self, tokens: Tensor, offsets: Tensor) -> Tensor:
        """Bidirectional mixing: packed tokens [T, M] with offsets int64 [B+1] -> summaries [B, S, M]."""
        count, num_seeds = len(offsets) - 1, len(self.seeds)
        seed_offsets = torch.arange(count + 1, device=offsets.device) * num_seeds
        all_offsets = offsets + seed_offsets
        # Each history is followed by its seeds.
        event_slot = torch.arange(len(tokens), device=offsets.device)
        event_slot = event_slot + seed_offsets[:-1].repeat_interleave(offsets.diff())
        seed_slot = (all_offsets[1:, None] - num_seeds + torch.arange(num_seeds, device=offsets.device)).flatten()
        x = tokens.new_empty(int(all_offsets[-1]), tokens.shape[-1])
        x = x.index_copy(0, event_slot, tokens).index_copy(0, seed_slot, self.seeds.repeat(count, 1).to(tokens.dtype))
        for index, layer in enumerate(self.layers):
            h = layer.norm(x)
            key, value = (layer.heads(part) for part in layer.key_value(h).chunk(2, -1))
            if index + 1 < len(self.layers):
                query, gate = layer.query_gate(h).chunk(2, -1)
                heads = quasi_linear_attention(
                    layer.heads(query),
                    key,
                    value,
                    all_offsets,
                    normalization=self.config.normalization,
                    activation=PHI,
                    state_activation=PHI,
                )
            else:
                # Nothing reads the events' tokens of the last layer, so only seeds are computed.
                x, h = x[seed_slot], h[seed_slot]
                query, gate = layer.query_gate(h).chunk(2, -1)
                heads = self._read(layer.heads(query), *self._accumulate(key, value, all_offsets), seed_offsets)
            x = layer.feed_forward(layer.output(x, heads, gate))
        summary: Tensor = self.final_norm(x)
        return summary.view(count, num_seeds, self.config.dim)

    @torch.no_grad()
    def summarize_long(self, tokens: Tensor, slice_len: int) -> Tensor:
        """`summarize_set` of one history, slice by slice, without gradients and with little memory.

        Args:
            tokens: [T, M], overwritten layer by layer; nothing else grows with T.
            slice_len: tokens that are processed at once.

        Returns:
            [1, S, M].
        """
        slices = [tokens[start : start + slice_len] for start in range(0, len(tokens), slice_len)]
        seeds: Tensor = self.seeds
        for index, layer in enumerate(self.layers):
            z = n = None
            for x in (*slices, seeds):
                key, value = (layer.heads(part) for part in layer.key_value(layer.norm(x)).chunk(2, -1))
                z, n = self._accumulate(key, value, torch.tensor([0, len(x)]), initial_z=z, initial_n=n)
            assert z is not None and n is not None
            if index + 1 < len(self.layers):
                for x in slices:
                    x.copy_(self._mixed(layer, x, z, n))
            seeds = self._mixed(layer, seeds, z, n)
        summary: Tensor = self.final_norm(seeds)
        return summary.unsqueeze(0)

    def _mixed(self, layer: SummarizerLayer, x: Tensor, z: Tensor, n: Tensor) -> Tensor:
        """Tokens x [N, M] of one history after a bidirectional layer whose state is z [1, H, D, D], n [1, H]."""
        query, gate = layer.query_gate(layer.norm(x)).chunk(2, -1)
        heads = self._read(layer.heads(query), z, n, torch.tensor([0, len(x)]))
        mixed: Tensor = layer.feed_forward(layer.output(x, heads, gate))
        return mixed

    def _accumulate(
        self,
        key: Tensor,
        value: Tensor,
        offsets: Tensor,
        *,
        weight: Tensor | None = None,
        initial_z: Tensor | None = None,
        initial_n: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        return accumulate_state(
            key, value, offsets, weight=weight, initial_z=initial_z, initial_n=initial_n, activation=PHI
        )

    def _read(self, query: Tensor, z: Tensor, n: Tensor, offsets: Tensor) -> Tensor:
        return read_state(
            query, z, n, offsets, normalization=self.config.normalization, activation=PHI, state_activation=PHI
        )


def _decay_rate(config: Stage1Config) -> Tensor:
    """float64 [H]: 1 / tau in 1/ms or 1/events; 0 for a head without decay."""
    if config.decay is Decay.none:
        return torch.zeros(config.num_heads, dtype=torch.float64)
    unit = DAY_MS if config.decay is Decay.time else 1.0
    return torch.tensor([0.0 if tau == 0 else 1.0 / (tau * unit) for tau in config.decay_horizons], dtype=torch.float64)
