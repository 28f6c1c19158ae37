"""What decides the result of a baseline that is fitted, as a line of a table records it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vista.evaluation.baseline_evaluation import (
    GROUP_DECAYS,
    OWN_WEIGHTS,
    RIDGES,
    TEMPERATURES_AND_RATES,
    TRANSITION_WEIGHTS,
)
from vista.evaluation.counting_baselines import MAX_USERS, MIN_SEEN, SHORT_EVENTS

_GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "transitions and own frequency": {"transition_weights": TRANSITION_WEIGHTS},
    "EASE": {"ridges": RIDGES},
    "TIFU-KNN": {"group_decays": GROUP_DECAYS, "own_weights": OWN_WEIGHTS},
    "pooled vectors": {"temperatures_and_rates": TEMPERATURES_AND_RATES},
}
"""Values that `Tuned` chooses from."""
_FITTED = (*_GRIDS, "pooled factors", "counter trees", "new-item trees")


def baseline_settings(name: str, horizons: Sequence[int]) -> dict[str, Any]:
    """The settings of a baseline, in types of JSON; empty for one that only counts.

    Args:
        name: of a baseline of `vista.evaluation.baselines`, or of a predictor of `vista.simulation.simulate`.
        horizons: numbers of next events that it is asked about. It is fitted to each of them.
    """
    if name not in _FITTED:
        return {}
    settings: dict[str, Any] = {"name": name, "fitted_to": list(horizons)}
    if name in _GRIDS:
        settings |= {key: [_plain(value) for value in values] for key, values in _GRIDS[name].items()}
        settings |= {"tuning_users": MAX_USERS, "tuning_min_seen": MIN_SEEN, "short_events": SHORT_EVENTS}
    return settings


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
