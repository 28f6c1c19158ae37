"""What a scorer gives back. Letters: C candidates, S seeds, L' events of the tail."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Encoded candidates, made by `Scorer.encode`, to use again: int64 model rows, [C] (for every user) or [B, C]."""

    rows: Int
    vocabulary: str
    """Digest of the item vocabulary whose rows they are."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best items of a user: ids as in the log, scores float32, best first."""

    items: NDArray[Any]
    scores: NDArray[np.float32]
    num_dropped: int
    """Candidates left out: unknown to the model, or of a score that is not finite."""


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the scores of C candidates of a user are made of (`vista.model.attribution`); float32.

    `summary.sum(1) + tail.sum(1) + own + remainder` is `value`.
    """

    value: NDArray[np.float32]
    """[C] what is added up to: the logit of a labelled task, whose sigmoid `score` gives; for `next`, the score."""
    summary: NDArray[np.float32]
    """[C, S] of the summary's tokens."""
    tail: NDArray[np.float32]
    """[C, L'] of the events of the tail, oldest first."""
    tail_items: list[Any]
    """[L'] their items' ids; None where the model does not know the item."""
    own: NDArray[np.float32]
    """[C] of the candidate itself and the time of the request; for `next`, of the request alone: the candidate is what
    all shares are measured along."""
    remainder: NDArray[np.float32]
    """[C] the task's bias, and rounding."""
