"""metrics.jsonl of a run, and the copy of a run in a tracker. If the tracker fails, the run continues."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TextIO

from vista.config.checks import TrackerKind
from vista.config.train_config import TrackingConfig
from vista.errors import ConfigError, MissingDependencyError, TrackingError, without_password
from vista.files import NUMBER, check_fields, either, one_of, open_file, read_limited, replace_text, text, whole
from vista.installation import require_module

# metrics.jsonl.


def open_to_append(path: Path) -> TextIO:
    """Open a text file of a run to read and append; it is created if it does not exist.

    Raises:
        ConfigError: it cannot be opened, is a symbolic link, or is not a regular file. A named pipe is refused at once.
    """
    try:
        return open(
            path,
            "a+",
            encoding="utf-8",
            errors="replace",
            opener=lambda _, flags: open_file(path, flags, 0o666, follow=False),
        )
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); correct this path, or choose another run_dir"
        ) from error


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


@contextlib.contextmanager
def typed_errors(path: Path) -> Iterator[None]:
    """Raise an OSError while a file of a run is written, such as of a full disk, as a ConfigError that names it."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); free space or correct this path, then rerun the command to "
            "resume"
        ) from error


class MetricsWriter:
    """metrics.jsonl of a run, one JSON object per line.

    Rows of training hold {step, epoch, loss, …}, rows of validation {step, epoch, validation: {…}, is_best, …}. The
    last validation with is_best was exported. Undefined numbers are null.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "metrics.jsonl"

    def rewind(self, step: int, validated: Collection[int]) -> list[dict[str, Any]]:
        """Drop the rows that a resumed run will write again.

        Args:
            step: steps done; 0 for a new run.
            validated: steps whose validation is part of the resumed state.

        Returns:
            The rows that stay.

        Raises:
            ConfigError: as for `open_to_append` and `typed_errors`.
        """
        rows = self.rows()
        kept = [
            row
            for row in rows
            if step > 0 and (row["step"] in validated if "validation" in row else row["step"] <= step)
        ]
        with typed_errors(self.path):
            replace_text(self.path, "".join(map(_json_line, kept)))
        return kept

    def rows(self) -> list[dict[str, Any]]:
        """All rows. What follows a line that a crash cut off, or that is not a row, is left out. Raises ConfigError as
        for `open_to_append`."""
        with open_to_append(self.path) as file:
            file.seek(0)
            return rows_of(file.read())

    def write(self, row: dict[str, Any]) -> None:
        """Append one row, which holds `step` and `epoch`. Raises ConfigError as for `open_to_append` and
        `typed_errors`."""
        with typed_errors(self.path), open_to_append(self.path) as file:
            file.write(_json_line(_defined(row)))


def _json_line(row: dict[str, Any]) -> str:
    return json.dumps(row, allow_nan=False) + "\n"


def _defined(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _defined(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


# Trackers.


@dataclass(frozen=True, slots=True)
class TrackedFolder:
    """The run that a tracker shows."""

    run_dir: Path
    tracking: TrackingConfig
    settings: Mapping[str, Any]
    """All settings of the run, flat: {"model.dim": 64, …}."""
    tags: Mapping[str, str]
    """Other facts that identify the run, such as the commit of vista."""


class Tracker(Protocol):
    """One run in a tracker. After an exception, the data of that call may be missing in the tracker."""

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        """Connect, and create the run, or continue the run of an earlier process."""

    @property
    def run_id(self) -> str:
        """The values that a later process needs to continue the run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers of a step. Steps never decrease."""

    def close(self, files: Sequence[Path] | None) -> None:
        """End the run. `files`: of a finished run, to show with it: Markdown, YAML, and PNG. None if the run has only
        stopped."""


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


class TensorboardTracker:
    """Events in <run_dir>/tensorboard, one file per process."""

    run_id = "tensorboard"

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        events = folder.run_dir / self.run_id
        if run_id is None:
            shutil.rmtree(events, ignore_errors=True)
        self._writer = require_module("torch.utils.tensorboard", "tensorboard").SummaryWriter(str(events))
        if run_id is None:
            table = "\n".join(f"| {name} | {value} |" for name, value in folder.tags.items())
            self._writer.add_text("run", f"| | |\n|---|---|\n{table}")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`. The events are written to the file immediately, so a killed process loses none."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, files: Sequence[Path] | None) -> None:
        """As `Tracker.close`."""
        for path in files or ():
            if path.suffix == ".png":
                image = require_module("matplotlib.image", "plots").imread(path)
                self._writer.add_image(path.stem, image[..., :3], dataformats="HWC")
            else:
                text = path.read_text(encoding="utf-8")
                self._writer.add_text(path.stem, text if path.suffix == ".md" else f"```\n{text}\n```")
        self._writer.close()


START_TIMEOUT_S = 30
FINISH_TIMEOUT_S = 120
"""How long the end of a run waits for uploads. What is not uploaded by then is still in <run_dir>/wandb."""


class WandbTracker:
    """A run of Weights & Biases. Its process uploads in the background, so training does not wait for the server."""

    def __init__(self, folder: TrackedFolder, run_id: str | None) -> None:
        tracking = folder.tracking
        self._wandb = wandb = require_module("wandb", "wandb")
        self.run_id = secrets.token_hex(4) if run_id is None else run_id
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_git=True,
            init_timeout=START_TIMEOUT_S,
            finish_timeout=FINISH_TIMEOUT_S,
            finish_timeout_raises=True,
            x_save_requirements=False,
        )
        if tracking.server is not None:
            settings.base_url = tracking.server
        offline = os.environ.get("WANDB_MODE") == "offline"  # wandb reads it too, but asks for a key all the same
        if not offline and not wandb.login(host=tracking.server, prompt=False):
            raise TrackingError("no API key is set; run `wandb login`, or set the variable WANDB_MODE=offline")
        self._run = wandb.init(
            project=tracking.project,
            name=folder.run_dir.name,
            dir=str(folder.run_dir),
            id=self.run_id,
            resume="allow",
            mode="offline" if offline else "online",
            config={**folder.settings, **folder.tags},
            allow_val_change=True,
            settings=settings,
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """As `Tracker.log`."""
        self._run.log(dict(values), step=step)

    def close(self, files: Sequence[Path] | None) -> None:
        """As `Tracker.close`."""
        for path in files or ():
            if path.suffix == ".png":
                self._run.log({path.stem: self._wandb.Image(str(path))})
            else:
                own = shutil.copy(path, self._run.dir)
                self._run.save(own, base_path=self._run.dir, policy="now")
        self._run.finish(exit_code=255 if files is None else 0)


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
    TrackerKind.mlflow: (MlflowTracker, ("sqlalchemy", "mlflow", "mlflow.entities")),
    TrackerKind.wandb: (WandbTracker, ("wandb",)),
}
"""Classes, and the modules that they import, from the extra that has the name of the tracker."""


def tracker_class(kind: TrackerKind) -> Callable[[TrackedFolder, str | None], Tracker]:
    """The class of a tracker. Raises MissingDependencyError if its extra is not installed."""
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
        """Whether the tracker has all of a finished run, or there is no tracker. Raises TrackingError if tracking.json
        cannot be read."""
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
        is_whole = self._failure is None
        try:
            self._tracker.close(files if is_whole else None)  # If left open, it would get what is tracked next.
            self._state["complete"] = is_whole and files is not None
            self._save_state()
        except Exception as error:  # as above
            if is_whole:  # otherwise a failure has been logged already
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
    def _server(self) -> str | None:
        return None if self._tracking.server is None else without_password(self._tracking.server)

    @property
    def _name(self) -> str:
        return self._tracking.kind.value + (f" ({self._server})" if self._server is not None else "")

    def _read_state(self) -> dict[str, Any]:
        """The content of tracking.json, or that of a new run if there is none, or another tracker has the run."""
        path = self._run_dir / STATE_FILE
        place = {"tracker": self._tracking.kind.value, "server": self._server, "project": self._tracking.project}
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
    """An error as part of a line. Trackers repeat the URL of their server."""
    words = without_password(" ".join(str(error).split()))
    return f"{type(error).__name__}: {words[:300]}" if words else type(error).__name__


CURVES_FILE = "curves.png"


def plot_curves(run_dir: Path, rows: Sequence[dict[str, Any]], metric: str | None) -> Path:
    """Write curves.png to the run's folder.

    Args:
        rows: of metrics.jsonl.
        metric: the one by which the best model is chosen; None without validation.
    """
    figure = require_module("matplotlib.figure", "plots").Figure(figsize=(9, 3.5), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    trained = [row for row in rows if "validation" not in row]
    validated = [row for row in rows if metric in row.get("validation", {})]
    loss.plot([row["step"] for row in trained], [row["loss"] for row in trained])
    loss.set(xlabel="step", ylabel="loss", title="training")
    if validated:
        steps = [row["step"] for row in validated]
        quality.plot(steps, [row["validation"][metric] for row in validated], marker="o")
    quality.set(xlabel="step", ylabel=metric or "", title="validation")
    path = run_dir / CURVES_FILE
    figure.savefig(path, dpi=100)
    return path
