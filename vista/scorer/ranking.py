"""What `Scorer.rank` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Ranking:
    """The best items for a user, best first."""

    items: NDArray[Any]
    """Ids as in the log."""
    scores: NDArray[np.float32]
    num_dropped: int
    """Candidates left out because the model does not know them or their score is not finite."""
