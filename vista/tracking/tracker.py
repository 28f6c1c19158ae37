"""The interface of all trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vista.config.train_config import TrackingConfig


@dataclass(frozen=True, slots=True)
class TrackedFolder:
    """The run that a tracker shows."""

    run_dir: Path
    tracking: TrackingConfig
    settings: Mapping[str, Any]
    """All settings of the run, flat: {"model.dim": 64, …}."""
    tags: Mapping[str, str]
    """Other facts that identify the run, such as the commit of vista."""


class Tracker(Protocol):
    """One run in a tracker. After an exception, the data of that call may be missing in the tracker."""

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        """Connect, and create the run, or continue the run of an earlier process."""

    @property
    def run_id(self) -> str:
        """The values that a later process needs to continue the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step. Steps never decrease."""

    def close(self, files: Sequence[Path] | None) -> None:
        """End the run.

        Args:
            files: of a finished run, to show with it: Markdown, YAML, and PNG. None if the run has only stopped.
        """
