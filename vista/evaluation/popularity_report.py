"""Does the retrieval head recommend what is popular anyway? Concentration of its lists, and quality by popularity.

Letters: V items of the model, U users' lists, N labeled cases. Popularity is an item's number of training events.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Floats, Int
from vista.evaluation.protocol import RecommendedLists, ranking_metrics
from vista.text_table import fitted, text_table

NUM_DECILES = 10


@dataclass(frozen=True, slots=True)
class PopularityReport:
    """How popularity enters the lists of length k. Deciles have equal mass: `popularity_deciles`. Arrays have
    NUM_DECILES entries, from the rarest items to the most popular; a decile without labels has NaN quality."""

    k: int
    gini: float
    """Of the items' places in lists. It depends on the number of lists, so compare over the same users."""
    training_gini: float
    """Of the items' training events, to compare with."""
    coverage: float
    """Share of the model's items that are in at least one list."""
    score_correlation: float
    """Spearman correlation, over items, of popularity and the mean score over users: near 0 if scores do not carry
    popularity."""
    norm_correlation: float
    """Spearman correlation, over items, of popularity and the norm of the item's vector (cosines ignore the norm)."""
    num_items: Int
    label_share: Floats
    """Share of the cases whose label lies in the decile."""
    recommended_share: Floats
    """Share of all places in lists that items of the decile take."""
    hit_rate: Floats
    ndcg: Floats
    events: Int
    """int64 [V] training events of each item."""
    places: Int
    """int64 [V] places of each item in lists."""

    def metrics(self) -> dict[str, float]:
        """Scalars for a row of results: gini@k, coverage@k, correlations; NDCG and recommended share by decile."""
        k = self.k
        named = {
            f"gini@{k}": self.gini,
            f"coverage@{k}": self.coverage,
            "popularity/score": self.score_correlation,
            "popularity/norm": self.norm_correlation,
        }
        for name, values in (("ndcg", self.ndcg), ("recommended", self.recommended_share)):
            named |= {f"{name}@{k}/decile-{d + 1}": float(values[d]) for d in range(NUM_DECILES)}
        return named

    def __str__(self) -> str:
        k = self.k
        head = [
            f"popularity, by lists of {k}: Gini {self.gini:.4f} (training events {self.training_gini:.4f}), coverage "
            f"{self.coverage:.4f}",
            f"  Spearman correlation of popularity with the mean score {self.score_correlation:+.4f}, with the norm of "
            f"the vectors {self.norm_correlation:+.4f}",
        ]
        columns = (self.num_items, self.label_share, self.recommended_share, self.hit_rate, self.ndcg)
        rows = [
            [str(decile), str(items), f"{labels:.2%}", f"{shown:.2%}", f"{hits:.4f}", f"{gain:.4f}"]
            for decile, (items, labels, shown, hits, gain) in enumerate(zip(*columns, strict=True), start=1)
        ]
        header = ["decile", "items", "labels", "recommended", f"hr@{k}", f"ndcg@{k}"]
        return "\n".join([*map(fitted, head), text_table(header, rows)])


def popularity_report(
    popularity: Int, lists: RecommendedLists, ranks: Int, norms: NDArray[np.floating]
) -> PopularityReport:
    """Compute the report from counts and ranks.

    Args:
        popularity: int64 [V] training events of each item.
        lists: the items in the lists, and the labels. A label that the model does not know is in the rarest decile.
        ranks: int64 [N] 0-based ranks of the labels.
        norms: [V] norms of the items' vectors.
    """
    decile, label = popularity_deciles(popularity), lists.target
    label_decile = np.where(label >= 0, decile[label], 0)
    parts = [ranks[label_decile == d] for d in range(NUM_DECILES)]
    quality = [ranking_metrics(part, [lists.k]) for part in parts]
    shown = np.bincount(decile, weights=lists.counts, minlength=NUM_DECILES)
    return PopularityReport(
        k=lists.k,
        gini=gini(lists.counts),
        training_gini=gini(popularity),
        coverage=float((lists.counts > 0).mean()),
        score_correlation=spearman(popularity, lists.mean_scores),
        norm_correlation=spearman(popularity, norms),
        num_items=np.bincount(decile, minlength=NUM_DECILES),
        label_share=np.array([len(part) for part in parts]) / max(len(ranks), 1),
        recommended_share=shown / max(shown.sum(), 1),
        hit_rate=np.array([each[f"hr@{lists.k}"] for each in quality]),
        ndcg=np.array([each[f"ndcg@{lists.k}"] for each in quality]),
        events=popularity,
        places=lists.counts,
    )


def gini(counts: NDArray[np.int64]) -> float:
    """Gini coefficient of counts [V] >= 0: 0 if all are equal, 1 - 1/V if one item has all, NaN if all are 0."""
    total, size = int(counts.sum()), len(counts)
    if total == 0:
        return float("nan")
    rank = np.arange(1, size + 1)
    return float(2 * (rank * np.sort(counts).astype(np.float64)).sum() / (size * total) - (size + 1) / size)


def popularity_deciles(popularity: Int) -> Int:
    """Decile of each item, 0 (rarest) to 9, such that each holds about a tenth of the training events.

    Deciles of equal mass rather than equal numbers of items: labels are distributed like events, so the quality of
    every decile rests on about as many labels, while nine deciles of equal numbers of items would share few. Items of
    equal popularity share a decile, that of the middle of their common mass. So one item with more than a tenth of the
    events leaves deciles empty.
    """
    value, inverse, size = np.unique(popularity, return_inverse=True, return_counts=True)
    mass = value * size
    doubled_middle = 2 * np.cumsum(mass) - mass
    decile: Int = NUM_DECILES * doubled_middle // max(2 * int(mass.sum()), 1)
    return np.minimum(decile, NUM_DECILES - 1)[inverse]


def spearman(one: NDArray[np.number], other: NDArray[np.number]) -> float:
    """Rank correlation of two vectors [V], ties at their middle ranks; NaN if one is constant."""
    first, second = _middle_ranks(one), _middle_ranks(other)
    first, second = first - first.mean(), second - second.mean()
    scale = np.sqrt((first @ first) * (second @ second))
    return float(first @ second / scale) if scale > 0 else float("nan")


def _middle_ranks(values: NDArray[np.number]) -> Floats:
    _, inverse, size = np.unique(values, return_inverse=True, return_counts=True)
    middle: Floats = (np.cumsum(size) - (size - 1) / 2)[inverse]
    return middle
