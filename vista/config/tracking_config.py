"""Configuration of experiment tracking."""

from __future__ import annotations

from dataclasses import dataclass

from vista.config.checks import check_types, require
from vista.config.choices import TrackerKind


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """The tracker that gets the metrics, settings, model card, and plots of a run, in addition to its own folder."""

    kind: TrackerKind = TrackerKind.none
    """none, or a tracker. Each tracker needs the extra with its name."""
    server: str | None = None
    """With kind=mlflow: URL of a server, such as http://host:5000, or of a database, such as sqlite:///runs/mlflow.db.
    With kind=wandb: URL of your own server. null uses the tracker's own settings, such as the environment variable
    MLFLOW_TRACKING_URI."""
    project: str = "vista"
    """Experiment of MLflow, or project of Weights & Biases."""
    offline: bool = False
    """With kind=wandb: write to <run_dir>/wandb instead of a server. `wandb sync` uploads the run later."""

    def __post_init__(self) -> None:
        check_types(self, "tracking.")
        has_server = self.kind in (TrackerKind.mlflow, TrackerKind.wandb)
        require(
            has_server or self.server is None,
            "tracking.server",
            "only applies with tracking=mlflow and tracking=wandb; set one of them, or leave this out",
        )
        require(
            self.kind is TrackerKind.wandb or not self.offline,
            "tracking.offline",
            "only applies with tracking=wandb; set that, or leave this out",
        )
        require(bool(self.project.strip()), "tracking.project", "is empty; give the project a name")
