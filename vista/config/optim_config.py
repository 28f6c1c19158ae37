"""Configuration of the optimizer, the losses, and the schedule."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts, require_finite, require_share
from vista.config.choices import TableOptimizer


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """AdamW for the network, the optimizer of the item table, the losses, and the schedule."""

    learning_rate: float = 2e-3
    """Peak learning rate, reached after the warm-up and followed by cosine decay."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW) of the network. The item table has none."""
    table_rate: float = 1.0
    """Learning rate of the item table, as a multiple of the network's. 0 keeps the table as it is before training."""
    table_optimizer: TableOptimizer = TableOptimizer.adam
    """Optimizer of the item table. rowwise_adagrad takes less memory, and needs model.table=torchrec."""
    counted_rate: float = 5.0
    """With model.counters or model.popularity: learning rate of their heads, as a multiple of the network's."""
    warmup_steps: int | None = None
    """Number of steps over which the learning rate rises linearly to its peak. null: 3% of the steps; with
    optim.minutes, 50 steps and at most a tenth of all."""
    gradient_clip: float = 1.0
    """Maximum global norm of the gradient."""
    epochs: int | None = None
    """Maximum number of epochs, which are passes over the training histories. null: enough for about 1,000 steps with
    model.counters, else about 3,000, and at most 30 epochs. With optim.minutes and no counters, only the time limits
    training."""
    minutes: float | None = None
    """Maximum number of minutes that training takes, validation included. vista times the first steps to decide how
    many fit, and decays the learning rate over them. If optim.epochs or model.counters limits training further, it ends
    earlier. null: no time limit."""
    next_weight: float | None = None
    """Weight of the sampled softmax over next items. 0 turns off next-item training and validates on windows instead.
    null: 0 if model.counters is on, windows are trained, and data.split is time or share; else 1."""
    window_weight: float | None = None
    """Weight of the softmax over the items of the window that follows a question (`data.horizon_events`). 0 does not
    train windows. null: 1 with model.counters, else 0."""
    logq_strength: float = 1.0
    """How much of the items' log popularity the next-item scores learn, in [0, 1]. 1 is the plain softmax; 0 removes
    popularity from the scores."""
    task_weight: float = 1.0
    """Weight of each task's binary cross-entropy, if the log has impressions. 0 trains no task."""
    tasks: list[str] = field(default_factory=list)
    """Names of the tasks to train, as in the log. Empty means all."""
    reconstruction_weight: float = 0.1
    """Weight of the reconstruction loss. 0 does not train reconstruction."""
    patience: int = 0
    """Number of validations without improvement after which training stops. 0 never stops early."""
    validate_every: int = 1
    """Number of epochs between validations; the last epoch always has one. 0 never validates."""
    validation_users: int = 2000
    """Maximum number of users that a validation ranks, the same users every time; impressions are limited to four times
    as many. 0 means no limit."""

    def __post_init__(self) -> None:
        check_types(self, "optim.")
        require_finite(self, "optim.", ("learning_rate", "gradient_clip", "minutes"), positive=True)
        weights = ("next_weight", "window_weight", "task_weight", "reconstruction_weight")
        require_finite(self, "optim.", ("weight_decay", "table_rate", "counted_rate", *weights))
        counts = ("epochs", "warmup_steps", "patience", "validate_every", "validation_users")
        require_counts(self, "optim.", counts, least=0)
        require(self.task_weight > 0 or not self.tasks, "optim.tasks", "needs optim.task_weight above 0; set that to 1")
        require_share(self, "optim.", ("logq_strength",))
