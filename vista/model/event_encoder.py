"""Embeddings of events: item, action, gap to the event before, rating, features.

Letters: T packed events, M model dim, R item rows of a batch, C columns and D dense inputs of features.

Every function takes item vectors as an argument instead of reading the table. The model gathers the rows of a batch
once, for events, labels and negatives alike, so the cost of a step depends on these rows and not on the table's size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vista.log.histories import NUM_GAPS
from vista.model.embedding_feature import EmbeddingFeature
from vista.model.feature_spec import FeatureSpec
from vista.model.row_feature_encoder import RowFeatureEncoder
from vista.model.unified_embedding import HashedEmbedding


class EventEncoder(nn.Module):
    """Sum of the embeddings of an event's fields. Fields that the log lacks are left out.

    Actions and gaps have tables of their own, or read `shared`, the table [1 + N, M / P] of all features.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_actions: int,
        use_action: bool,
        use_time: bool,
        rating_range: tuple[float, float] | None,
        features: Sequence[FeatureSpec] = (),
        shared: nn.Parameter | None = None,
        shared_rows: int = 0,
    ) -> None:
        """
        Args:
            shared_rows: N of the table `shared`, of which a sharded one has only a part here.
        """
        super().__init__()

        def embedding(feature: EmbeddingFeature, num_values: int) -> nn.Embedding | HashedEmbedding:
            if shared is None:
                return nn.Embedding(num_values, dim)
            return HashedEmbedding(shared, feature, num_values, dim // shared.shape[1], shared_rows)

        self.action = embedding(EmbeddingFeature.action, num_actions) if use_action and num_actions > 1 else None
        self.gap = embedding(EmbeddingFeature.gap, NUM_GAPS) if use_time else None
        self.rating = nn.Parameter(torch.zeros(dim)) if rating_range is not None else None
        self.rating_range = rating_range
        self.features = RowFeatureEncoder(features, dim) if features else None
        for table in (self.action, self.gap):
            if isinstance(table, nn.Embedding):
                nn.init.normal_(table.weight, std=0.02)
        if self.rating is not None:
            nn.init.normal_(self.rating, std=0.02)

    def forward(
        self,
        item_vectors: Tensor,
        action: Tensor,
        gap: Tensor | None,
        rating: Tensor | None = None,
        entry: Tensor | None = None,
        dense: Tensor | None = None,
    ) -> Tensor:
        """Embed events.

        Args:
            item_vectors: [..., M] vectors of the events' items.
            action: int64 [...].
            gap: int64 [...] buckets of `gap_bucket`; None leaves times out.
            rating: float32 [...], NaN if an event has none; None leaves ratings out.
            entry: int64 [..., C] of `RowFeatureReader.encode`, of all columns or the first ones; None leaves features
                out.
            dense: float32 [..., D], like `entry`.

        Returns:
            [..., M].
        """
        x = item_vectors
        if self.action is not None:
            x = x + self.action(action)
        if self.gap is not None and gap is not None:
            x = x + self.gap(gap)
        if self.rating is not None and self.rating_range is not None and rating is not None:
            low, high = self.rating_range
            centered = (rating - (low + high) / 2) * (2 / (high - low) if low < high else 0.0)
            x = x + torch.nan_to_num(centered, nan=0.0).unsqueeze(-1).to(x.dtype) * self.rating
        if self.features is not None and entry is not None:
            x = x + self.features(entry, dense)
        return x

    @property
    def hashed(self) -> list[HashedEmbedding]:
        """The embeddings that read `shared`."""
        return [table for table in (self.action, self.gap) if isinstance(table, HashedEmbedding)]

    def check_batch(self, entry: Tensor | None) -> None:
        """Refuse a batch without the features that the encoder reads, since it would train without them silently.

        Args:
            entry: of the batch's events, as in `forward`.

        Raises:
            ValueError: if they lack features.
        """
        if self.features is not None and entry is None:
            raise ValueError(
                "the batch has no features of events, which the model reads; give BatchSource encode_events"
            )

    def gap_vectors(self, gap: Tensor) -> Tensor | None:
        """[..., M] embeddings of request gaps; None if the model uses no times."""
        return None if self.gap is None else self.gap(gap)
