"""Candidates that are looked up once and scored many times."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """Candidates encoded by `Scorer.encode`, which any number of calls can use."""

    rows: NDArray[np.int64]
    """Model rows, [C] (the same for every user) or [B, C]."""
    vocabulary: str
    """Digest of the item vocabulary that the rows refer to."""
