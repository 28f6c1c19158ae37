"""The part of an item's vector that comes from its features.

A row of the item table is learned from the item's own events. Features are shared by many items, so an item with few
events, or none, still has a vector. Letters: M model dim, E entries, F dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.log.histories import NUM_GAPS
from vista.model.features import FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable
from vista.model.layers import EmbeddingFeature, HashedEmbedding
from vista.model.saved_model import SharedTables
from vista.model.summarizer import Stage1Config

ROWS_AT_ONCE = 8192


class FeatureEncoder(nn.Module):
    """Sum over columns: the mean embedding of an item's values, and a linear map of numbers and vectors.

    All weights start at 0, so features change nothing before training.
    """

    def __init__(self, columns: Sequence[FeatureSpec], dim: int) -> None:
        """
        Args:
            columns: at least one.
            dim: M.
        """
        super().__init__()
        self.values = nn.Parameter(torch.zeros(sum(column.num_rows for column in columns), dim))
        """Per column, a row for items without a value, then one per value or bucket. Its gradient is sparse."""
        num_dense = sum(column.num_dense for column in columns)
        self.dense = nn.Parameter(torch.zeros(num_dense, dim)) if num_dense else None
        self.table: ItemFeatureTable | None = None
        """Encoded features of these columns, set before the first use."""
        sizes = [column.num_rows for column in columns]
        self._missing = [sum(sizes[:index]) for index in range(len(sizes))]
        """The row of `values` for items without a value, of each column."""
        self._of_rows: tuple[object, Tensor] | None = None
        """What `forward` gives for all rows, and the state of the weights that it was computed from."""

    def set_table(self, table: ItemFeatureTable, num_rows: int) -> None:
        """Set the encoded features of `num_rows` model rows.

        Raises:
            RuntimeError: if they are of other columns, or of another number of rows.
        """
        if not table.fits(num_rows, len(self.values), 0 if self.dense is None else len(self.dense)):
            raise RuntimeError("the features of the items do not fit the model")
        self.table, self._of_rows = table, None

    def rows_with_values(self) -> NDArray[np.bool_]:
        """bool [R]: model rows with a value in at least one column."""
        assert self.table is not None
        is_missing = torch.isin(self.table.entry, torch.tensor(self._missing, device=self.table.entry.device))
        missing_before = F.pad(is_missing.cumsum(0), (1, 0))[self.table.offsets]
        known: NDArray[np.bool_] = (missing_before.diff() < len(self._missing)).cpu().numpy()
        known[0] = False
        return known

    def forward(self, rows: Tensor) -> Tensor:
        """[..., M] of model rows int64 [...]; 0 for the unknown item."""
        if self.training or torch.is_grad_enabled():
            return self._encode(rows.flatten()).view(*rows.shape, self.values.shape[1])
        # For inference, all rows are encoded once: requests are fast, and bits do not depend on the other rows.
        return F.embedding(rows, self._all_rows())

    def share_rows(self, tables: SharedTables) -> None:
        """Compute what `forward` gives for all rows, and hold it once with the other models that have the same."""
        rows = self._all_rows()
        assert self._of_rows is not None
        if rows.device.type == "cpu":
            self._of_rows = self._of_rows[0], tables.take_tensors({"": rows}, lambda: {"": rows})[""]

    def _all_rows(self) -> Tensor:
        """[R, M] of all model rows, of the current weights."""
        weights = [(p.data_ptr(), p._version) for p in self.parameters()]
        state = weights, self.values.device, id(self.table)
        if self._of_rows is None or self._of_rows[0] != state:
            assert self.table is not None
            rows = torch.arange(len(self.table.offsets) - 1, device=self.values.device)
            with torch.inference_mode(False), torch.no_grad():
                blocks = [self._encode(rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
                self._of_rows = state, torch.cat(blocks)
        return self._of_rows[1]

    def _encode(self, rows: Tensor) -> Tensor:
        """[N, M] of model rows int64 [N]."""
        table = self.table
        assert table is not None
        start = table.offsets[rows]
        counts = table.offsets[rows + 1] - start
        bags = F.pad(counts.cumsum(0), (1, 0))
        index = torch.arange(int(bags[-1]), device=rows.device) + (start - bags[:-1]).repeat_interleave(counts)
        out = F.embedding_bag(
            table.entry[index],
            self.values,
            bags[:-1],
            mode="sum",
            sparse=True,
            per_sample_weights=table.weight[index].to(self.values.dtype),
        )
        return out if self.dense is None else out + table.dense[rows].to(out.dtype) @ self.dense


class RowFeatureEncoder(nn.Module):
    """Sum over columns: the embedding of a row's value or bucket, and a linear map of its numbers.

    All weights start at 0, so features change nothing before training. `RowFeatureReader.encode` gives the inputs.
    """

    def __init__(self, columns: Sequence[FeatureSpec], dim: int) -> None:
        """
        Args:
            columns: at least one, in the order of the reader's.
            dim: M.
        """
        super().__init__()
        self.values = nn.Parameter(torch.zeros(sum(column.num_rows for column in columns), dim))
        """Per column, a row for rows without a value, then one per value or bucket. Its gradient is sparse."""
        num_dense = sum(column.num_dense for column in columns)
        self.dense = nn.Parameter(torch.zeros(num_dense, dim)) if num_dense else None

    def forward(self, entry: Tensor, dense: Tensor) -> Tensor:
        """[..., M] of entries int64 [..., C] and dense inputs float32 [..., F], of all columns or of the first ones."""
        bags = F.embedding_bag(entry.reshape(-1, entry.shape[-1]), self.values, mode="sum", sparse=True)
        out = bags.view(*entry.shape[:-1], self.values.shape[1])
        # Not a matrix product, whose bits would depend on the number of rows.
        for place in range(dense.shape[-1]):
            assert self.dense is not None
            out = out + dense[..., place : place + 1].to(out.dtype) * self.dense[place]
        return out


# Embeddings of events: item, action, gap to the event before, rating, features.
#
# Letters: T packed events, M model dim, R item rows of a batch, C columns and D dense inputs of features.
#
# Every function takes item vectors as an argument instead of reading the table. The model gathers the rows of a batch
# once, for events, labels and negatives alike, so the cost of a step depends on these rows and not on the table's size.


class EventEncoder(nn.Module):
    """Sum of the embeddings of an event's fields. Fields that the log lacks are left out.

    Actions and gaps have tables of their own, or read `shared`, the table [1 + N, M / P] of all features.
    """

    def __init__(self, config: Stage1Config, shared: nn.Parameter | None = None) -> None:
        super().__init__()

        def embedding(feature: EmbeddingFeature, num_values: int) -> nn.Embedding | HashedEmbedding:
            if shared is None:
                return nn.Embedding(num_values, config.dim)
            return HashedEmbedding(shared, feature, num_values, config.embedding_hashes, config.embedding_rows)

        num_actions = len(config.actions)
        self.action = embedding(EmbeddingFeature.action, num_actions) if num_actions > 1 else None
        self.gap = embedding(EmbeddingFeature.gap, NUM_GAPS) if config.has_gap else None
        self.rating_range = config.rating_range
        self.rating = None if config.rating_range is None else nn.Parameter(torch.zeros(config.dim))
        features = config.event_features
        self.features = RowFeatureEncoder(features, config.dim) if features else None
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
