"""Vectors of features: of rows of a log or of requests, and of the items of a model.

R model rows, M model dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.arrays import offsets_of
from vista.model.features import EncodedRows, FeatureSpec
from vista.model.item_feature_table import ItemFeatureTable

if TYPE_CHECKING:
    from vista.model.saved_model import SharedTables


ROWS_AT_ONCE = 8192


class FeatureEncoder(nn.Module):
    """Sum over columns: the mean embedding of a row's values, and a linear map of its numbers and vectors. All weights
    start at 0, so features change nothing before training."""

    def __init__(self, columns: Sequence[FeatureSpec], dim: int) -> None:
        """
        Args:
            columns: at least one.
            dim: M.
        """
        super().__init__()
        self.values = nn.Parameter(torch.zeros(sum(column.num_rows for column in columns), dim))
        """Per column, a row for rows without a value, then one per value or bucket. Its gradient is sparse."""
        num_dense = sum(column.num_dense for column in columns)
        self.dense = nn.Parameter(torch.zeros(num_dense, dim)) if num_dense else None


class RowFeatureEncoder(FeatureEncoder):
    """Of rows with at most one value per column, which `RowFeatureReader.encode` reads."""

    def forward(self, rows: EncodedRows) -> Tensor:
        """[..., M] of rows [...], with all columns or the first ones."""
        entry, dense = (torch.as_tensor(part, device=self.values.device) for part in (rows.entry, rows.dense))
        bags = F.embedding_bag(entry.reshape(-1, entry.shape[-1]), self.values, mode="sum", sparse=True)
        out = bags.view(*entry.shape[:-1], self.values.shape[1])
        # Not a matrix product, whose bits would depend on the number of rows.
        for place in range(dense.shape[-1]):
            assert self.dense is not None
            out = out + dense[..., place : place + 1].to(out.dtype) * self.dense[place]
        return out


class ItemFeatureEncoder(FeatureEncoder):
    """Of the items of a model, whose features are encoded once. A row of the item table is learned from the item's own
    events. Features are shared by many items, so an item with few events, or none, still has a vector."""

    entry: Tensor
    """The arrays of the table, on the device of the weights. They are not saved with the weights."""
    weight: Tensor
    offsets: Tensor
    dense_inputs: Tensor

    def __init__(self, columns: Sequence[FeatureSpec], dim: int) -> None:
        super().__init__(columns, dim)
        self.table: ItemFeatureTable | None = None
        """Encoded features of the columns, set before the first use."""
        self._missing = [sum(column.num_rows for column in columns[:index]) for index in range(len(columns))]
        """The row of `values` for items without a value, of each column."""
        self._of_rows: tuple[object, Tensor] | None = None
        """What `forward` gives for all rows, and the state of the weights that it was computed from."""

    def set_table(self, table: ItemFeatureTable, num_rows: int) -> None:
        """Set the encoded features of `num_rows` model rows. Raises RuntimeError if they are of other columns, or of
        another number of rows."""
        if not table.fits(num_rows, len(self.values), 0 if self.dense is None else len(self.dense)):
            raise RuntimeError("the features of the items do not fit the model")
        self.table, self._of_rows = table, None
        for name in ("entry", "weight", "offsets", "dense_inputs"):
            array = getattr(table, name.removesuffix("_inputs"))
            self.register_buffer(name, torch.from_numpy(array).to(self.values.device), persistent=False)

    def rows_with_values(self) -> NDArray[np.bool_]:
        """bool [R]: model rows with a value in at least one column."""
        assert self.table is not None
        missing_before = offsets_of(np.isin(self.table.entry, self._missing))[self.table.offsets]
        known: NDArray[np.bool_] = np.diff(missing_before) < len(self._missing)
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
            shared = tables.take_arrays({"": rows.numpy()}, lambda: {"": rows.numpy()})[""]
            self._of_rows = self._of_rows[0], torch.from_numpy(shared)

    def _all_rows(self) -> Tensor:
        """[R, M] of all model rows, of the current weights."""
        weights = [(p.data_ptr(), p._version) for p in self.parameters()]
        state = weights, self.values.device, id(self.table)
        if self._of_rows is None or self._of_rows[0] != state:
            assert self.table is not None
            rows = torch.arange(len(self.offsets) - 1, device=self.values.device)
            with torch.inference_mode(False), torch.no_grad():
                blocks = [self._encode(rows[at : at + ROWS_AT_ONCE]) for at in range(0, len(rows), ROWS_AT_ONCE)]
                self._of_rows = state, torch.cat(blocks)
        return self._of_rows[1]

    def _encode(self, rows: Tensor) -> Tensor:
        """[N, M] of model rows int64 [N]."""
        start = self.offsets[rows]
        counts = self.offsets[rows + 1] - start
        bags = F.pad(counts.cumsum(0), (1, 0))
        index = torch.arange(int(bags[-1]), device=rows.device) + (start - bags[:-1]).repeat_interleave(counts)
        out = F.embedding_bag(
            self.entry[index],
            self.values,
            bags[:-1],
            mode="sum",
            sparse=True,
            per_sample_weights=self.weight[index].to(self.values.dtype),
        )
        return out if self.dense is None else out + self.dense_inputs[rows].to(out.dtype) @ self.dense
