"""Reconstruction of a history from its summary (VISTA, generative reconstruction loss).

A causal decoder without softmax reads the K summary tokens, a start token that carries the age of the window, and the
window's events u_1 .. u_{m-1}. Its outputs are trained to match u_1 .. u_m, or to rank their items first. Letters: NR
windows, S seeds, M model dim, T packed events of windows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.config import ModelConfig
from vista.model.layers import FeedForward, GatedOutput, module_list, norm, split_heads
from vista_kernels import causal_linear_attention

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
        self.feed_forward = FeedForward(config.dim, config.feed_forward_ratio, 0.0)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        *qkv, gate = self.projections(self.norm(x)).chunk(4, -1)
        query, key, value = (split_heads(part, self.num_heads) for part in qkv)
        heads, _ = causal_linear_attention(query, key, value, offsets)
        mixed: Tensor = self.feed_forward(self.output(x, heads, gate))
        return mixed


class ReconstructionDecoder(nn.Module):
    """Predicts the events of a window from a summary and the window's earlier events."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_seeds = config.num_seeds
        self.summary_projection = nn.Linear(config.dim, config.dim, bias=False)
        self.start = nn.Embedding(NUM_AGES, config.dim)
        self.layers = module_list([ReconstructionLayer(config) for _ in range(config.num_reconstruction_layers)])
        self.final = nn.Sequential(norm(config.dim), nn.Linear(config.dim, config.dim, bias=False))

    def forward(self, summary: Tensor, event_vectors: Tensor, offsets: Tensor, age: Tensor) -> Tensor:
        """Teacher-forced predictions.

        Args:
            summary: [NR, S, M]. Rows of a state may follow, which are not read.
            event_vectors: [T, M] embeddings of the windows' events, packed, oldest first.
            offsets: int64 [NR+1]; no window may be empty.
            age: int64 [NR] events from the window's first event to the summary's cut.

        Returns:
            [T, M]: the prediction of each event from the summary and the window's events before it.
        """
        summary = summary[:, : self.num_seeds]
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
