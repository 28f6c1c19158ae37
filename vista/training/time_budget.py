"""How many steps fit into optim.minutes."""

from __future__ import annotations

import logging

from vista.config import OptimConfig
from vista.training.progress import Progress

logger = logging.getLogger(__name__)
SKIPPED_STEPS = 5
"""First steps, which are slow because memory and caches are cold."""
TIMED_STEPS = 20
RESERVE = 0.03
"""Share of the time that checkpoints and the export take."""


class TimeBudget:
    """Times the first steps of a process, until they tell how many steps fit."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes
        self._seconds: list[float] = []

    def add(self, seconds: float) -> bool:
        """Add the time of a step; returns whether enough steps have been timed."""
        self._seconds.append(seconds)
        return len(self._seconds) >= SKIPPED_STEPS + TIMED_STEPS

    @property
    def seconds_per_step(self) -> float:
        """Mean time of a step."""
        timed = self._seconds[SKIPPED_STEPS:]
        return sum(timed) / len(timed)

    def planned_steps(self, progress: Progress, validation: float, batches: int, optim: OptimConfig) -> int:
        """Steps of the run: those that are done, and those that fit into the rest of the time and into optim.epochs.

        They are logged.

        Args:
            validation: seconds per validation; 0 without validations.
            batches: batches per epoch.
        """
        left = self.steps_left(progress.seconds, validation, batches * max(optim.validate_every, 1))
        steps = progress.step + left
        if optim.epochs is not None:
            steps = min(steps, optim.epochs * batches)
        logger.info(
            "optim.minutes=%g: %.1f s spent, %.4f s per step, %.1f s per validation: %d steps, %.1f epochs",
            self.minutes,
            progress.seconds,
            self.seconds_per_step,
            validation,
            steps,
            steps / batches,
        )
        return steps

    def steps_left(self, spent: float, validation: float, steps_per_validation: int) -> int:
        """Steps that fit into the rest of the time, with a validation after the last one.

        Args:
            spent: seconds of the run so far.
            validation: seconds per validation; 0 without validations.
            steps_per_validation: steps between two validations.
        """
        left = 60 * self.minutes * (1 - RESERVE) - spent - validation
        return max(int(left / (self.seconds_per_step + validation / steps_per_validation)), 0)
