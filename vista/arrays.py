"""Types of arrays, and where packed parts lie in one."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]


def offsets_of(lengths: Int | NDArray[np.bool_]) -> Int:
    """Where packed parts with these lengths [B] begin and end: int64 [B + 1], from 0. A bool counts as its number."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets
