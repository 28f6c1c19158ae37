"""The curves of a run, which can be unfinished or damaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vista.runs.curve_points import thinned
from vista.runs.run_files import RunFiles
from vista.runs.run_summary import RunSummary

NOT_CURVES = ("step", "epoch", "seconds")
MAX_POINTS = 1_000
"""Points per curve that are sent to the browser."""


@dataclass(frozen=True, slots=True)
class RunCurves:
    """The measurements of one run."""

    summary: RunSummary
    training: list[dict[str, Any]] = field(default_factory=list)
    """One row per step and value: step, name, value."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    """Likewise, and whether the step was the best so far, `is_best`."""
    last_step: int = 0
    epochs: int = 0
    best_step: int | None = None
    """The last validation that was exported."""
    problems: list[str] = field(default_factory=list)
    """What the page should say about the run; empty for a finished one."""

    @classmethod
    def of(cls, folder: Path) -> RunCurves:
        """Read a run folder. What a crash left half written is listed in `problems`; the rest is shown."""
        files = RunFiles.read(folder)
        summary = RunSummary.of_files(files, str(folder))
        problems = [f"{summary.state}: {summary.reason}"] if summary.reason else []
        if files.num_unread:
            rest = files.num_unread - 1
            more = f", nor are the {rest} lines after it" if rest else ""
            line = len(files.rows) + 1
            problems.append(f"line {line} of metrics.jsonl is incomplete, as after a crash, and is not shown{more}")
        # A training row has the index of its epoch, from 0; a validation row, the number of completed epochs.
        epochs = [row["epoch"] + 1 for row in files.steps] + [row["epoch"] for row in files.validations]
        return cls(
            summary,
            _thinned([point for row in files.steps for point in _points(row, row)]),
            [
                {**point, "is_best": bool(row.get("is_best"))}
                for row in files.validations
                for point in _points(row, row["validation"])
            ],
            max((row["step"] for row in files.rows), default=0),
            max(epochs, default=0),
            files.best.get("step"),
            problems,
        )

    def names(self, kind: str) -> list[str]:
        """Names of the curves of "training" or "validation", as they appear first."""
        return list(dict.fromkeys(row["name"] for row in getattr(self, kind)))

    def curve(self, kind: str, name: str) -> list[dict[str, Any]]:
        """One curve as rows of run, step, and value."""
        return [
            {"run": self.summary.name, "step": point["step"], "value": point["value"]}
            for point in getattr(self, kind)
            if point["name"] == name
        ]


def _points(row: dict[str, Any], values: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"step": row["step"], "name": name, "value": float(value)}
        for name, value in values.items()
        if name not in NOT_CURVES and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _thinned(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most MAX_POINTS points per curve."""
    by_name: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        by_name.setdefault(point["name"], []).append(point)
    return [point for curve in by_name.values() for point in thinned(curve, MAX_POINTS)]
