"""Scores of counted items, which are the items that a user's counters hold.

Items that are not counted have the score cos(u, v_i)/T, or with popularity (`vista.model.popularity_term`) a little
more. A counted item i has the logit

    s_i = h(x_i, cos(u, v_i)/T, popularity_i, log n) + g(u)

where x_i are the codes of its counters and of those of its categories, and n is the number of the user's events. Both
kinds share one softmax: h ranks the counted items among themselves, and the gate g says how much of what this user does
next is a return. The cosine is an input of h and not a term, so that item vectors need not explain returns.

Letters: B requests, S counted slots, F' values per item: F per field (`CounterSpec`), M' width of retrieval vectors.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
