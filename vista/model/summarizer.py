"""Stage 1: a user's history into K summary tokens (VISTA, section on UIH summarization; docs/explanation/design.md).

Letters: T packed events, B histories, NC cuts, S seeds, L layers, H heads, D head dim, M model dim.

`separable` mixing: only events write and only seeds read. An event's token at layer l+1 depends only on its token at
layer l, so every layer's state is a sum over events, computed in one pass.
`bidirectional` mixing (the paper): events and seeds are one set. All write and all read at every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.config.choices import Decay, Mixing
from vista.log.histories import DAY_MS
from vista.model.interest_counts import InterestCounts
from vista.model.layers import CausalConvolution, Dropout, FeedForward, GatedOutput, module_list, norm, split_heads
from vista.model.mean_token import MeanToken
from vista.model.quasi_linear_read import state_rows
from vista.model.summary_state import SummaryState
from vista_kernels import accumulate_state, quasi_linear_attention, read_state, scan_states


class SummarizerLayer(nn.Module):
    """One layer: key, value, query and gate projections, gated output and feed-forward.

    In separable mixing, events use only keys, values and the feed-forward block. Seeds use queries, gate, output and a
    feed-forward block of their own.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        dim, ratio, dropout = config.dim, config.feed_forward_ratio, config.dropout
        self.num_heads = config.num_heads
        self.norm = norm(dim)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.query_gate = nn.Linear(dim, 2 * dim, bias=False)
        self.output = GatedOutput(dim, config.num_heads, dropout)
        self.feed_forward = FeedForward(dim, ratio, dropout)
        self.separable = config.mixing is Mixing.separable
        if self.separable:
            self.seed_norm = norm(dim)
            self.seed_feed_forward = FeedForward(dim, ratio, dropout)

    def heads(self, x: Tensor) -> Tensor:
        return split_heads(x, self.num_heads)


class Summarizer(nn.Module):
    """Summaries of packed histories, at one or at many cuts."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # With interests, seeds start small, so that the counts that are added to them matter from the start.
        self.seeds = nn.Parameter(torch.randn(config.num_seeds, config.dim) * (0.1 if config.num_interests else 1.0))
        self.convolution = CausalConvolution(config.dim, config.conv_width) if config.conv_width > 1 else None
        self.layers = module_list([SummarizerLayer(config) for _ in range(config.num_layers)])
        self.final_norm = norm(config.dim)
        self.mean = MeanToken(self.layers[0].key_value, config) if config.mean_token else None
        """Makes the first token; None if a seed reads it, as the others."""
        self.interests = InterestCounts(config) if config.num_interests else None
        """What the seeds start from besides parameters; None if from nothing."""
        self.dropout = Dropout(config.dropout)
        self.register_buffer("decay_rate", _decay_rate(config), persistent=False)
        self.decay_rate: Tensor

    def tokens(self, event_vectors: Tensor, position: Tensor) -> Tensor:
        """Bottom of the stack: event embeddings [T, M] and their positions int64 [T] -> tokens [T, M]."""
        x: Tensor = self.dropout(event_vectors)
        if self.convolution is not None:
            x = self.convolution(x, position)
        return x

    def segment_states(
        self, tokens: Tensor, clock: Tensor, offsets: Tensor, interest: Tensor | None = None
    ) -> SummaryState:
        """State of each packed segment alone (separable mixing), seen from its last event.

        Args:
            tokens: [T, M] from `tokens`.
            clock: int64 [T] milliseconds or positions.
            offsets: int64 [N+1] of the segments.
            interest: int64 [T] of the events' items, 0 for none; only for a model that counts interests.
        """
        lengths = offsets.diff()
        reference = torch.where(lengths > 0, clock[(offsets[1:] - 1).clamp(min=0)], 0) if len(clock) else lengths * 0
        weight = None
        if self.config.decay is not Decay.none:
            weight = self.decay_weight(reference.repeat_interleave(lengths) - clock)
        x, states, n = tokens, [], None
        for index, layer in enumerate(self.layers):
            key, value = (layer.heads(part) for part in layer.key_value(layer.norm(x)).chunk(2, -1))
            if index == 0 and self.mean is not None:
                key = self.mean.keys(key)
            z, n = self._accumulate(key, value, offsets, weight=weight)
            states.append(z)
            if index + 1 < len(self.layers):
                x = layer.feed_forward(x)
        if self.interests is not None:
            assert interest is not None
            key, value = self.interests.keys_values(interest, tokens.dtype)
            states.append(accumulate_state(key, value, offsets, weight=weight, activation="identity")[0])
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
        layers, n = [], segments.n
        for index in range(self.config.num_state_layers):
            z, n = scan_states(segments.z[:, index].contiguous(), segments.n, log_decay, user_offsets)
            layers.append(z)
        total = segments.num_events.cumsum(0)
        before = (total - segments.num_events)[starts]
        num_events = total - before.repeat_interleave(user_offsets.diff()[user_offsets.diff() > 0])
        return SummaryState(torch.stack(layers, 1), n, torch.zeros_like(n), segments.clock, num_events)

    def read_at(self, states: SummaryState, index: Tensor) -> Tensor:
        """Summaries [NC, S, M] of the states at int64 [NC] indices; -1 is the empty history."""
        empty = self.empty_state(1)
        row = torch.where(index < 0, len(states.n), index)
        return self.read(torch.cat([states.z, empty.z])[row], torch.cat([states.n, empty.n])[row])

    def empty_state(self, count: int) -> SummaryState:
        """The state of `count` empty histories: zeros."""
        H, D = self.config.num_heads, self.config.dim // self.config.num_heads
        return SummaryState.empty(count, self.config.num_state_layers, H, D, device=self.seeds.device)

    def read(self, z: Tensor, n: Tensor) -> Tensor:
        """Summaries [N, S, M] that the seeds read from states (separable mixing), z [N, L, H, D, D] and n [N, H].

        With target_attention=quasi_linear, the rows of the state follow: [N, S + L * D, M].
        """
        count, num_seeds = len(n), len(self.seeds)
        offsets = torch.arange(count + 1, device=n.device) * num_seeds
        x = self.seeds.repeat(count, 1)
        if self.interests is not None:
            x = x + self.interests(z[:, len(self.layers)], n[:, 0]).flatten(0, 1)
        for index, layer in enumerate(self.layers):
            query, gate = layer.query_gate(layer.seed_norm(x)).chunk(2, -1)
            heads = self._read(layer.heads(query), z[:, index].contiguous(), n, offsets)
            x = layer.seed_feed_forward(layer.output(x, heads, gate))
        summary: Tensor = self.final_norm(x).view(count, num_seeds, self.config.dim)
        if self.mean is not None:
            summary = torch.cat([self.final_norm(self.mean(z[:, 0], n)).unsqueeze(1), summary[:, 1:]], 1)
        if self.config.num_state_rows:
            summary = torch.cat([summary, state_rows(self.config, z[:, : len(self.layers)], n)], 1)
        return summary

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
                    normalization=self.config.normalization.value,
                    alpha=self.config.normalization_alpha,
                    activation=self.config.activation.value,
                    state_activation=self.config.activation.value,
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
        phi = self.config.activation.value
        return accumulate_state(
            key, value, offsets, weight=weight, initial_z=initial_z, initial_n=initial_n, activation=phi
        )

    def _read(self, query: Tensor, z: Tensor, n: Tensor, offsets: Tensor) -> Tensor:
        return read_state(
            query,
            z,
            n,
            offsets,
            normalization=self.config.normalization.value,
            alpha=self.config.normalization_alpha,
            activation=self.config.activation.value,
            state_activation=self.config.activation.value,
        )


def _decay_rate(config: ModelConfig) -> Tensor:
    """float64 [H]: 1 / tau in 1/ms or 1/events; 0 for a head without decay."""
    if config.decay is Decay.none:
        return torch.zeros(config.num_heads, dtype=torch.float64)
    unit = DAY_MS if config.decay is Decay.time else 1.0
    return torch.tensor([0.0 if tau == 0 else 1.0 / (tau * unit) for tau in config.decay_horizons], dtype=torch.float64)
