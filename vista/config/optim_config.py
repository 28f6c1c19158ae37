"""Configuration of optimizer, losses and schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts, require_finite


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW for the network, SparseAdam for the item table, losses and schedule."""

    learning_rate: float = 2e-3
    """Peak, reached after the warm-up; cosine decay from there."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW; not of the item table."""
    warmup_steps: int = 100
    """Steps of linear rise to the peak."""
    gradient_clip: float = 1.0
    """Largest global norm."""
    epochs: int = 10
    """Passes over the training histories."""
    next_weight: float = 1.0
    """lambda_next: sampled softmax over next items."""
    logq_strength: float = 1.0
    """Share of the log popularity that scores may learn: 1 is the plain softmax, 0 takes all of it out of them."""
    task_weight: float = 1.0
    """Weight of each task's binary cross-entropy, where the log has impressions."""
    tasks: list[str] = field(default_factory=list)
    """Labelled tasks that are trained, by their names in the log; empty means all."""
    reconstruction_weight: float = 0.1
    """lambda_rec."""
    patience: int = 0
    """Validations without improvement before training stops; 0 never stops early."""
    validate_every: int = 1
    """Epochs between validations, of which the last epoch always has one; 0 never validates."""
    validation_users: int = 2000
    """Users a validation ranks at most (the same every time; 0: all), and four times as many impressions."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require_finite(self, "optim.", ("learning_rate", "gradient_clip"), positive=True)
        require_finite(self, "optim.", ("weight_decay", "next_weight", "task_weight", "reconstruction_weight"))
        counts = ("epochs", "warmup_steps", "patience", "validate_every", "validation_users")
        require_counts(self, "optim.", counts, least=0)
        require(self.task_weight > 0 or not self.tasks, "optim.tasks", "needs optim.task_weight above 0; set it to 1")
        require(0 <= self.logq_strength <= 1, "optim.logq_strength", f"must lie in [0, 1], got {self.logq_strength}")
