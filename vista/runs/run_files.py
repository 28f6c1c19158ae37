"""Reads the files of a run folder for `vista runs`, `vista explore`, and `vista report`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import yaml

from vista.config.checks import check_size
from vista.config.composition import flattened
from vista.files import check_fields, either, one_of, read_limited, text, whole

T = TypeVar("T")
_LARGER = ("hr@", "ndcg@", "mrr@", "recall@", "precision@", "auc/", "gauc/")
"""Beginnings of the names of metrics that are better if they are larger."""


def rows_of(text: str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, until a line that a crash cut off, or that `MetricsWriter` has not written."""
    rows = []
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not isinstance(row, dict) or not all(isinstance(row.get(name), int) for name in ("step", "epoch")):
            break
        rows.append(row)
    return rows


MAX_JSON_BYTES, MAX_METRICS_BYTES = 1 << 20, 1 << 28
FILES = ("run.json", "train.log", "metrics.jsonl")
"""Files that only runs have."""
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
    return any((path / file).is_file() for file in FILES)


def read_settings(path: Path, problems: list[str]) -> dict[str, Any]:
    """All settings of a run, flat; empty if config.yaml cannot be read, which is added to the problems."""
    content = _content(path / "config.yaml", MAX_JSON_BYTES, problems)
    try:
        check_size(content)
        settings = yaml.safe_load(content)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problems.append(f"config.yaml cannot be read ({' '.join(str(error).split())})")
        return {}
    return flattened(settings) if isinstance(settings, dict) else {}


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
