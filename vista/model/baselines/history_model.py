"""What baselines share: they read the raw history at every request, and keep nothing of it between two.

Letters: B users, N impressions, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config import OptimConfig
from vista.errors import ConfigError
from vista.examples.batch import Batch
from vista.log.gaps import NUM_GAPS, UNKNOWN_GAP, gap_bucket
from vista.log.histories import Histories
from vista.model.losses import Losses, sampled_softmax, task_losses
from vista.model.ranking_model import RankingModel

Int = NDArray[np.int64]


class HistoryModel(RankingModel):
    """A baseline: asked with histories instead of summaries."""

    def user_vectors(self, histories: Histories, now: Int | None) -> Tensor:
        """Unit vectors [B, M] of the retrieval head.

        Args:
            histories: items as model rows (`item_rows`).
            now: int64 [B] ms of the requests; None where unknown.

        Raises:
            ConfigError: of an architecture that ranks candidates only.
        """
        name = self.config.architecture.value
        raise ConfigError(f"model.architecture={name}: ranks candidates only, and has no user vectors")

    def candidate_logits(self, histories: Histories, candidates: Tensor, now: Int | None) -> Tensor:
        """Task logits [B, C, num_tasks] of candidates int64 [B, C] (model rows)."""
        raise NotImplementedError

    def request_gap(self, histories: Histories, now: Int | None) -> Tensor | None:
        """[B, M] embeddings of the time from each history's newest event to the request, as `losses` trains them."""
        if self.encoder.gap is None:
            return None
        bucket = np.full(histories.num_users, UNKNOWN_GAP, np.int64)
        if now is not None and histories.num_events:
            last = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
            bucket = np.where(histories.lengths > 0, gap_bucket(now - last), UNKNOWN_GAP)
        return self.encoder.gap_vectors(self._tensor(bucket))

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)


@dataclass(frozen=True, slots=True)
class ShownCandidates:
    """Labelled impressions [N] of a batch, sorted by chunk; all int64."""

    item: Tensor
    """Rows of `batch.rows`."""
    gap: Tensor
    """Buckets of the time from the newest event seen to the request."""
    chunk: Tensor
    seen: Tensor
    """Events of the chunk that came before the request."""
    place: Tensor
    """Flat index into the batch's [NW, I]."""

    @classmethod
    def of(cls, batch: Batch) -> ShownCandidates:
        impressions, tail_index = batch.impressions, batch.windows.tail_index
        place = impressions.mask.any(-1).flatten().nonzero().squeeze(-1)
        window = place // max(impressions.item.shape[1], 1)
        chunk_start = batch.cuts.start[batch.windows.cut[window]]
        # The tail's last W columns are the events before each position of its window.
        column = tail_index.shape[1] - batch.labels.item.shape[1] + impressions.position.flatten()[place]
        last = tail_index[window, column]
        seen = torch.where(last >= 0, last + 1 - chunk_start, 0)
        # Chunks without events share a start; which of them it is does not matter, but at the end there must be one.
        chunk = torch.searchsorted(batch.events.offsets, chunk_start, right=True) - 1
        chunk = chunk.clamp(max=len(batch.events.offsets) - 2)
        return cls(impressions.item.flatten()[place], impressions.gap.flatten()[place], chunk, seen, place)


def in_place(logits: Tensor, place: Tensor, batch: Batch) -> Tensor:
    """Logits [N, num_tasks] at their flat places int64 [N] of the batch's [NW, I, num_tasks]; 0 elsewhere."""
    flat = logits.new_zeros(batch.impressions.item.numel(), logits.shape[1]).index_copy(0, place, logits)
    return flat.view(*batch.impressions.item.shape, -1)


def time_bucket(gap_ms: Tensor) -> Tensor:
    """`vista.log.gaps.gap_bucket` of int64 tensors."""
    seconds = gap_ms.clamp(min=0).to(torch.float64) / 1000
    return (1 + torch.log2(1 + seconds)).long().clamp(max=NUM_GAPS - 1)


def weighted_losses(
    model: RankingModel, batch: Batch, optim: OptimConfig, next_loss: Tensor | None, logits: Tensor | None
) -> Losses:
    """Total and parts of what a baseline trains: the next item, and the labels of impressions [NW, I, num_tasks]."""
    parts: dict[str, Tensor] = {}
    total = model.item_table.new_zeros((), dtype=torch.float32)
    if next_loss is not None:
        parts["next"] = next_loss
        total = total + optim.next_weight * next_loss
    if logits is not None:
        losses = task_losses(logits, batch.impressions.label, batch.impressions.mask)
        parts.update(zip(model.schema.tasks, losses, strict=True))
        total = total + optim.task_weight * losses.sum()
    return Losses(total, parts)


def next_loss(batch: Batch, item_vectors: Tensor, users: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Sampled softmax of unit user vectors [N, M] for their labels int64 [N], as VISTA's."""
    unit = torch.nn.functional.normalize(item_vectors, dim=-1)
    return sampled_softmax(
        users, unit, label, batch.negatives.item, batch.negatives.log_weight, temperature, batch.logit_adjustment
    )
