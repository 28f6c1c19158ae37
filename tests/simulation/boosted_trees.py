"""A strong learner that the simulator's references are compared with."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from vista.simulation.simulated_log import SimulatedLog


def cross_fitted_scores(
    features: NDArray[np.float64], log: SimulatedLog, rows: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Scores [N] of the N impressions `rows` for the first task: one half of the users by trees fitted to the other.

    Args:
        features: [N, F], of these impressions.
    """
    ensemble = pytest.importorskip("sklearn.ensemble")
    even = log.impression_user[rows] % 2 == 0
    scores = np.empty(len(features))
    for fold in (even, ~even):
        model = ensemble.HistGradientBoostingRegressor(max_iter=60, learning_rate=0.1, random_state=0)
        model.fit(features[~fold], log.probability[rows, 0][~fold])
        scores[fold] = model.predict(features[fold])
    return scores
