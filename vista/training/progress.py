"""How far a training run has come."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class Progress:
    """What a checkpoint holds besides tensors."""

    epoch: int = 0
    batch: int = 0
    """Batches done in this epoch."""
    step: int = 0
    planned_steps: int = 0
    """With optim.minutes: the number of steps that fit, 0 until the first steps have been timed. It never changes after
    that, so that a resumed run ends at the same step."""
    best: float | None = None
    """Best value of the validation metric so far."""
    bad_validations: int = 0
    """Validations since the best one."""
    stopped: bool = False
    """Whether training stopped early."""
    seconds: float = 0.0
    """Time spent on the run, validation included, in all processes that worked on it."""
    history: list[dict[str, float]] = field(default_factory=list)
    """Validation metrics, one entry per validation."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """Validation metrics of the counting baselines, by name."""

    @property
    def planned_steps_done(self) -> bool:
        """Whether the steps that fit into optim.minutes are done."""
        return 0 < self.planned_steps <= self.step

    def finished(self, epochs: int | None) -> bool:
        """Whether training ends here.

        Args:
            epochs: optim.epochs.
        """
        return self.stopped or self.planned_steps_done or (epochs is not None and self.epoch >= epochs)

    def share_done(self, epochs: int | None, batches: int) -> float:
        """Share of the training that is done, in an epoch of this number of batches; 0 if nothing is planned yet."""
        if self.planned_steps:
            return self.step / self.planned_steps
        return 0.0 if epochs is None else (self.epoch + self.batch / batches) / epochs
