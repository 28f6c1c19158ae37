"""Scores of counted items, which are the items that a user's counters hold.

Items that are not counted have the score cos(u, v_i)/T, or with popularity (`vista.model.heads`) a little
more. A counted item i has the logit

    s_i = h(x_i, cos(u, v_i)/T, popularity_i, log n) + g(u)

where x_i are the codes of its counters and of those of its categories, and n is the number of the user's events. Both
kinds share one softmax: h ranks the counted items among themselves, and the gate g says how much of what this user does
next is a return. The cosine is an input of h and not a term, so that item vectors need not explain returns.

Letters: B requests, S counted slots, F' values per item: F per field (`CounterSpec`), M' width of retrieval vectors.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from vista.counters.counter_codes import MAX_CODE, CounterSpec
from vista.model.layers import SiLU

HIDDEN = 64


class CountedItemHead(nn.Module):
    """A network over the counters of each item, and a gate over the user vector. It is called without autocast.

    Before training, all counted items of a user have the same logit, the gate's bias.
    """

    def __init__(self, num_values: int, retrieval_dim: int, dropout: float = 0.0) -> None:
        """
        Args:
            num_values: F'.
            retrieval_dim: M'.
            dropout: share of the requests that training scores without `score`. Item vectors are fitted to the labels
                that this head learns from, so it would trust cosines more than later windows justify.
        """
        super().__init__()
        self.dropout = dropout
        last = nn.Linear(HIDDEN, 1, bias=False)  # the gate has the bias
        self.network = nn.Sequential(nn.Linear(num_values + 3, HIDDEN), SiLU(), nn.Linear(HIDDEN, HIDDEN), SiLU(), last)
        self.gate = nn.Linear(retrieval_dim, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, codes: Tensor, score: Tensor, popularity: Tensor, num_events: Tensor, user: Tensor) -> Tensor:
        """Logits of counted items.

        Args:
            codes: uint8 [B, S, F'] from `UserCounters.of_counted_items`, as of the requests.
            score: [B, S] what the items would score without counters: the inner product of the user's and the item's
                retrieval vectors, divided by the temperature.
            popularity: [B, S] `RankingModel.item_popularity` of the items.
            num_events: int64 [B] events that the counters cover: those of the record, and the newer ones that were
                added to them.
            user: [B, M'] retrieval vectors.

        Returns:
            float32 [B, S] (or the dtype of the weights if that is wider), on the scale of `score`.
        """
        if self.training and self.dropout:
            score = score * (torch.rand(len(score), 1, device=score.device) >= self.dropout)
        return self.from_counters(codes, score, popularity, num_events) + self.from_user(user).unsqueeze(1)

    def from_counters(self, codes: Tensor, score: Tensor, popularity: Tensor, num_events: Tensor) -> Tensor:
        """[B, S]: the network h. Arguments as in `forward`."""
        dtype = self.gate.weight.dtype
        # In float64, so that the bits do not depend on the other users of a request.
        size = (num_events.double().log1p() - 6).to(dtype).unsqueeze(1).expand_as(score)
        # Constants that bring typical values near 0 ± 1.
        inputs = [codes.to(dtype) / 8 - 2, *(x.to(dtype).unsqueeze(-1) for x in (score / 5, popularity, size))]
        logit: Tensor = self.network(torch.cat(inputs, -1)).squeeze(-1)
        return logit

    def from_user(self, user: Tensor) -> Tensor:
        """[B]: the gate g. user: [B, M']."""
        # User vectors have length 1; this brings their entries near 0 ± 1, like the network's inputs.
        entries = user.double() * math.sqrt(user.shape[-1])
        # In float64, so that the bits do not depend on the other users of a request.
        logit = F.linear(entries, self.gate.weight.double(), self.gate.bias.double())
        return logit.squeeze(-1).to(self.gate.weight.dtype)

    @torch.no_grad()
    def start(self, returning_share: float, num_counted: Tensor, log_others: Tensor) -> None:
        """Set the gate's bias before training: the mean probability of all counted items is their share of the labels.

        Args:
            returning_share: share of the labels of such requests that are counted items, between 0 and 1.
            num_counted: int64 [n] counted items of each request, at least 1.
            log_others: [n] log of the sum of e^s over the other items of the catalog.
        """
        log_odds = num_counted.double().log() - log_others.double()  # of the counted items, with a bias of 0
        low, high = -log_odds.max() - 50, -log_odds.min() + 50
        for _ in range(60):
            bias = (low + high) / 2
            is_below = (log_odds + bias).sigmoid().mean() < returning_share
            low, high = torch.where(is_below, bias, low), torch.where(is_below, high, bias)
        self.gate.bias.copy_(low)


# How labeled tasks read the user's counters of a candidate.
#
# There are two maps. A linear map of the codes is added to the candidate's vector, so that the counters affect what the
# candidate attends to. Because it is linear, serving computes it as a sum of table rows. A network adds to the logits:
# whether an item is due depends on the ratio of its gap to its mean gap, which a linear map cannot compute. The network
# also reads the user's number of events, because a count gives the mean gap only together with it.
#
# Letters: G fields, F values per key (`CounterSpec`). A candidate has G * F + 1 codes (`UserCounters.of_pairs`).


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


# How much a user's next items follow the items' overall popularity.
#
# Cosines to one user vector can hardly say "popular items" and "these similar items" at once. With this term the score
# of item i is (cos(u, v_i) + T β(u) popularity_i) / T, an inner product of vectors with one more dimension. So rankings
# and nearest-neighbor indexes need no change.


class PopularityTerm(nn.Module):
    """β(u), a linear function of the unit user vector. It starts at 1: where cosines say nothing, items have the
    probability of their popularity."""

    def __init__(self, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Linear(dim, 1)
        nn.init.zeros_(self.weight.weight)
        nn.init.ones_(self.weight.bias)

    def forward(self, unit: Tensor) -> Tensor:
        """Unit user vectors [..., M] -> retrieval vectors [..., M + 1], which end with T β(u)."""
        with torch.autocast(unit.device.type, enabled=False):
            unit = unit.to(self.weight.weight.dtype)
            strength = self.weight(unit * math.sqrt(unit.shape[-1]))  # entries near 0 ± 1
            return torch.cat([unit, self.temperature * strength], -1)


def standardized_popularity(frequency: NDArray[np.int64], num_items: int) -> NDArray[np.float64]:
    """float64 [num_items] log frequencies with mean 0 and standard deviation 1.

    Args:
        frequency: int64 [at most num_items] events of each item; items beyond have none.
    """
    log_frequency = np.zeros(num_items)
    log_frequency[: len(frequency)] = np.log(np.maximum(frequency, 1))
    centered = log_frequency - log_frequency.mean()
    standardized: NDArray[np.float64] = centered / max(float(centered.std()), 1e-6)
    return standardized
