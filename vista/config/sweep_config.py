"""Configuration of `vista sweep`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vista.config.checks import check_types, require, require_counts
from vista.config.choices import Sampler

TPE_TRIALS = 20


@dataclass(kw_only=True, slots=True)
class SweepConfig:
    """Training runs over several seeds and settings."""

    train: list[str] = field(default_factory=list)
    """Settings of `vista train`. At least one of them must have several values. On the command line, write them without
    this key, such as seed=1,2,3: every argument whose key is not listed here is a setting of `vista train`."""
    train_file: str | None = None
    """YAML file with settings of `vista train`. Settings in `train` override it."""
    folder: str = "runs/sweep"
    """Folder for the run folders, one per setting and seed, and for results.md."""
    sampler: Sampler = Sampler.grid
    """grid trains every combination of the values. tpe (extra `optuna`) chooses settings based on the validation
    metrics of earlier ones, from values and from intervals such as tag(log,interval(1e-4,1e-2))."""
    trials: int | None = None
    """With sampler=tpe: number of settings to train. null means 20."""

    def __post_init__(self) -> None:
        check_types(self)
        require_counts(self, "", ("trials",), most=10_000)
        require(
            self.trials is None or self.sampler is Sampler.tpe,
            "trials",
            "only applies with sampler=tpe; a grid trains every combination of its values",
        )
