"""What baselines share: they read the raw history at every request, and keep nothing between requests.

Letters: B users, N impressions, C candidates, M model dim, M' width of retrieval vectors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vista.arrays import Int
from vista.errors import ConfigError
from vista.examples.batch import Batch
from vista.log.histories import NUM_GAPS, UNKNOWN_GAP, Histories, gap_bucket
from vista.model.features import EncodedRows
from vista.model.inference import request_rows
from vista.model.ranking_model import RankingModel

# Padded tiles of packed histories of similar length, which are processed at once.
#
# Letters: n histories of a tile, L events, C entries (such as candidates) per history.

TILE_TOKENS = 2048
"""Most tokens in a tile (a longer history is a tile of its own), so that a tile stays in the cache."""


@dataclass(frozen=True, slots=True)
class PaddedTile:
    """Histories of similar length."""

    rows: Tensor
    """int64 [n] histories."""
    index: Tensor
    """int64 [n, L] packed events."""
    valid: Tensor
    """bool [n, L]: False after a history's last event."""

    def entries(self, owner: Tensor) -> tuple[Tensor, Tensor] | None:
        """The entries of each of the tile's histories, padded; None if there are none.

        Args:
            owner: int64 [N] history of each entry, sorted.

        Returns:
            (int64 [n, C] indices into `owner`, bool [n, C]: False in the padding).
        """
        first = torch.searchsorted(owner, self.rows)
        count = torch.searchsorted(owner, self.rows, right=True) - first
        width = int(count.max())
        if width == 0:
            return None
        steps = torch.arange(width, device=owner.device)
        valid = steps < count[:, None]
        return torch.where(valid, first[:, None] + steps, 0), valid


def tiles(offsets: Int, device: torch.device, max_tokens: int = TILE_TOKENS) -> Iterator[PaddedTile]:
    """Tiles that cover all histories. Those without events come in tiles [n, 0].

    Args:
        offsets: int64 [B+1] of packed histories.
        max_tokens: most tokens in a tile; a longer history is a tile of its own.
    """
    lengths = np.diff(offsets)
    order = np.argsort(lengths, kind="stable")
    first = 0
    while first < len(order):
        longest = lengths[order[first:]]
        fits = longest * np.arange(1, len(longest) + 1) <= max_tokens
        last = first + max(1, len(fits) if fits.all() else int(np.argmin(fits)))
        rows = order[first:last]
        steps = np.arange(int(lengths[rows].max()))
        index = offsets[rows][:, None] + np.minimum(steps, lengths[rows][:, None] - 1)
        valid = steps < lengths[rows][:, None]
        yield PaddedTile(*(torch.from_numpy(x).to(device) for x in (rows, np.where(valid, index, 0), valid)))
        first = last


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
            "next items, such as model.kind=sasrec"
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
        return self.encoder.gap_vectors(self._request_bucket(histories, now))

    def _request_bucket(self, histories: Histories, now: Int | None) -> Tensor:
        """int64 [B]."""
        bucket = np.full(histories.num_users, UNKNOWN_GAP, np.int64)
        if now is not None and histories.num_events:
            last = np.asarray(histories.timestamp)[np.maximum(histories.offsets[1:] - 1, 0)]
            bucket = np.where(histories.lengths > 0, gap_bucket(now - last), UNKNOWN_GAP)
        return self._tensor(bucket)

    def vectors_of_requests(self, histories: Histories, now: Int | None, features: EncodedRows | None) -> Tensor | None:
        """[B, 1, M] or [B, C, M] vectors of requests, which are added to their candidates; None if the model reads
        nothing of them.

        Arguments are those of `candidate_logits`.
        """
        rows = request_rows(self, features, histories.num_users)
        return self.request_vectors(self._request_bucket(histories, now)[:, None], rows)

    def vectors_of_users(self, batch: Batch) -> Tensor | None:
        """[B, M] features of the users of a batch's chunks, which are added to every token; None without them."""
        if self.user_encoder is None:
            return None
        assert batch.user_features is not None
        vectors: Tensor = self.user_encoder(batch.user_features)
        return vectors

    def _tensor(self, values: NDArray[np.generic]) -> Tensor:
        return torch.from_numpy(np.require(values, requirements=["C", "W"])).to(self.device)


def time_bucket(gap_ms: Tensor) -> Tensor:
    """`vista.log.histories.gap_bucket` of int64 tensors."""
    seconds = gap_ms.clamp(min=0).to(torch.float64) / 1000
    return (1 + torch.log2(1 + seconds)).long().clamp(max=NUM_GAPS - 1)


# The labeled impressions of a batch as one list of candidates.
#
# Letters: N candidates, NW windows, I impressions per window.


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
    features: EncodedRows | None
    """[N] of the requests; None without them."""

    @classmethod
    def of(cls, batch: Batch) -> ShownCandidates:
        """All labeled impressions of a batch."""
        impressions = batch.impressions
        place = impressions.mask.any(-1).flatten().nonzero().squeeze(-1)
        window = place // max(impressions.item.shape[1], 1)
        chunk, seen = seen_in_chunk(batch, window, impressions.position.flatten()[place])
        rows = impressions.features
        features = None if rows is None else rows.reshape(-1).select(place)
        return cls(impressions.item.flatten()[place], impressions.gap.flatten()[place], chunk, seen, place, features)


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
