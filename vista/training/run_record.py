"""What a run writes about itself: run.json, metrics.jsonl, and its copy in a tracker."""

from __future__ import annotations

import json
from collections.abc import Collection
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from vista.config import TrainConfig
from vista.config.config_keys import flat_settings
from vista.files import replace_text
from vista.installation import __version__, source_commit
from vista.model.ranking_model import RankingModel
from vista.runs.tracking import TrackedRun, plot_curves
from vista.training.metrics_writer import MetricsWriter
from vista.training.validation import Validation


class RunRecord(MetricsWriter):
    """The metrics of a run, with run.json: {state, reason, metric, parameters, commit, vista, began, ended}.

    The state is running, finished, stopped (Ctrl-C), or failed, with the error as reason. A process that was killed
    leaves `running`; the lock of train.log tells that it has ended (`vista.training.run_folder.log_file`).
    """

    def __init__(self, config: TrainConfig, model: RankingModel, validation: Validation | None) -> None:
        """
        Args:
            config: of the run, with the settings that training chose.
            validation: None if the run has none.
        """
        super().__init__(Path(config.run_dir))
        self._config = config
        self._tracked = TrackedRun(self.run_dir, config.tracking)
        self._facts: dict[str, Any] = {
            "state": "running",
            "reason": None,
            "metric": None if validation is None else validation.metric,
            "parameters": num_parameters(model),
            "vista": __version__,
            "began": None,
            "ended": None,
        }

    def __enter__(self) -> RunRecord:
        return self

    def rewind(self, step: int, validated: Collection[int]) -> list[dict[str, Any]]:
        """As in `MetricsWriter`, and begin to record the run.

        Raises:
            TrackingError: the tracker does not answer.
        """
        rows = super().rewind(step, validated)
        self._facts |= {"commit": _loaded_commit(), "began": _now()}
        self._save()
        tags = {
            "vista": __version__,
            "commit": self._facts["commit"],
            "run_dir": str(self.run_dir.absolute()),
            "parameters": str(self._facts["parameters"]),
        }
        self._tracked.start(flat_settings(self._config), tags, rows, is_new=step == 0)
        return rows

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which holds `step`."""
        super().write(row)
        self._tracked.log(row)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Record how the run ended.

        Raises:
            TrackingError: the run has finished, but the tracker lacks a part of it.
        """
        if self._facts["began"] is None:
            return  # another rank, or an error before the run
        state = "finished" if kind is None else "stopped" if kind is KeyboardInterrupt else "failed"
        reason = None if error is None or state == "stopped" else f"{type(error).__name__}: {error}"
        self._facts |= {"state": state, "reason": reason, "ended": _now()}
        self._save()
        files = None
        if kind is None and self._tracked.is_open:
            curves = plot_curves(self.run_dir, self.rows(), self._facts["metric"])
            files = [self.run_dir / "config.yaml", self.run_dir / "best" / "README.md", curves]
        self._tracked.close(files)

    def _save(self) -> None:
        replace_text(self.run_dir / "run.json", json.dumps(self._facts, indent=1) + "\n")


def num_parameters(model: RankingModel) -> int:
    """Trained numbers of a model, with all rows of a table that is divided among ranks."""
    own = sum(parameter.numel() for parameter in model.parameters())
    return own - model.item_table.numel() + model.table_shape.numel()


@cache
def _loaded_commit() -> str:
    """The commit of the sources that this process has loaded: it stays that of its first run."""
    return source_commit()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
