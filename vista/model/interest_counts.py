"""How many events of a history belong to each of C interests, which the seeds start from.

An interest is a cluster of items. A linear read of a state cannot tell whether a user has ten or a hundred events of
an interest among thousands. So the state has another layer that counts: the key of an event is the unit vector of its
item's interest, and the value is constant. The seeds start from logarithms of the counts:

    seed_k = s_k + T_k [log(1 + count_1), ..., log(1 + count_C), log(1 + n)] / SCALE

The clusters are fixed before training, so what is counted does not change while item vectors do. Letters: T events,
N histories, S seeds, C interests, H heads, D head dim, M model dim, R items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vista.config import ModelConfig

SCALE = 8.0
"""Divisor of logarithms of counts: about log(3,000)."""
MOST_ITEMS = 50_000
"""Most items that are clustered; if there are more, a random sample."""
ITERATIONS = 20
_CHUNK = 65_536


class InterestCounts(nn.Module):
    """The counting layer of a state, and what the seeds of a history read of it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_interests, self.num_seeds = config.num_interests, config.num_seeds
        self.heads = config.num_heads, config.dim // config.num_heads
        self.tokens = nn.Linear(config.num_interests + 1, config.num_seeds * config.dim, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.2)

    def keys_values(self, interest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Keys and values [T, H, D] of events, from their interests int64 [T]: 1 to C, or 0 for none."""
        key = torch.zeros(len(interest), self.heads[0] * self.heads[1] + 1, dtype=dtype, device=interest.device)
        key.scatter_(1, interest.unsqueeze(1), 1.0)
        key = key[:, 1:].reshape(-1, *self.heads)
        value = torch.zeros_like(key)
        value[..., 0] = 1.0
        return key, value

    def counts(self, layer: Tensor) -> Tensor:
        """[N, C] from the counting layer [N, H, D, D] of states."""
        return layer[..., 0].flatten(1)[:, : self.num_interests]

    def forward(self, layer: Tensor, n: Tensor) -> Tensor:
        """What is added to the seeds, [N, S, M], from the counting layer [N, H, D, D] and the number of events [N]."""
        # Differences of sums may be slightly below 0 after events were forgotten.
        counted = torch.cat([self.counts(layer), n.unsqueeze(-1)], -1).clamp(min=0)
        added: Tensor = self.tokens(torch.log1p(counted) / SCALE)
        return added.view(len(n), self.num_seeds, -1)


@torch.no_grad()
def clusters(vectors: Tensor, count: int, seed: int) -> Tensor:
    """Clusters of item vectors by their directions: spherical k-means with the seeding of k-means++.

    Args:
        vectors: [R, M].
        count: of clusters, C.
        seed: of the first centroids, and of the choice of items.

    Returns:
        int64 [R] from 0 to C - 1.
    """
    unit = F.normalize(vectors, dim=-1)
    if not len(unit):
        return torch.zeros(0, dtype=torch.int64, device=vectors.device)
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(unit), generator=generator)[:MOST_ITEMS]
    sample = unit[chosen.to(unit.device)].cpu()
    centroids, distance = sample[:1], 1 - sample @ sample[0]
    for _ in range(count - 1):
        place = torch.multinomial(distance.clamp(min=1e-12).double(), 1, generator=generator)
        centroids = torch.cat([centroids, sample[place]])
        distance = torch.minimum(distance, 1 - sample @ centroids[-1])
    for _ in range(ITERATIONS):
        sums = torch.zeros_like(centroids).index_add_(0, nearest(sample, centroids), sample)
        centroids = torch.where(sums.norm(dim=1, keepdim=True) > 0, F.normalize(sums, dim=1), centroids)
    return nearest(unit, centroids.to(unit.device))


def nearest(unit: Tensor, centroids: Tensor) -> Tensor:
    """int64 [R] the centroid [C, M] with the largest inner product, for each vector [R, M]."""
    return torch.cat([(part @ centroids.T).argmax(1) for part in torch.split(unit, _CHUNK)])
