"""Runs side by side: the settings in which they differ, and their metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vista.config.config_keys import value_text
from vista.errors import ConfigError
from vista.runs.metric_order import best_places
from vista.runs.run_files import is_run
from vista.runs.run_summary import RunSummary
from vista.text_table import terminal_width, text_table, wrapped

PLACES = ("run_dir",)
"""Settings that differ between any two runs."""
_MISSING = object()


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs or more."""

    runs: list[RunSummary]

    @classmethod
    def of(cls, paths: Sequence[str]) -> RunComparison:
        """Read the folders of runs.

        Raises:
            ConfigError: there are fewer than two, or one is not the folder of a run.
        """
        if len(paths) < 2:
            raise ConfigError("runs: name two or more run folders, such as runs=[runs/a,runs/b]")
        for path in paths:
            if not is_run(Path(path)):
                raise ConfigError(f"runs: {path} is not a run folder; `vista runs folder=...` lists the run folders")
        return cls([RunSummary.of(Path(path), name) for path, name in zip(paths, _names(paths), strict=True)])

    def differences(self) -> dict[str, list[Any]]:
        """Settings that differ, with the value of each run; `absent` if a run has no such setting."""
        keys = dict.fromkeys(key for run in self.runs for key in run.settings if key not in PLACES)
        values = {key: [run.settings.get(key, _MISSING) for run in self.runs] for key in keys}
        return {
            key: ["absent" if value is _MISSING else value for value in row]
            for key, row in values.items()
            if any(value != row[0] for value in row)
        }

    def metrics(self) -> dict[str, list[float | None]]:
        """{"validation ndcg@10": [value of each run], "test ndcg@10": …}."""
        rows: dict[str, list[float | None]] = {}
        for part in ("validation", "test"):
            for name in dict.fromkeys(name for run in self.runs for name in getattr(run, part)):
                rows[f"{part} {name}"] = [getattr(run, part).get(name) for run in self.runs]
        return rows

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "runs": [str(run.path) for run in self.runs],
            "settings": self.differences(),
            "metrics": self.metrics(),
        }

    def __str__(self) -> str:
        width, names = terminal_width(), [run.name for run in self.runs]
        settings = [[key, *map(value_text, row)] for key, row in self.differences().items()]
        measured = [["state", *(run.state for run in self.runs)]]
        for name, values in self.metrics().items():
            marks = best_places(name.partition(" ")[2], values)
            cells = ["" if value is None else f"{value:.4f}" for value in values]
            measured.append([name, *(cell + "*" * mark for cell, mark in zip(cells, marks, strict=True))])
        for key in ("epoch", "seconds", "parameters", "commit"):
            found = [getattr(run, key) for run in self.runs]
            measured.append([key, *("" if value is None else _shown(value) for value in found)])
        lines = [text_table(["setting", *names], settings, width) if settings else "the settings are the same", ""]
        lines += [text_table(["", *names], measured, width), "* the best of a row"]
        lines += [wrapped(f"{run.name}: {run.state}: {run.reason}", width, "  ") for run in self.runs if run.reason]
        return "\n".join(lines)


def _shown(value: object) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _names(paths: Sequence[str]) -> list[str]:
    """The last parts of paths, or if these are not unique the paths."""
    last = [Path(path).resolve().name for path in paths]
    return last if len(set(last)) == len(last) else list(paths)
