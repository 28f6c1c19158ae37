"""The list of all runs in a folder."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista.config.choices import RunOrder
from vista.errors import ConfigError
from vista.runs.metric_order import badness
from vista.runs.run_files import is_run
from vista.runs.run_summary import RunSummary
from vista.text_table import terminal_width, text_table, wrapped

MAX_DEPTH = 4
"""Maximum depth of run folders below the given folder."""


@dataclass(frozen=True, slots=True)
class RunList:
    """Runs in the order in which they are shown."""

    folder: Path
    runs: list[RunSummary]
    metric: str | None
    """The validation metric to show; None shows the metric by which each run's best model was selected."""

    @classmethod
    def of(cls, folder: Path, order: RunOrder, metric: str | None = None) -> RunList:
        """Read all runs in a folder and in the folders in it.

        Raises:
            ConfigError: the folder does not exist, or no run has the metric.
        """
        if not folder.is_dir():
            raise ConfigError(f"folder={folder}: is not a folder; name the folder that contains the run folders")
        runs = [RunSummary.of(path, str(path.relative_to(folder))) for path in run_folders(folder)]
        known = sorted({name for run in runs for name in run.validation})
        if metric is not None and metric not in known:
            use = f"use one of {', '.join(known)}" if known else "no run has been validated"
            raise ConfigError(f"metric={metric}: no run has it; {use}")
        listed = cls(folder, runs, metric)
        runs.sort(key=lambda run: listed._place(run, order))
        return listed

    def __str__(self) -> str:
        if not self.runs:
            return f"no runs in {self.folder}; `vista train run_dir={self.folder}/NAME` makes one"
        names = {name for run in self.runs if (name := self._metric_of(run)) is not None}
        common = names.pop() if len(names) == 1 else None
        header = ["run", "state", common or "best", *([] if common else ["metric"]), "epoch", "test", "seconds"]
        rows = []
        for run in self.runs:
            name = self._metric_of(run) or ""
            cells = [run.name, run.state, _decimal(run.validation.get(name))]
            cells += [] if common else [name]
            cells += [str(run.epoch or ""), _decimal(run.test.get(name))]
            cells += ["" if run.seconds is None else f"{run.seconds:,.1f}"]
            rows.append([*cells, "" if run.parameters is None else f"{run.parameters:,}", run.commit or ""])
        width = terminal_width()
        lines = [text_table([*header, "parameters", "commit"], rows, width)]
        lines += [wrapped(f"{run.name}: {run.state}: {run.reason}", width, "  ") for run in self.runs if run.reason]
        return "\n".join(lines)

    def to_list(self) -> list[dict[str, Any]]:
        """JSON values of each run, without its settings."""
        return [
            {
                "run": run.name,
                "path": str(run.path),
                "state": run.state,
                "reason": run.reason,
                "metric": self._metric_of(run),
                "best": run.validation.get(self._metric_of(run) or ""),
                "epoch": run.epoch,
                "validation": dict(run.validation),
                "test": dict(run.test),
                "seconds": run.seconds,
                "parameters": run.parameters,
                "commit": run.commit,
            }
            for run in self.runs
        ]

    def _metric_of(self, run: RunSummary) -> str | None:
        return self.metric or run.metric

    def _place(self, run: RunSummary, order: RunOrder) -> tuple[Any, ...]:
        """A sort key; runs without the value to sort by come last."""
        name = self._metric_of(run) or ""
        value = run.validation.get(name)
        decides: float | None = None
        if order is RunOrder.best and value is not None:
            decides = badness(name, value)
        elif order is RunOrder.newest:
            decides = -run.changed_ns
        elif order in (RunOrder.seconds, RunOrder.parameters):
            decides = getattr(run, order.value)
        group = name if order is RunOrder.best else ""
        return decides is None, group, decides or 0, run.name


def run_folders(folder: Path) -> list[Path]:
    """The run folders in a folder, in the order of their paths; the folder itself if it is one."""
    found = []
    for path, folders, _ in os.walk(folder):
        here = Path(path)
        if is_run(here):
            found.append(here)
            folders.clear()
        elif len(here.relative_to(folder).parts) >= MAX_DEPTH:
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith(".")]
    return sorted(found)


def _decimal(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
