"""One run in a list of runs."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vista.files import open_file, read_limited
from vista.json_fields import NUMBER
from vista.runs.run_files import FILES, MAX_JSON_BYTES, RunFiles

HALF_WRITTEN = "half written"


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
        elif state == "finished" and not (path / "best" / "config.json").is_file():
            problems.append("best/ is missing")
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
            changed_ns=max((_changed_ns(path / file) for file in FILES), default=0),
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
