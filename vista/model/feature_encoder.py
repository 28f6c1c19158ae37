"""The part of an item's vector that comes from its features.

A row of the item table is learned from the item's own events. Features are shared by many items, so an item with few
events, or none, still has a vector. Letters: M model dim, E entries, F dense inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.model.item_feature import ItemFeature
from vista.model.item_feature_table import ItemFeatureTable


class FeatureEncoder(nn.Module):
    """Sum over columns: the mean embedding of an item's values, and a linear map of numbers and vectors.

    All weights start at 0, so features change nothing before training.
    """

    def __init__(self, columns: Sequence[ItemFeature], dim: int) -> None:
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

    def set_table(self, table: ItemFeatureTable, num_rows: int) -> None:
        """Set the encoded features of `num_rows` model rows.

        Raises:
            RuntimeError: if they are of other columns, or of another number of rows.
        """
        entry, offsets = table.entry, table.offsets
        fits = (
            offsets.shape == (num_rows + 1,)
            and table.dense.shape == (num_rows, 0 if self.dense is None else len(self.dense))
            and entry.shape == table.weight.shape == (int(offsets[-1]),)
            and int(offsets[0]) == 0
            and bool((offsets.diff() >= 0).all())
            and (not len(entry) or 0 <= int(entry.min()) <= int(entry.max()) < len(self.values))
        )
        if not fits:
            raise RuntimeError("the features of the items do not fit the model")
        self.table = table

    def forward(self, rows: Tensor) -> Tensor:
        """[..., M] of model rows int64 [...]; 0 for the unknown item."""
        table, flat = self.table, rows.flatten()
        assert table is not None
        start = table.offsets[flat]
        counts = table.offsets[flat + 1] - start
        bags = F.pad(counts.cumsum(0), (1, 0))
        index = torch.arange(int(bags[-1]), device=flat.device) + (start - bags[:-1]).repeat_interleave(counts)
        out = F.embedding_bag(
            table.entry[index],
            self.values,
            bags[:-1],
            mode="sum",
            sparse=True,
            per_sample_weights=table.weight[index].to(self.values.dtype),
        )
        if self.dense is not None:
            out = out + table.dense[flat].to(out.dtype) @ self.dense
        return out.view(*rows.shape, self.values.shape[1])
