"""MLflow: a database, or a server."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from vista.installation import require_module
from vista.tracking.tracker import TrackedFolder

LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "10", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}
"""Timeout in seconds, and number of retries, of a request. MLflow's defaults would block training for minutes."""
MAX_PARAM = 500
"""Maximum length of a parameter that every version of an MLflow server accepts, in characters."""


class MlflowTracker:
    """A run of MLflow, in the experiment that `tracking.project` names."""

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        self._mlflow = require_module("mlflow", "mlflow")
        self._client = self._mlflow.MlflowClient(tracking_uri=folder.tracking.server)
        if run_id is None:
            self.run_id = self._new_run(folder)
        else:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")

    def _new_run(self, folder: TrackedFolder) -> str:
        project = folder.tracking.project
        experiment = self._client.get_experiment_by_name(project)
        number = self._client.create_experiment(project) if experiment is None else experiment.experiment_id
        made = self._client.create_run(number, tags=dict(folder.tags), run_name=folder.run_dir.name)
        params = [self._mlflow.entities.Param(name, str(value)[:MAX_PARAM]) for name, value in folder.settings.items()]
        for start in range(0, len(params), 100):  # the most that a server accepts at once
            self._client.log_batch(made.info.run_id, params=params[start : start + 100])
        return str(made.info.run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        now = time.time_ns() // 1_000_000
        metrics = [self._mlflow.entities.Metric(metric_name(name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self.run_id, metrics=metrics)

    def close(self, files: Sequence[Path] | None) -> None:
        """As `Tracker.close`."""
        for path in files or ():
            self._client.log_artifact(self.run_id, str(path))
        self._client.set_terminated(self.run_id, "KILLED" if files is None else "FINISHED")


def metric_name(name: str) -> str:
    """A name that MLflow accepts: `ndcg@10` becomes `ndcg_at_10`."""
    return re.sub(r"[^\w\-. :/]", "_", name.replace("@", "_at_"))
