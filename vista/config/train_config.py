"""Configuration of `vista train`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import (
    Architecture,
    Counting,
    Precision,
    Search,
    Split,
    Stage,
)
from vista.config.data_config import PLACES, DataConfig
from vista.config.model_config import ModelConfig
from vista.config.optim_config import OptimConfig


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    stage: Stage = Stage.joint
    base: str | None = None
    """stage=downstream: folder of the exported model whose item table, event encoder and stage 1 stay as they are."""
    store: str | None = None
    """stage=downstream: folder of the base's store; labels begin at the `until` that it was refreshed with."""
    authentication_key_file: str | None = None
    """Key of the store's records, 32 bytes or 64 hex digits; null takes VISTA_AUTHENTICATION_KEY, or none."""
    run_dir: str = "runs/vista"
    """Receives config.yaml, train.log, metrics.jsonl, checkpoints/ and best/ (the export)."""
    seed: int = 1
    """Of initial weights, order, cuts, negatives and dropout."""
    device: str = "auto"
    """auto | cpu | cuda | cuda:N."""
    precision: Precision = Precision.auto
    num_threads: int = 0
    """CPU threads; 0 leaves torch's own choice."""
    checkpoint_every: int = 200
    """Steps between checkpoints; one is written after each epoch too."""
    resume: bool = True
    """Go on from the newest checkpoint of run_dir if there is one."""
    tensorboard: bool = False
    """Also write TensorBoard events (extra `tensorboard`)."""
    progress: bool = True
    """Show a progress bar."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("checkpoint_every",))
        require_counts(self, "", ("seed", "num_threads"), least=0)
        spacing, tail_len = self.data.label_spacing, self.model.tail_len
        message = f"must be at most model.tail_len={tail_len}, or some labels would see no tail; got {spacing}"
        require(spacing <= tail_len, "data.label_spacing", message)
        hard = self.model.search is Search.hard
        message = "is SIM's; set model.architecture=sim"
        require(not hard or self.model.architecture is Architecture.sim, "model.search", message)
        message = "is needed with model.search=hard" if hard else "is for model.search=hard; leave it out"
        require((self.data.item_categories is not None) == hard, "data.item_categories", message)
        message = "is read by architectures that rank next items; leave it out"
        require(self.data.unknown_share == 0 or not self.model.architecture.ranks_only, "data.unknown_share", message)
        unread = self.data.negative_power == 0 and self.optim.logq_strength == 1
        message = "nothing here reads frequencies; set data.negative_power above 0, or optim.logq_strength below 1"
        require(self.data.frequencies is Counting.exact or not unread, "data.frequencies", message)
        downstream = self.stage is Stage.downstream
        for key in ("base", "store"):
            message = "is needed with stage=downstream" if downstream else "is for stage=downstream; leave it out"
            require((getattr(self, key) is not None) == downstream, key, message)
        if downstream:
            vista, time = self.model.architecture is Architecture.vista, self.data.split is Split.time
            require(vista, "model.architecture", "stage=downstream needs vista: a baseline has no summaries")
            message = "stage=downstream needs time: labels lie between the store's `until` and data.validation_from"
            require(time, "data.split", message)

    @property
    def trains_next(self) -> bool:
        """Whether the next item is trained: by the retrieval head, where the architecture has one."""
        return self.optim.next_weight > 0 and not self.model.architecture.ranks_only


def without_places(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Groups model, data and optim of `to_dict(TrainConfig)`, less PLACES: what a run depends on wherever it lies."""
    groups = ("model", "data", "optim")
    return {group: {k: v for k, v in values[group].items() if k not in PLACES} for group in groups if group in values}
