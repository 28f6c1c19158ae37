"""The files of run folders, and the list of all runs in a folder: for `vista runs`, `vista explore`, `vista report`."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from vista.config.checks import RunOrder, check_size
from vista.config.composition import flattened, value_text
from vista.errors import ConfigError
from vista.files import NUMBER, RUN_FILES, check_fields, either, one_of, open_file, read_limited, text, whole
from vista.runs.tracking import rows_of
from vista.text_table import terminal_width, text_table, wrapped

T = TypeVar("T")
_LARGER = ("hr@", "ndcg@", "mrr@", "recall@", "precision@", "auc/", "gauc/")
"""Beginnings of the names of metrics that are better if they are larger."""

MAX_JSON_BYTES, MAX_METRICS_BYTES = 1 << 20, 1 << 28
_NOTE = either(one_of(None), text())
_FACTS = {
    "state": one_of("running", "finished", "stopped", "failed"),
    "reason": _NOTE,
    "metric": _NOTE,
    "parameters": whole(),
    "vista": text(),
    "commit": text(),
    "began": text(),
    "ended": _NOTE,
}

EPOCH_0 = "epoch-0"
"""Folder of the model after epoch 0, next to `best`, so that a report can say what attention adds to it."""


@dataclass(frozen=True, slots=True)
class RunFiles:
    """The content of a run folder, as far as it can be read."""

    path: Path
    facts: Mapping[str, Any]
    """run.json; empty if it cannot be read."""
    settings: Mapping[str, Any]
    """config.yaml, flat; empty if it cannot be read."""
    rows: list[dict[str, Any]]
    """metrics.jsonl, until a line that is not a row."""
    num_unread: int
    """Lines of metrics.jsonl after `rows`."""
    problems: list[str]
    """Files that are missing or cannot be read. Lines of metrics.jsonl are not listed: a crash can cut one off."""

    @classmethod
    def read(cls, path: Path) -> RunFiles:
        """Read the folder of a run. Files that cannot be read are listed in `problems` and raise no error."""
        problems: list[str] = []
        facts = _facts(path, problems)
        settings = read_settings(path, problems)
        metrics = _content(path / "metrics.jsonl", MAX_METRICS_BYTES, problems)
        rows = rows_of(metrics)
        return cls(path, facts, settings, rows, len(metrics.splitlines()) - len(rows), problems)

    @property
    def metrics_problem(self) -> str | None:
        """Why `rows` is empty or lacks the end of metrics.jsonl; None if all of it was read."""
        if self.num_unread:
            return f"line {len(self.rows) + 1} of metrics.jsonl cannot be read"
        return next((problem for problem in self.problems if problem.startswith("metrics.jsonl ")), None)

    @property
    def steps(self) -> list[dict[str, Any]]:
        """Rows of training steps."""
        return [row for row in self.rows if "loss" in row]

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Rows of validations, whose `validation` is {metric: value}."""
        return [row for row in self.rows if isinstance(row.get("validation"), dict)]

    @property
    def best(self) -> dict[str, Any]:
        """The row of the validation whose model was exported; empty if there is none."""
        return next((row for row in reversed(self.validations) if row.get("is_best") is True), {})


def is_run(path: Path) -> bool:
    """Whether a folder is a run folder, complete or not."""
    return any((path / file).is_file() for file in RUN_FILES)


def read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    """All settings of a run, flat; empty if config.yaml cannot be read, which is added to the problems."""
    content = _content(path / "config.yaml", MAX_JSON_BYTES, problems)
    try:
        check_size(content)
        settings = yaml.safe_load(content)
        settings = flattened(settings) if isinstance(settings, dict) else {}
        for key, value in settings.items():
            f"{key}={value_text(value)}".encode()  # an escape can stand for half of a character, which no page can show
    except (yaml.YAMLError, ValueError, OverflowError, RecursionError) as error:
        problems.append(f"config.yaml cannot be read ({' '.join(str(error).split())})")
        return {}
    return settings


def _content(path: Path, limit: int, problems: list[str]) -> str:
    try:
        return read_limited(path, limit).decode("utf-8", errors="replace")
    except FileNotFoundError:
        problems.append(f"{path.name} is missing")
    except OSError as error:
        problems.append(f"{path.name} cannot be read ({error.strerror})")
    return ""


def _facts(path: Path, problems: list[str]) -> dict[str, Any]:
    if not (content := _content(path / "run.json", MAX_JSON_BYTES, problems)) and problems:
        return {}
    try:
        facts = json.loads(content)
        check_fields(facts, _FACTS)
    except (ValueError, RecursionError) as error:
        problems.append(f"run.json cannot be read ({error})")
        return {}
    return dict(facts)


def thinned(points: Sequence[T], limit: int) -> list[T]:
    """At most `limit` (two or more) of the points, evenly chosen, with the first and the last one."""
    if len(points) <= limit:
        return list(points)
    return [points[place] for place in np.linspace(0, len(points) - 1, limit).round().astype(int).tolist()]


def badness(name: str, value: float) -> float | None:
    """A number that is smaller for better values of a metric; None if no value of it is better than another."""
    return {"lower is better": value, "best at 1": abs(value - 1), "higher is better": -value}.get(better_values(name))


def better_values(name: str) -> str:
    """Which values of a metric are better, in words; "" if none is better than another."""
    name = name.removeprefix("validation ")
    if name.startswith("ne/"):
        return "lower is better"
    if name.startswith("calibration/"):
        return "best at 1"
    return "higher is better" if name.startswith(_LARGER) else ""


def best_places(name: str, values: Sequence[float | None]) -> list[bool]:
    """Where the best of several values is; nowhere if they are all equal, or cannot be compared."""
    ranked = [None if value is None else badness(name, value) for value in values]
    known = [value for value in ranked if value is not None]
    if len(set(known)) < 2:
        return [False] * len(values)
    return [value == min(known) for value in ranked]


# Runs, and their list.

HALF_WRITTEN = "half written"
PLACES = ("run_dir",)
"""Settings that differ between any two runs."""
_MISSING = object()


@dataclass(frozen=True, slots=True)
class RunSummary:
    """The content of a run folder. Missing values are None or empty."""

    path: Path
    name: str
    state: str
    """finished, running, stopped, failed, or half written: files of it are missing or cannot be read."""
    reason: str | None
    """Why it failed, or what is missing."""
    metric: str | None
    """The validation metric that chose the best model."""
    epoch: int | None
    """Of the best model, from 1."""
    validation: Mapping[str, float] = field(default_factory=dict)
    """All validation metrics of the best model."""
    test: Mapping[str, float] = field(default_factory=dict)
    """Metrics of JSON files in the folder that `vista evaluate split=test` wrote."""
    seconds: float | None = None
    """Time until the last validation."""
    parameters: int | None = None
    commit: str | None = None
    changed_ns: int = 0
    """When its files were last written."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """All settings, flat."""

    @property
    def best(self) -> float | None:
        """The value of `metric` for the best model."""
        return None if self.metric is None else self.validation.get(self.metric)

    @classmethod
    def of(cls, path: Path, name: str) -> RunSummary:
        """Read the folder of a run. If something cannot be read, the run is half written; this is not an error."""
        return cls.of_files(RunFiles.read(path), name)

    @classmethod
    def of_files(cls, files: RunFiles, name: str) -> RunSummary:
        """The summary of a run whose files were read already."""
        path, facts, best, validated = files.path, files.facts, files.best, files.validations
        problems = list(files.problems)
        state, reason = facts.get("state", HALF_WRITTEN), facts.get("reason")
        if _is_locked(path / "train.log"):
            state, reason, problems = "running", None, []
        elif state == "running":
            state, reason = "stopped", "its process was killed"
        elif state == "finished":
            if not (path / "best" / "config.json").is_file():
                problems.append("best/ is missing")
            if files.num_unread and not files.rows:  # A crash can cut off the last of several lines.
                problems.append(str(files.metrics_problem))
        if problems:
            state, reason = HALF_WRITTEN, "; ".join(problems)
        seconds = validated[-1].get("seconds") if validated else None
        return cls(
            path=path,
            name=name,
            state=state,
            reason=reason,
            metric=facts.get("metric"),
            epoch=best.get("epoch"),
            validation=_numbers(best.get("validation")),
            test=_tested(path),
            seconds=seconds if NUMBER.holds(seconds) else None,
            parameters=facts.get("parameters"),
            commit=facts.get("commit"),
            changed_ns=max((_changed_ns(path / file) for file in RUN_FILES), default=0),
            settings=files.settings,
        )


def _tested(path: Path) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for file in sorted(path.glob("*.json")):
        try:
            report = json.loads(read_limited(file, MAX_JSON_BYTES))
        except (OSError, ValueError, RecursionError):
            continue  # no report of an evaluation
        if isinstance(report, dict) and report.get("split") == "test":
            metrics |= _numbers(report.get("metrics"))
    return metrics


def _numbers(values: Any) -> dict[str, float]:
    return {name: value for name, value in values.items() if NUMBER.holds(value)} if isinstance(values, dict) else {}


def _is_locked(path: Path) -> bool:
    """Whether a training process holds the lock of its log file, which ends with the process."""
    try:
        descriptor = open_file(path)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    finally:
        os.close(descriptor)
    return False


def _changed_ns(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


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
        """Read all runs in a folder and in the folders in it. Raises ConfigError if the folder does not exist, or no
        run has the metric."""
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


@dataclass(frozen=True, slots=True)
class RunComparison:
    """Two runs or more, side by side: the settings in which they differ, and their metrics."""

    runs: list[RunSummary]

    @classmethod
    def of(cls, paths: Sequence[str]) -> RunComparison:
        """Read the folders of runs. Raises ConfigError if there are fewer than two, or one is not the folder of a
        run."""
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
        return {"runs": [str(run.path) for run in self.runs], "settings": self.differences(), "metrics": self.metrics()}

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


def log_of_run(run: Path) -> Path | None:
    """The log that a run was trained on, if its config.yaml names one that exists."""
    if not (run / "config.yaml").is_file():
        return None
    problems: list[str] = []
    path = read_settings(run, problems).get("data.path")
    if problems:
        raise ConfigError(f"{run}: {problems[0]}, so the log of the run is not known; name one with data=...")
    return Path(path) if isinstance(path, str) and Path(path).is_dir() else None
