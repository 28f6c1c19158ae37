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
