"""What a predictor may look at for each impression."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Queries:
    """Impressions with the range of packed events that is known about each user."""

    item: NDArray[np.int32]
    """[N] candidates."""
    time: NDArray[np.int64]
    """[N] ms"""
    start: NDArray[np.int64]
    """[N] packed index of the oldest known event."""
    stop: NDArray[np.int64]
    """[N] packed index after the newest event before the impression."""
