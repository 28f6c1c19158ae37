"""What rivals share: they read the raw history at every request, and keep nothing of it between two.

Letters: B users, T packed events, C candidates, M model dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.config import OptimConfig
from vista.data.cuts import Batch
from vista.data.gaps import UNKNOWN_GAP, gap_bucket, history_gaps
from vista.data.histories import Histories
from vista.model.inference import newest
from vista.model.losses import sampled_softmax, task_losses
from vista.model.ranking_model import Losses, RankingModel

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Events:
    """Embedded histories: vectors [T, M]; time int64 [T] ms (or ordinals); offsets int64 [B+1], on the host."""

    vectors: Tensor
    time: Tensor
    offsets: Int


class HistoryModel(RankingModel):
    """A rival: asked with histories instead of summaries."""

    def user_vectors(self, histories: Histories, now: Int | None) -> Tensor:
        """Unit vectors [B, M] of the retrieval head.

        Args:
            histories: items as model rows (`item_rows`).
            now: int64 [B] ms of the requests; None where unknown.
        """
        raise NotImplementedError

    def candidate_logits(self, histories: Histories, candidates: Tensor, now: Int | None) -> Tensor:
        """Task logits [B, C, num_tasks] of candidates int64 [B, C] (model rows)."""
        raise NotImplementedError

    def embed(self, histories: Histories) -> Events:
        """The newest `history_limit` events of each history."""
        histories = newest(histories, self.config.history_limit)
        time = np.asarray(histories.timestamp)
        gap = history_gaps(time, histories.offsets) if self.encoder.gap is not None else np.zeros(len(time), np.int64)
        rating = None if histories.rating is None else self._tensor(histories.rating)
        vectors = self.item_vectors(self._tensor(histories.item).long())
        vectors = self.encoder(vectors, self._tensor(histories.action).long(), self._tensor(gap), rating)
        return Events(vectors, self._tensor(time), histories.offsets)

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


def weighted_losses(
    model: RankingModel, batch: Batch, optim: OptimConfig, next_loss: Tensor | None, logits: Tensor | None
) -> Losses:
    """Total and parts of what a rival trains: the next item, and the labels of impressions [NW, I, num_tasks]."""
    parts: dict[str, Tensor] = {}
    total = model.item_table.new_zeros((), dtype=torch.float32)
    if next_loss is not None:
        parts["next"] = next_loss
        total = total + optim.next_weight * next_loss
    if logits is not None:
        losses = task_losses(logits, batch.candidate_label, batch.candidate_mask)
        parts.update(zip(model.schema.tasks, losses, strict=True))
        total = total + optim.task_weight * losses.sum()
    return Losses(total, parts)


def next_loss(batch: Batch, item_vectors: Tensor, users: Tensor, label: Tensor, temperature: float) -> Tensor:
    """Sampled softmax of unit user vectors [N, M] for their labels int64 [N], as VISTA's."""
    unit = torch.nn.functional.normalize(item_vectors, dim=-1)
    return sampled_softmax(
        users, unit, label, batch.negatives, batch.negative_log_weight, temperature, batch.logit_adjustment
    )
