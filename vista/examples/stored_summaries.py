"""Summaries that training reads from a store. Letters: B users, S seeds, M model dim."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class StoredSummaries:
    """The summaries of a log's users. Labels begin where the records end, and histories are not read again."""

    since: int
    """ms: the records cover the events before it."""
    read: Callable[[NDArray[np.int64]], NDArray[np.float32]]
    """User rows int64 [B] -> summaries [B, S, M]."""
