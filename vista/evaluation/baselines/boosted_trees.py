"""What baselines of boosted trees share: the classifier of scikit-learn, and labels from windows."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from vista.arrays import Int
from vista.errors import MissingDependencyError
from vista.evaluation.window_cases import WindowCases
from vista.install_command import install_command


def boosted_trees(baseline: str) -> Any:
    """The class HistGradientBoostingClassifier.

    Raises:
        MissingDependencyError: if scikit-learn is not installed; it names the baseline.
    """
    try:
        from sklearn.ensemble import HistGradientBoostingClassifier
    except ImportError as error:
        raise MissingDependencyError(
            f"{baseline} need scikit-learn ({error}); install it with: {install_command('baselines')}"
        ) from error
    return HistGradientBoostingClassifier


def in_windows(cases: WindowCases, row: Int, item: Int, num_items: int) -> NDArray[np.bool_]:
    """Whether items are in the windows of cases.

    Args:
        row: int64 places in `cases`; item: int64 rows of the log. The two broadcast.
    """
    label = np.repeat(np.arange(len(cases)), np.diff(cases.offsets)) * num_items + cases.item
    return np.isin(row * num_items + item, label)
