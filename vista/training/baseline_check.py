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


def compare_with_baselines(progress: Progress, decided_by: str, metric: str, *, counts: bool) -> None:
    """Warn if the best model of a run ranks items worse than the best counting baseline.

    Args:
        decided_by: `Validation.metric`, by which that model was chosen.
        metric: `Validation.ranking_metric`, by which they are compared.
        counts: whether the model has counters.
    """
    best = [validated for validated in progress.history if validated[decided_by] == progress.best]
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
