"""What a mean of item vectors can tell: features of the candidate's vector and the means over several windows.

Item vectors are the true ones: one-hot vectors of the item's latent class. The dot product of the candidate's vector
with a mean is then the share of the candidate's class in a window. Features are these shares over several windows,
their squares, and their square roots. A mean with decaying weights is close to a linear combination of means over
windows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.simulation.simulated_log import SimulatedLog
from vista.simulation.topic_index import TopicIndex

POOLED_WINDOWS = (None, 2000, 500, 200, 100, 32, 8)
"""Numbers of newest events in the means; None for all."""


@dataclass(frozen=True, slots=True)
class PooledView:
    """One way to place items in latent classes."""

    event_class: NDArray[np.integer[Any]]
    """[num_items] class of an item in the history."""
    candidate_classes: tuple[NDArray[np.integer[Any]], ...]
    """[num_items] each: classes that a candidate is about. Its vector is the sum of their one-hot vectors."""


def pooled_features(log: SimulatedLog, views: tuple[PooledView, ...], chosen: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Features [chosen.sum(), F]: a constant, the candidate's quality, and its shares in each view and window."""
    columns = [np.ones(int(chosen.sum())), log.catalog.quality[log.impression_item[chosen]].astype(np.float64)]
    for view in views:
        index = TopicIndex(view.event_class[log.item])
        for window in POOLED_WINDOWS:
            asked = log.queries(chosen, window)
            shares = [
                index.count(wanted[asked.item], asked.start, asked.stop) / (asked.stop - asked.start)
                for wanted in view.candidate_classes
            ]
            total = np.sum(shares, axis=0)
            columns += [*shares, total**2, np.sqrt(total)]
    return np.stack(columns, axis=1)
