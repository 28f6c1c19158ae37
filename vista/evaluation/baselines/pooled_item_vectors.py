"""Pooled vectors: item vectors that learn, through their means over the history, what comes next.

Letters: B questions of a step, n users, K means, M columns of the vectors, V items.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.arrays import Floats, Int
from vista.evaluation.baselines.pooled_means import NUM_MEANS, factor_vectors, mean_weights, pooled_means
from vista.evaluation.window_cases import distinct_items
from vista.examples.frequency import item_counts
from vista.examples.negatives import NegativeSampler
from vista.log.event_log import EventLog
from vista.log.histories import Histories, ranges
from vista.model.window_loss import window_loss

_SPACING = 16
"""Visible events per question."""
_MOST_QUESTIONS = 1 << 15
"""Most questions of a training: about 10 s of one core where histories have 800 events."""
_BATCH = 256
_NEGATIVES = 1000
_POWER = 0.5
"""Negatives are drawn in proportion to the frequency ** _POWER."""


@dataclass(frozen=True, slots=True)
class _Trained:
    vectors: Floats
    """float64 [V, M] of length 1."""
    maps: Floats
    """float64 [K, M, M]: a user's vector is the sum of mean_k @ maps[k], scaled to length 1."""
    popularity_weight: float


class PooledItemVectors:
    """Score: cos(item, Σ_k A_k mean_k) / temperature + w log(1 + popularity).

    The means are those of `pooled_means`, of the item vectors themselves, which start as a factorization of
    co-occurrences (`item_factors`). Vectors, A, and w minimize `window_loss`: a sampled softmax whose labels are the
    items of the next events after random visible events.
    """

    name = "pooled vectors"

    def __init__(
        self, *, horizon_events: int, dim: int = 64, temperature: float = 0.1, learning_rate: float = 0.001
    ) -> None:
        """
        Args:
            horizon_events: number of next events whose items are predicted.
            dim: number of columns of the vectors.
            temperature: divides the cosines.
            learning_rate: of Adam at the first step; it falls linearly to 0.
        """
        self._horizon, self._dim = horizon_events, dim
        self._temperature, self._learning_rate = temperature, learning_rate
        self._trained: _Trained | None = None

    def choose(self, value: tuple[float, float]) -> None:
        """Set the temperature and the learning rate."""
        (self._temperature, self._learning_rate), self._trained = value, None

    def fit(self, log: EventLog, counts: Int, rng: np.random.Generator) -> None:
        self._log, self._counts = log, counts
        self._seed = int(rng.integers(1 << 31))
        self._events = item_counts(log, counts)
        self._popularity = np.log1p(self._events)
        self._start, self._trained = factor_vectors(log, counts, self._dim, self._seed), None

    def scores(self, user: Int, seen: Int, now: Int | None) -> Floats:
        if self._trained is None:
            self._trained = self._train()
        means = pooled_means(self._log, self._trained.vectors, user, seen)
        wanted = np.einsum("knm,kmj->nj", means, self._trained.maps)
        length = np.linalg.norm(wanted, axis=1, keepdims=True)
        wanted /= np.where(length > 0, length, 1) * self._temperature
        out: Floats = wanted @ self._trained.vectors.T + self._trained.popularity_weight * self._popularity
        return out

    def _train(self) -> _Trained:
        rng = np.random.default_rng(self._seed)
        # Items without factors start at random: a vector of 0 has no direction.
        has_factors = self._start.any(axis=1, keepdims=True)
        start = np.where(has_factors, self._start, rng.normal(0, self._dim**-0.5, self._start.shape))
        vectors = nn.Parameter(torch.from_numpy(start).float())
        maps = nn.Parameter(torch.eye(self._dim).repeat(NUM_MEANS, 1, 1) / NUM_MEANS)
        weight = nn.Parameter(torch.ones(1))
        user, seen = self._questions(rng)
        if len(user):
            popularity = torch.from_numpy(self._popularity).float().unsqueeze(1)
            sampler = NegativeSampler(self._events, num_negatives=_NEGATIVES, power=_POWER)
            optimizer = torch.optim.Adam([vectors, maps, weight], lr=self._learning_rate)
            steps = -(-len(user) // _BATCH)
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
            for step in range(steps):
                part = slice(step * _BATCH, (step + 1) * _BATCH)
                unit = F.normalize(vectors, dim=1)
                wanted = _wanted(unit, maps, self._log.gather(user[part], seen[part]))
                # One more column of both adds the popularity to the logits.
                wanted = torch.cat([wanted, (weight * self._temperature).expand(len(wanted), 1)], dim=1)
                after = self._log.gather_ranges(user[part], seen[part], seen[part] + self._horizon)
                negatives, log_weight = map(torch.from_numpy, sampler.draw(rng))
                items = torch.cat([unit, popularity], dim=1)
                label = _labels(after, len(items))
                loss = window_loss(wanted, items, label, negatives, log_weight, self._temperature)
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        unit = F.normalize(vectors.detach().double(), dim=1)
        return _Trained(unit.numpy(), maps.detach().double().numpy(), float(weight.detach()))

    def _questions(self, rng: np.random.Generator) -> tuple[Int, Int]:
        """Users and numbers of events before random questions whose windows end before the cut, int64 [Q] each."""
        places = np.maximum(self._counts - self._horizon, 0)
        end = np.cumsum(places)
        total = int(end[-1]) if len(end) else 0
        drawn = rng.integers(0, max(total, 1), min(-(-total // _SPACING), _MOST_QUESTIONS))
        user = np.searchsorted(end, drawn, side="right")
        return user, drawn - (end - places)[user] + 1


def _wanted(unit: Tensor, maps: Tensor, before: Histories) -> Tensor:
    """Vectors [B, M] of length 1 of the items that are wanted after the events `before`."""
    count = before.num_users
    weights = mean_weights(before.age)
    mean, event = weights.nonzero()
    row = mean * count + before.owner[event]
    index = torch.from_numpy(np.stack([row, before.item[event].astype(np.int64)]))
    value = torch.from_numpy(weights[mean, event]).float()
    size = (len(weights) * count, len(unit))
    sums = torch.sparse.mm(torch.sparse_coo_tensor(index, value, size, check_invariants=False), unit)
    means = F.normalize(sums.view(len(weights), count, -1), dim=2)
    return F.normalize(torch.bmm(means, maps).sum(0), dim=1)


def _labels(after: Histories, num_items: int) -> Tensor:
    """int64 [B, P]: the distinct items of each window; -1 pads."""
    owner, item = np.divmod(distinct_items(after, num_items), num_items)
    count = np.bincount(owner, minlength=after.num_users)
    labels = np.full((after.num_users, int(count.max())), -1)
    labels[owner, ranges(0, count)] = item
    return torch.from_numpy(labels)
