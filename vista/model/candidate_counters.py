"""How labeled tasks read the user's counters of a candidate.

There are two maps. A linear map of the codes is added to the candidate's vector, so that the counters affect what the
candidate attends to. A network adds to the logits: whether an item is due depends on the ratio of its gap to its mean
gap, which a linear map cannot compute. The network also reads the user's number of events, because a count gives the
mean gap only together with it. Serving computes the linear map and the network's first layer as a sum of table rows.

Letters: F values per key (`CounterSpec`). A candidate has F + 1 codes (`UserCounters.of_pairs`).
"""

from __future__ import annotations

from itertools import islice

import torch
from torch import Tensor, nn

from vista.counters.counter_codes import MAX_CODE
from vista.model.layers import SiLU

HIDDEN = 64


class CandidateCounters(nn.Module):
    """A linear map of a candidate's codes to vectors, and a network to logits; both are 0 before training."""

    def __init__(self, num_values: int, width: int, num_tasks: int) -> None:
        """
        Args:
            num_values: F.
            width: of the vectors.
            num_tasks: number of labeled tasks.
        """
        super().__init__()
        self.added = nn.Linear(2 * num_values + 1, width, bias=False)
        nn.init.zeros_(self.added.weight)
        last = nn.Linear(HIDDEN, num_tasks, bias=False)  # the head of the tasks has the bias
        self.network = nn.Sequential(nn.Linear(num_values + 1, HIDDEN), SiLU(), nn.Linear(HIDDEN, HIDDEN), SiLU(), last)
        nn.init.zeros_(last.weight)

    def forward(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., F + 1], 0 for candidates that are not counted -> [..., width]; 0 for these."""
        level = codes[..., :-1].to(self.added.weight.dtype) / MAX_CODE
        is_counted = (codes[..., :1] > 0).to(level.dtype)
        added: Tensor = self.added(torch.cat([level, level.square(), is_counted], -1))
        return added

    def logits(self, codes: Tensor) -> Tensor:
        """Codes uint8 [..., F + 1] -> what is added to the logits, [..., num_tasks]; 0 without counters."""
        # Constants that bring typical values near 0 ± 1.
        level = codes.to(self.added.weight.dtype) / 8 - 2
        logits: Tensor = self.network(level)
        return logits * (codes[..., :1] > 0)

    def of_each_code(self) -> Tensor:
        """[(F + 1) * 64, width + HIDDEN]: row 64 f + c is what code c of column f adds. The rows of a candidate's codes
        add up to what `forward` gives, and to the output of the network's first layer, which are sums over columns."""
        num_codes, first = self.added.in_features // 2 + 1, self.network[0]
        assert isinstance(first, nn.Linear)
        code = torch.arange(MAX_CODE + 1, dtype=torch.uint8, device=self.added.weight.device)
        codes = code.new_zeros(num_codes, len(code), num_codes)
        codes[torch.arange(num_codes), :, torch.arange(num_codes)] = code
        of_network = (code / 8 - 2)[:, None] * first.weight.t()[:, None]
        of_network[0] += first.bias
        return torch.cat([self(codes), of_network], -1).flatten(0, 1)

    def logits_of_first_layer(self, outputs: Tensor) -> Tensor:
        """`logits` of counted candidates, from the outputs [n, HIDDEN] of the network's first layer: [n, num_tasks]."""
        for layer in islice(self.network, 1, None):
            outputs = layer(outputs)
        return outputs
