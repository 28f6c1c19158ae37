"""Vectors of features of rows: of events, of requests, or of users. C columns, F dense inputs, M model dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.model.feature_spec import FeatureSpec


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
