"""Features of rows inside a graph: from codes and numbers to vectors. M model dim."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.model.feature_spec import MAX_ABS_SCORE, FeatureSpec
from vista.model.row_feature_encoder import RowFeatureEncoder


class GraphFeatures(nn.Module):
    """What `RowFeatureReader.encode` and `RowFeatureEncoder` compute, in operators that every runtime has."""

    def __init__(self, columns: Sequence[FeatureSpec], encoder: RowFeatureEncoder) -> None:
        """
        Args:
            columns: the encoder's, or the first of them.
        """
        super().__init__()
        self.columns = list(columns)
        self.register_buffer("values", encoder.values.detach())
        self.register_buffer("dense", None if encoder.dense is None else encoder.dense.detach())
        self.values: Tensor
        self.dense: Tensor | None
        for number, column in enumerate(columns):
            self.register_buffer(f"bounds{number}", torch.tensor(column.bounds, dtype=torch.float64))

    @classmethod
    def of(cls, columns: Sequence[FeatureSpec], encoder: RowFeatureEncoder | None) -> GraphFeatures | None:
        """None if there is nothing to read."""
        return cls(columns, encoder) if columns and encoder is not None else None

    def forward(self, given: Sequence[Tensor]) -> Tensor:
        """[..., M] vectors of codes int64 [...] or numbers float32 [...], one tensor per column."""
        entries: list[Tensor] = []
        out, first, dense = None, 0, 0
        for number, (column, values) in enumerate(zip(self.columns, given, strict=True)):
            if column.kind == "number":
                wide, missing = values.double(), values.isnan()
                bucket = (getattr(self, f"bounds{number}") < wide.unsqueeze(-1)).sum(-1)
                entries.append(torch.where(missing, first, bucket + first + 1))
                score = ((wide - column.mean) / column.scale).clamp(-MAX_ABS_SCORE, MAX_ABS_SCORE).float()
                assert self.dense is not None
                added = torch.where(missing, 0.0, score).unsqueeze(-1) * self.dense[dense]
                out, dense = added if out is None else out + added, dense + 1
            else:
                entries.append(values + (first + 1))
            first += column.num_rows
        embedded = F.embedding(torch.stack(entries, -1), self.values).sum(-2)
        return embedded if out is None else embedded + out
