"""Types of arrays."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int = NDArray[np.int64]
Floats = NDArray[np.float64]
Float32s = NDArray[np.float32]
