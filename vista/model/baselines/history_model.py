"""What baselines share: they read the raw history at every request, and keep nothing between requests.

Letters: B users, N impressions, C candidates, M model dim, M' width of retrieval vectors.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.errors import ConfigError
from vista.examples.batch import Batch
from vista.log.histories import NUM_GAPS, UNKNOWN_GAP, Histories, gap_bucket
from vista.model.baselines.padded_tiles import TILE_TOKENS
from vista.model.inference import request_feature_vectors
from vista.model.ranking_model import RankingModel
from vista.model.row_feature_reader import EncodedRows


class HistoryModel(RankingModel):
    """A baseline, whose requests bring histories instead of summaries."""

    tile_tokens: int = TILE_TOKENS
    """Most tokens in a tile of histories that are encoded or searched at once."""

    def user_vectors(self, histories: Histories, now: Int | None, users: EncodedRows | None = None) -> Tensor:
        """User vectors [B, M'] of the retrieval head (`RankingModel.retrieval_users`).

        Args:
            histories: items as model rows (`item_rows`).
            now: int64 [B] ms of the requests; None if unknown.
            users: features of the B users; None if all are missing.

        Raises:
            ConfigError: if the architecture only ranks candidates.
        """
        name = self.config.architecture.value
        raise ConfigError(
            f"model.architecture={name}: only ranks candidates, without user vectors; train an architecture that ranks "
            "next items, such as model=sasrec"
        )

    def candidate_logits(
        self,
        histories: Histories,
        candidates: Tensor,
        now: Int | None,
        codes: Tensor | None = None,
        features: EncodedRows | None = None,
        users: EncodedRows | None = None,
    ) -> Tensor:
        """Task logits [B, C, num_tasks] of candidates int64 [B, C] (model rows).

        Args:
            histories: as in `user_vectors`, like `now` and `users`.
            codes: uint8 [B, C, G * F + 1] the users' counters of the candidates (`UserCounters.of_pairs`);
                None without counters.
            features: rows [B] of the requests, or [B, C] of their candidates; None if all are missing.
        """
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

    def vectors_of_requests(self, histories: Histories, now: Int | None, features: EncodedRows | None) -> Tensor | None:
        """[B, 1, M] or [B, C, M] vectors of requests, which are added to their candidates; None if the model reads
        nothing of them.

        Arguments are those of `candidate_logits`.
        """
        gap = self.request_gap(histories, now)
        gap = None if gap is None else gap[:, None]
        of_features = request_feature_vectors(self, features, histories.num_users)
        if of_features is None:
            return gap
        of_features = of_features[:, None] if of_features.dim() == 2 else of_features
        return of_features if gap is None else gap + of_features

    def vectors_of_users(self, batch: Batch) -> Tensor | None:
        """[B, M] features of the users of a batch's chunks, which are added to every token; None without them."""
        if self.user_encoder is None:
            return None
        assert batch.user_features is not None
        vectors: Tensor = self.user_encoder(batch.user_features.entry, batch.user_features.dense)
        return vectors

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)


def time_bucket(gap_ms: Tensor) -> Tensor:
    """`vista.log.histories.gap_bucket` of int64 tensors."""
    seconds = gap_ms.clamp(min=0).to(torch.float64) / 1000
    return (1 + torch.log2(1 + seconds)).long().clamp(max=NUM_GAPS - 1)
