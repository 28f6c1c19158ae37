"""How labeled tasks read the user's counters of a candidate.

There are two maps. A linear map of the codes is added to the candidate's vector, so that the counters affect what the
candidate attends to. Because it is linear, serving computes it as a sum of table rows. A network adds to the logits:
whether an item is due depends on the ratio of its gap to its mean gap, which a linear map cannot compute. The network
also reads the user's number of events, because a count gives the mean gap only together with it.

Letters: G fields, F values per key (`CounterSpec`). A candidate has G * F + 1 codes (`UserCounters.of_pairs`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vista.counters.counter_codes import MAX_CODE, CounterSpec
from vista.model.layers import SiLU

HIDDEN = 64


class CandidateCounters(nn.Module):
    """A linear map of a candidate's codes to vectors, and a network to logits; both are 0 before training."""

    def __init__(self, spec: CounterSpec, width: int, num_tasks: int) -> None:
        """
        Args:
            spec: what is counted.
            width: of the vectors.
            num_tasks: number of labeled tasks.
        """
        super().__init__()
        self.num_columns = spec.num_columns
        self.num_values = num_values = spec.num_fields * spec.num_columns
        self.added = nn.Linear(2 * num_values + spec.num_fields, width, bias=False)
        nn.init.zeros_(self.added.weight)
        last = nn.Linear(HIDDEN, num_tasks, bias=False)  # the head of the tasks has the bias
        self.network = nn.Sequential(nn.Linear(num_values + 1, HIDDEN), SiLU(), nn.Linear(HIDDEN, HIDDEN), SiLU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., G * F + 1], 0 for candidates that are not counted -> [..., width]; 0 for these."""
        level = codes[..., :-1].to(self.added.weight.dtype) / MAX_CODE
        added: Tensor = self.added(torch.cat([level, level.square(), self._is_counted(codes).to(level.dtype)], -1))
        return added

    def logits(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., G * F + 1] -> what is added to the logits, [..., num_tasks]; 0 without counters."""
        # Constants that bring typical values near 0 ± 1.
        level = codes.to(self.added.weight.dtype) / 8 - 2
        logits: Tensor = self.network(level)
        return logits * self._is_counted(codes).any(-1, keepdim=True)

    def _is_counted(self, codes: Tensor) -> Tensor:
        """bool [..., G]: the fields that count the candidate, whose first code is at least 1."""
        return codes[..., : -1 : self.num_columns] > 0

    def of_each_code(self) -> Tensor:
        """[G * F * 64, width]: row 64 f + c is what code c of column f adds. The rows of a candidate's codes add up to
        what `forward` gives, because that is a sum over columns."""
        num_values = self.num_values
        code = torch.arange(MAX_CODE + 1, dtype=torch.uint8, device=self.added.weight.device)
        codes = code.new_zeros(num_values, len(code), num_values + 1)
        codes[torch.arange(num_values), :, torch.arange(num_values)] = code
        rows: Tensor = self(codes)
        return rows.flatten(0, 1)
