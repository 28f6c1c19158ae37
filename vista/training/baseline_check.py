"""What counting reaches on the validation cases: logged when a run starts, and compared with its model at the end."""

from __future__ import annotations

import logging
import time

from vista.training.progress import Progress
from vista.training.validation import Validation

logger = logging.getLogger(__name__)
METRIC = "ndcg@10"


def measured_baselines(validation: Validation) -> dict[str, dict[str, float]]:
    """`Validation.baselines`, logged in one line."""
    began = time.perf_counter()
    measured = validation.baselines()
    if measured:
        numbers = ", ".join(f"{name} {metrics[METRIC]:.4f}" for name, metrics in measured.items())
        logger.info("counting baselines (%.1f s), %s: %s", time.perf_counter() - began, METRIC, numbers)
    return measured


def compare_with_baselines(progress: Progress, metric: str) -> None:
    """Warn if the best model of a run ranks next items worse than the best counting baseline.

    Args:
        metric: the metric that decided which model is best.
    """
    best = [validated for validated in progress.history if validated[metric] == progress.best]
    if not best or not progress.baselines:
        return
    name = max(progress.baselines, key=lambda each: progress.baselines[each][METRIC])
    bar, value = progress.baselines[name][METRIC], best[0][METRIC]
    if value < bar:
        logger.warning(
            "%s %.4f is below that of a counting baseline (%s: %.4f): train longer (optim.epochs or "
            "optim.minutes), or take more and smaller steps (data.tokens_per_batch)",
            METRIC,
            value,
            name,
            bar,
        )
