"""The results of a sweep."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev

from vista.runs.run_files import badness
from vista.sweep.trial import Trial
from vista.text_table import terminal_width, text_table, wrapped


@dataclass(slots=True)
class SweepReport:
    """The trials of a sweep, and the means of their validation metrics over seeds."""

    folder: Path
    num_trials: int = 0
    """Trials with results, including failed ones."""
    trials: dict[tuple[tuple[str, str], ...], list[Trial]] = field(default_factory=dict)
    """By setting."""

    def add(self, trials: list[Trial]) -> None:
        """Add the trials of one setting."""
        self.trials[tuple(trials[0].setting.items())] = trials
        self.num_trials = sum(map(len, self.trials.values()))

    def failed(self) -> list[Trial]:
        """The trials that are not finished."""
        return [trial for trials in self.trials.values() for trial in trials if trial.reason is not None]

    def not_tracked(self) -> list[Trial]:
        """Finished trials that are incomplete in the tracker."""
        return [trial for trials in self.trials.values() for trial in trials if trial.note is not None]

    def markdown(self) -> str:
        """The results as Markdown."""
        header, rows = self._table()
        lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
        return "\n".join(["# Results", "", *lines, "", *(f"- {line}" for line in self._remarks())]) + "\n"

    def __str__(self) -> str:
        width = terminal_width()
        header, rows = self._table()
        return "\n".join([text_table(header, rows, width), *(wrapped(line, width, "  ") for line in self._remarks())])

    def _table(self) -> tuple[list[str], list[list[str]]]:
        metric = next((name for trial in self._all() if (name := trial.run.metric)), "validation")
        rows = []
        for setting, trials in sorted(self.trials.items(), key=lambda item: _place(item[1])):
            values, seconds = (
                values_of(trials),
                [trial.run.seconds for trial in trials if trial.run.seconds is not None],
            )
            error = stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
            rows.append(
                [
                    " ".join(f"{key}={value}" for key, value in setting) or "all",
                    f"{fmean(values):.4f}" if values else "",
                    "" if error is None else f"{error:.4f}",
                    str(len(trials)) if len(values) == len(trials) else f"{len(values)} of {len(trials)}",
                    f"{fmean(seconds):,.1f}" if seconds else "",
                ]
            )
        return ["setting", metric, "standard error", "runs", "seconds"], rows

    def _remarks(self) -> Iterator[str]:
        yield f"Means of the best validation metrics over runs, with standard errors, best first. Runs: {self.folder}"
        for trial in self._all():
            if trial.reason is not None:
                yield f"{trial.run.name} failed: {trial.reason}"
            elif trial.note is not None:
                yield f"{trial.run.name} is finished, but {trial.note}"

    def _all(self) -> Iterator[Trial]:
        return (trial for trials in self.trials.values() for trial in trials)


def values_of(trials: list[Trial]) -> list[float]:
    """The best validation metric of each finished trial that has one."""
    return [trial.run.best for trial in trials if trial.reason is None and trial.run.best is not None]


def mean_badness(trials: list[Trial]) -> float | None:
    """A number that is smaller for a better setting; None if not all of its trials have a result."""
    values = values_of(trials)
    if len(values) < len(trials):
        return None
    name = trials[0].run.metric
    return None if name is None else badness(name, fmean(values))


def _place(trials: list[Trial]) -> tuple[bool, float]:
    known = [trial for trial in trials if trial.reason is None and trial.run.best is not None]
    found = mean_badness(known) if known else None
    return found is None, found or 0.0
