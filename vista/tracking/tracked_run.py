"""A run and its copy in a tracker. If the tracker fails, the run continues."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from vista.config.choices import TrackerKind
from vista.config.config_keys import without_password
from vista.config.train_config import TrackingConfig
from vista.errors import MissingDependencyError, TrackingError
from vista.files import read_limited, replace_text
from vista.installation import require_module
from vista.json_fields import NUMBER, check_fields, either, one_of, text, whole
from vista.tracking.mlflow_tracker import MlflowTracker
from vista.tracking.tensorboard_tracker import TensorboardTracker
from vista.tracking.tracker import TrackedFolder, Tracker
from vista.tracking.wandb_tracker import WandbTracker

logger = logging.getLogger(__name__)
STATE_FILE = "tracking.json"
_MAX_STATE_BYTES = 1 << 16
_FIELDS = {
    "tracker": text(),
    "server": either(one_of(None), text()),
    "project": text(),
    "id": text(),
    "step": whole(),
    "validation": whole(),
    "complete": one_of(True, False),
}
_TRACKERS: dict[TrackerKind, tuple[Callable[[TrackedFolder, str | None], Tracker], tuple[str, ...]]] = {
    TrackerKind.tensorboard: (TensorboardTracker, ("torch.utils.tensorboard",)),
    TrackerKind.mlflow: (MlflowTracker, ("sqlalchemy", "mlflow.entities")),
    TrackerKind.wandb: (WandbTracker, ("wandb",)),
}
"""Classes, and the modules that they import, from the extra that has the name of the tracker."""


def tracker_class(kind: TrackerKind) -> Callable[[TrackedFolder, str | None], Tracker]:
    """The class of a tracker.

    Raises:
        MissingDependencyError: its extra is not installed.
    """
    tracker, modules = _TRACKERS[kind]
    require_module("matplotlib.figure", "plots")
    for module in modules:
        require_module(module, kind.value)
    return tracker


class TrackedRun:
    """The copy of a run in a tracker. tracking.json in the run's folder says how much was sent.

    The run's own folder always has everything. A tracker that fails before the first step stops the run. One that fails
    later does not: it gets nothing more from this process, and `close` raises an error that says what is missing. The
    next process of the run, which may have nothing else left to do, begins with what is missing.
    """

    def __init__(self, run_dir: Path, tracking: TrackingConfig) -> None:
        self._run_dir, self._tracking = run_dir, tracking
        self._make = None if tracking.kind is TrackerKind.none else tracker_class(tracking.kind)
        self._tracker: Tracker | None = None
        self._failure: Exception | None = None
        self._state: dict[str, Any] = {}

    @property
    def is_open(self) -> bool:
        """Whether this process shows the run in a tracker."""
        return self._tracker is not None

    def is_complete(self) -> bool:
        """Whether the tracker has all of a finished run, or there is no tracker.

        Raises:
            TrackingError: tracking.json cannot be read.
        """
        return self._make is None or bool(self._read_state()["complete"])

    def start(
        self, settings: Mapping[str, Any], tags: Mapping[str, str], rows: Sequence[dict[str, Any]], *, is_new: bool
    ) -> None:
        """Create the tracked run, or continue it and send what is missing.

        Args:
            settings: of the run, flat.
            tags: as in `TrackedFolder`.
            rows: all rows of metrics.jsonl so far.
            is_new: whether the run begins, so that what an earlier run has left in the folder does not count.

        Raises:
            TrackingError: the tracker does not answer, or refuses the run. Nothing was trained.
        """
        if is_new:
            (self._run_dir / STATE_FILE).unlink(missing_ok=True)  # of an earlier run in this folder
        if self._make is None:
            return
        self._state = self._read_state()
        if self._state["complete"]:
            return
        folder = TrackedFolder(self._run_dir, self._tracking, settings, tags)
        try:
            self._tracker = self._make(folder, self._state["id"])
            self._state["id"] = self._tracker.run_id
            for row in rows:
                self._send(self._tracker, row)
            self._save_state()
        except MissingDependencyError:
            raise
        except Exception as error:  # each tracker has errors of its own, and those of its network library
            self._tracker = None
            raise TrackingError(
                f"tracking={self._name}: the run cannot be tracked ({_line(error)}), so nothing was trained. Fix "
                "this, or set tracking=none; rerunning the command with tracking later sends everything"
            ) from error

    def log(self, row: dict[str, Any]) -> None:
        """Send a row of metrics.jsonl. If that fails, one warning is logged, and nothing more is sent."""
        if self._tracker is None or self._failure is not None:
            return
        try:
            self._send(self._tracker, row)
            self._save_state()
        except Exception as error:  # as above; training must not end with a tracker
            self._fail(error)

    def close(self, files: Sequence[Path] | None) -> None:
        """End the tracked run.

        Args:
            files: as for `Tracker.close`.

        Raises:
            TrackingError: a finished run is not complete in the tracker.
        """
        if self._tracker is None:
            return
        if self._failure is None:
            try:
                self._tracker.close(files)
                self._state["complete"] = files is not None
                self._save_state()
            except Exception as error:  # as above
                self._fail(error)
        self._tracker = None
        if self._failure is not None and files is not None:
            raise TrackingError(
                f"tracking={self._name}: {self._missing()} ({_line(self._failure)}). The run itself is complete: "
                f"{self._run_dir} has the model and all metrics. Rerun the command once the tracker answers; it only "
                "sends what is missing"
            ) from self._failure

    def _send(self, tracker: Tracker, row: dict[str, Any]) -> None:
        kind = "validation" if "validation" in row else "step"
        if row["step"] <= self._state[kind]:
            return  # by an earlier process; a resumed run computes the same again
        values = {**row, **row.get("validation", {})}
        numbers = {name: value for name, value in values.items() if NUMBER.holds(value) and name != "step"}
        tracker.log(row["step"], numbers)
        self._state[kind] = row["step"]

    def _fail(self, error: Exception) -> None:
        self._failure = error
        logger.warning(
            "tracking=%s failed (%s): %s; training continues, and %s has all metrics",
            self._name,
            _line(error),
            self._missing(),
            self._run_dir,
        )

    def _missing(self) -> str:
        return f"the tracker lacks the metrics after step {max(self._state['step'], self._state['validation'])}"

    @property
    def _name(self) -> str:
        server = self._tracking.server
        return self._tracking.kind.value + (f" ({without_password(server)})" if server is not None else "")

    def _read_state(self) -> dict[str, Any]:
        """The content of tracking.json, or that of a new run if there is none, or another tracker has the run."""
        path, server = self._run_dir / STATE_FILE, self._tracking.server
        place = {
            "tracker": self._tracking.kind.value,
            "server": None if server is None else without_password(server),
            "project": self._tracking.project,
        }
        try:
            state = json.loads(read_limited(path, _MAX_STATE_BYTES))
            check_fields(state, _FIELDS)
        except FileNotFoundError:
            state = {}
        except (OSError, ValueError, RecursionError) as error:
            raise TrackingError(f"{path}: cannot be read ({_line(error)}); remove it to track a new run") from error
        continues = all(state.get(key) == value for key, value in place.items())
        return dict(state) if continues else place | {"id": None, "step": 0, "validation": 0, "complete": False}

    def _save_state(self) -> None:
        replace_text(self._run_dir / STATE_FILE, json.dumps(self._state) + "\n")


def _line(error: BaseException) -> str:
    """An error as part of a line."""
    words = " ".join(str(error).split())
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__
