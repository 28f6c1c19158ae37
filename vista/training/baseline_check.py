"""What counting reaches on the validation cases: logged when a run starts, and compared with its model at the end."""

from __future__ import annotations

import logging
import time

from vista.training.progress import Progress
from vista.training.validation import Validation

logger = logging.getLogger(__name__)


def measured_baselines(validation: Validation) -> dict[str, dict[str, float]]:
    """`Validation.baselines`, logged in one line."""
    began = time.perf_counter()
    measured, metric = validation.baselines(), validation.ranking_metric
    if measured:
        numbers = ", ".join(f"{name} {metrics[metric]:.4f}" for name, metrics in measured.items())
        logger.info("counting baselines (%.1f s), %s: %s", time.perf_counter() - began, metric, numbers)
    return measured


WITHOUT_COUNTERS = (
    "train longer (optim.epochs or optim.minutes), or take more and smaller steps (data.tokens_per_batch); if users "
    "return to items, set model.counters=true"
)
WITH_COUNTERS = (
    "train longer if the run has fewer than 1,000 steps (optim.epochs), or add time constants (model.counter_days, "
    "model.counter_events)"
)
"""What to change (docs/guides/choose-settings.md)."""


def compare_with_baselines(progress: Progress, validation: Validation, *, counts: bool) -> None:
    """Warn if the best model of a run ranks items worse than the best counting baseline.

    Args:
        validation: its `metric` chose that model, and its `ranking_metric` compares both.
        counts: whether the model has counters.
    """
    metric = validation.ranking_metric
    best = [validated for validated in progress.history if validated[validation.metric] == progress.best]
    if not best or not progress.baselines:
        return
    name = max(progress.baselines, key=lambda each: progress.baselines[each][metric])
    bar, value = progress.baselines[name][metric], best[0][metric]
    if value < bar:
        logger.warning(
            "%s %.4f is below that of a counting baseline (%s: %.4f): %s",
            metric,
            value,
            name,
            bar,
            WITH_COUNTERS if counts else WITHOUT_COUNTERS,
        )
