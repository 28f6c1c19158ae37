"""The labeled impressions of a batch as one list of candidates.

Letters: N candidates, NW windows, I impressions per window, C columns and D dense inputs of features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vista.examples.batch import Batch


@dataclass(frozen=True, slots=True)
class ShownCandidates:
    """Impressions with at least one known label, sorted by chunk; int64 [N] each."""

    item: Tensor
    """Indices into `batch.rows`."""
    gap: Tensor
    """Log buckets of the time from the newest visible event to the request."""
    chunk: Tensor
    seen: Tensor
    """Events of the chunk before the request."""
    place: Tensor
    """Flat index into the batch's [NW, I]."""
    entry: Tensor | None
    """[N, C] features of the requests, like `dense`, float32 [N, D]; None without them."""
    dense: Tensor | None

    @classmethod
    def of(cls, batch: Batch) -> ShownCandidates:
        """All labeled impressions of a batch."""
        impressions = batch.impressions
        place = impressions.mask.any(-1).flatten().nonzero().squeeze(-1)
        window = place // max(impressions.item.shape[1], 1)
        chunk, seen = seen_in_chunk(batch, window, impressions.position.flatten()[place])
        features = (
            None if part is None else part.flatten(0, 1)[place] for part in (impressions.entry, impressions.dense)
        )
        return cls(impressions.item.flatten()[place], impressions.gap.flatten()[place], chunk, seen, place, *features)


def seen_in_chunk(batch: Batch, window: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks int64 [N], and how many of their events requests see, at positions int64 [N] of windows int64 [N]."""
    tail_index = batch.windows.tail_index
    chunk_start = batch.cuts.start[batch.windows.cut[window]]
    # The tail's last W columns are the events before each position of its window.
    last = tail_index[window, tail_index.shape[1] - batch.labels.item.shape[1] + position]
    seen = torch.where(last >= 0, last + 1 - chunk_start, 0)
    return batch.windows.chunk[window], seen


def in_place(logits: Tensor, place: Tensor, batch: Batch) -> Tensor:
    """Logits [N, num_tasks] at their flat places int64 [N] of the batch's [NW, I, num_tasks]; 0 elsewhere."""
    flat = logits.new_zeros(batch.impressions.item.numel(), logits.shape[1]).index_copy(0, place, logits)
    return flat.view(*batch.impressions.item.shape, -1)
