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
