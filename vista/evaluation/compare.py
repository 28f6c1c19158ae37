"""`vista compare`: a paired test between two models, from the files that `vista evaluate` wrote."""

from __future__ import annotations

from vista.config import CompareConfig
from vista.errors import ConfigError
from vista.evaluation.comparison import Comparison
from vista.evaluation.per_user_metrics import PerUserMetrics, per_user_path


def compare(config: CompareConfig) -> Comparison:
    """Read the metrics of each user and compare them.

    Raises:
        ConfigError: no file is named for a side, a file is missing or damaged, or the evaluations differ in their
            question, users or labels.
    """
    for key in ("a", "b"):
        if not getattr(config, key):
            raise ConfigError(
                f"{key}: name at least one file that `vista evaluate` wrote, such as {key}=[metrics.json]"
            )
    a, b = ([PerUserMetrics.load(per_user_path(path)) for path in side] for side in (config.a, config.b))
    return Comparison.of(a, b)
