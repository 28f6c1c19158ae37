"""AUC of several predictors over resampled users, for intervals and paired differences.

Impressions of one user are not independent, so users are drawn, each with all impressions. All predictors see the same
draws. Letters: N impressions, U users, D draws.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from vista.arrays import Floats, Int
from vista.progress_bar import progress_bar

NUM_DRAWS = 200


def drawn_aucs(
    user: Int, label: NDArray[np.floating], scores: Mapping[str, NDArray[np.floating]], *, seed: int = 0
) -> dict[str, Floats]:
    """AUC of each predictor in each draw of users with replacement: {name: float64 [D]}; NaN where a class is absent.

    Args:
        user: int64 [N] in any numbering.
        label: [N] of 0 and 1.
        scores: {name: [N]}.
    """
    users, owner = np.unique(user, return_inverse=True)
    rng = np.random.default_rng(seed)
    weight = np.stack(
        [np.bincount(rng.integers(0, len(users), len(users)), minlength=len(users)) for _ in range(NUM_DRAWS)]
    )
    with progress_bar(total=len(scores) * NUM_DRAWS, desc="intervals", unit="draw", leave=False) as bar:
        return {name: _weighted_aucs(owner, label, np.asarray(score), weight, bar) for name, score in scores.items()}


def _weighted_aucs(
    owner: Int, label: NDArray[np.floating], score: NDArray[np.floating], weight: Int, bar: tqdm[Any]
) -> Floats:
    """AUC where the impressions of user u count weight[d, u] times: float64 [D]; the bar moves once per draw."""
    order = np.argsort(score, kind="stable")
    owner, label, score = owner[order], label[order].astype(np.float64), score[order]
    starts = np.flatnonzero(np.append(True, score[1:] != score[:-1]))  # of equal scores
    out = np.full(len(weight), np.nan)
    for draw, own in enumerate(weight):
        count = own[owner].astype(np.float64)
        positive = np.add.reduceat(count * label, starts)
        negative = np.add.reduceat(count, starts) - positive
        below = np.cumsum(negative) - negative / 2  # equal scores count half
        pairs = positive.sum() * negative.sum()
        if pairs > 0:
            out[draw] = (positive * below).sum() / pairs
        bar.update()
    return out
