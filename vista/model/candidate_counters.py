"""What a labeled task reads of the user's counters of a candidate. Letters: F values per key (`CounterSpec`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.counters.counter_codes import MAX_CODE


class CandidateCounters(nn.Module):
    """A linear map of a candidate's codes, added to its vectors; 0 before training."""

    def __init__(self, num_values: int, width: int) -> None:
        """
        Args:
            num_values: F.
            width: of the vectors.
        """
        super().__init__()
        self.added = nn.Linear(2 * num_values + 1, width, bias=False)
        nn.init.zeros_(self.added.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., F], 0 for candidates that are not counted -> [..., width]; 0 for these."""
        level = codes.to(self.added.weight.dtype) / MAX_CODE
        is_counted = (codes[..., :1] > 0).to(level.dtype)
        added: Tensor = self.added(torch.cat([level, level.square(), is_counted], -1))
        return added

    def of_each_code(self) -> Tensor:
        """[F * 64, width]: row 64 f + c is what code c of column f adds. The rows of a candidate's codes add up to what
        `forward` gives, because that is a sum over columns."""
        num_values = self.added.in_features // 2
        code = torch.arange(MAX_CODE + 1, dtype=torch.uint8, device=self.added.weight.device)
        codes = code.new_zeros(num_values, len(code), num_values)
        codes[torch.arange(num_values), :, torch.arange(num_values)] = code
        rows: Tensor = self(codes)
        return rows.flatten(0, 1)
