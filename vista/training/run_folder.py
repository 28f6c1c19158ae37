"""The folder of a run: who may write to it, how it takes Ctrl-C, run.json, and the model card."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import signal
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from vista.config import ModelConfig, TrainConfig
from vista.config.checks import Architecture, InitFreeze, Split
from vista.config.composition import flat_settings
from vista.errors import ConfigError, LogFormatter, without_password
from vista.files import partial_name, recover_folder, remove_folder, remove_leftovers, replace_text, writable_folder
from vista.installation import __version__, source_commit
from vista.log.event_log import EventLog
from vista.log.splits import parse_time
from vista.model.ranking_model import RankingModel
from vista.model.saved_model import check_is_model
from vista.runs.run_list import EPOCH_0
from vista.runs.tracking import MetricsWriter, TrackedRun, open_to_append, plot_curves, typed_errors
from vista.training.checkpoint import remove_checkpoints
from vista.training.log_schema import HashCollisions
from vista.training.validation import Validation

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def claimed_folder(config: TrainConfig) -> Iterator[None]:
    """Make the folder of a run, check what can be checked before anything is read, and keep `log_file` open.

    Raises:
        ConfigError: its files cannot be written, or another process is training here.
        MissingDependencyError: the tracker of the run is not installed.
    """
    folder = Path(config.run_dir)
    writable_folder(folder, "run_dir")
    TrackedRun(folder, config.tracking)
    with log_file(folder / "train.log"):
        yield


@contextlib.contextmanager
def log_file(path: Path) -> Iterator[None]:
    """Copy vista's log records to a file of the run, which is locked meanwhile. Raises ConfigError as for
    `open_to_append`, or another process is training in this folder."""
    file = open_to_append(path)
    if not _locked(file):
        file.close()
        raise ConfigError(
            f"run_dir={path.parent}: another process is training here; wait for it, or choose another run_dir"
        )
    handler = logging.StreamHandler(file)
    handler.setFormatter(LogFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("vista")
    level = root.level
    root.addHandler(handler)
    if level == logging.NOTSET:
        root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)
        handler.close()
        file.close()


def _locked(file: TextIO) -> bool:
    """Whether the lock of a file is ours now, or its file system has none. `vista runs` may hold it for a moment."""
    for _ in range(20):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.05)
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                return True
            raise
    return False


def clean_folder(run_dir: Path, *, starts_over: bool) -> None:
    """Remove what killed processes left in a run folder.

    Args:
        starts_over: whether to remove the checkpoints and the export too. Otherwise an export stays until a better one
            replaces it, even if its checkpoints are gone.

    Raises:
        CheckpointError: if `best` or `best.old` holds something other than an export.
    """
    check_is_model(run_dir / "best")
    if starts_over:
        remove_checkpoints(run_dir / "checkpoints")
        for name in ("best", "best.old", EPOCH_0, f"{EPOCH_0}.old"):
            if (run_dir / name).is_dir():
                remove_folder(run_dir / name, partial_name(run_dir / name))
    for name in ("best", EPOCH_0):
        recover_folder(run_dir / name)
    remove_leftovers(run_dir)


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[list[bool]]:
    """Make Ctrl-C fill the list, so that the current step ends and a checkpoint is written; a second one stops at once.
    Outside the main thread signals cannot be handled, and the list stays empty."""
    mark: list[bool] = []

    def note(signum: int, frame: Any) -> None:
        if mark:
            raise KeyboardInterrupt
        mark.append(True)
        logger.warning("interrupt: finishing this step and writing a checkpoint (press Ctrl-C again to stop at once)")

    try:
        previous = signal.signal(signal.SIGINT, note)
    except ValueError:
        previous = None
    try:
        yield mark
    finally:
        if previous is not None:
            signal.signal(signal.SIGINT, previous)


# What a run writes about itself: run.json, metrics.jsonl, and its copy in a tracker.


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
        """As in `MetricsWriter`, and begin to record the run. Raises TrackingError if the tracker does not answer."""
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
        """Append one row, which holds `step`. Only the rank that has called `rewind` writes."""
        if self._facts["began"] is not None:
            super().write(row)
            self._tracked.log(row)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        """Record how the run ended. Raises TrackingError if the run has finished, but the tracker lacks a part of
        it."""
        if self._facts["began"] is None:
            return  # another rank, or an error before the run
        state = "finished" if kind is None else "stopped" if kind is KeyboardInterrupt else "failed"
        reason = None if error is None or state == "stopped" else without_password(f"{type(error).__name__}: {error}")
        self._facts |= {"state": state, "reason": reason, "ended": _now()}
        try:
            self._save()
        except ConfigError as failure:
            if error is None:
                self._tracked.close(None)
                raise
            logger.warning("%s", failure)  # what ended the run matters more
        files = None
        if kind is None and self._tracked.is_open:
            curves = plot_curves(self.run_dir, self.rows(), self._facts["metric"])
            files = [self.run_dir / "config.yaml", self.run_dir / "best" / "README.md", curves]
        self._tracked.close(files)

    def _save(self) -> None:
        path = self.run_dir / "run.json"
        with typed_errors(path):
            replace_text(path, json.dumps(self._facts, indent=1) + "\n")


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


# The model card: README.md of an exported model, for whoever finds the folder.
#
# It holds nothing of when or where a run took place, so that a resumed run exports the same bytes.

_TEMPLATE = """# Model card: {architecture}

Exported by `vista train`, version {version}. `config.json` holds all settings of the model and of its data split.

## Intended use

{use}

## Training data

{data}

{held_out}

## Validation

{validation}

## Model

{model}

## Limits

{limits}
"""


def model_card(
    model: RankingModel,
    config: TrainConfig,
    log: EventLog,
    validated: Mapping[str, float] | None = None,
    collisions: Sequence[HashCollisions] = (),
) -> str:
    """Describe a trained model in Markdown.

    Args:
        model: the model that is exported.
        config: configuration of its run.
        log: the event log that it was trained on.
        validated: metrics of the validation that chose the model, with its `epoch`; None if there was none.
        collisions: of its hashed features.
    """
    return _TEMPLATE.format(
        architecture=config.model.architecture.value,
        version=__version__,
        use=_use(model),
        data=_table(_data(model, config, log)),
        held_out=_held_out(config),
        validation=_validation(validated),
        model=_table([*_model(model, config), *_hashed(collisions)]),
        limits="\n".join(f"- {limit}" for limit in _limits(model, log)),
    )


def _table(rows: Iterable[tuple[str, object]]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def _code(values: Iterable[str]) -> str:
    """Names of the log, as code that a cell of a table can hold."""
    return ", ".join("`" + " ".join(value.split()).replace("|", "\\|") + "`" for value in values)


def _day(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).date().isoformat()


def _use(model: RankingModel) -> str:
    kinds = []
    if model.schema.tasks:
        kinds.append(f"the probability of {_code(model.schema.tasks)} for a user and a candidate item")
    if model.has_retrieval:
        kinds.append("scores of the next item, which rank items and are not probabilities")
    predicts = f"The model predicts {', and '.join(kinds)}."
    if model.config.architecture is not Architecture.vista:
        return (
            f"{predicts} It is a baseline, which reads the raw history in every request: measure it with "
            "`vista evaluate`."
        )
    return (
        f"{predicts} Make a store of summaries with `vista refresh`, and score with `vista.Scorer.open(model, store)`."
    )


def _data(model: RankingModel, config: TrainConfig, log: EventLog) -> Iterable[tuple[str, object]]:
    yield "users", f"{log.num_users:,}"
    yield "items", f"{log.num_items:,}"
    if least := config.data.min_item_events:
        yield f"items known to the model (`data.min_item_events={least}`)", f"{len(model.items):,}"
    yield "events", f"{log.num_events:,}"
    times = log.time_range() if log.has_time else None
    yield "time of events", "no times" if times is None else " to ".join(map(_day, times))
    if len(log.actions) > 1:
        yield "actions", _code(log.actions)
    if log.impressions is not None:
        yield "impressions", f"{log.impressions.num_impressions:,}"


def _held_out(config: TrainConfig) -> str:
    data = config.data
    if data.split is Split.time:
        assert data.validation_from is not None and data.test_from is not None  # DataConfig has checked
        gap = f" Events of the {data.gap_minutes:g} minutes before are left out." if data.gap_minutes else ""
        if parse_time(data.validation_from) == parse_time(data.test_from):
            return (
                f"Labels from {data.test_from} on are not trained on: all are for the test, and none for "
                f"validation.{gap}"
            )
        return (
            f"Labels from {data.validation_from} on are not trained on: those before {data.test_from} are for "
            f"validation, later ones for the test.{gap}"
        )
    if data.split is Split.share:
        assert data.test_share is not None and data.validation_share is not None  # DataConfig has checked
        validation = f"the {100 * data.validation_share:g} % before them" if data.validation_share else "none"
        return (
            f"The last {100 * data.test_share:g} % of each user's events are held out for the test, and {validation} "
            "for validation."
        )
    return "The last event of each user is held out for the test, and the event before it for validation."


def _validation(validated: Mapping[str, float] | None) -> str:
    if validated is None:
        return "The model was not validated. It is the model after the last step."
    rows = [(name, f"{value:.4f}") for name, value in validated.items() if name not in ("epoch", "step")]
    return (
        f"Epoch {validated['epoch']:.0f} was the best by validation. Its summaries were float32 and came from the log. "
        f"Measure the test with `vista evaluate`, as served from a store.\n\n{_table(rows)}"
    )


def _model(model: RankingModel, config: TrainConfig) -> Iterable[tuple[str, object]]:
    own = config.model
    yield "parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"
    yield "width (`model.dim`)", own.dim
    if isinstance(own, ModelConfig):
        yield "summary tokens per user (`model.num_seeds`)", own.num_seeds
        yield "newest events read with the summary (`model.tail_len`)", own.tail_len
        yield "mixing (`model.mixing`)", own.mixing.value
    yield "seed", config.seed
    if config.init_from is not None:
        kept = "; stage 1 is unchanged, so stores serve both" if config.init_freeze is InitFreeze.summarizer else ""
        yield "trained", f"from an earlier model (`init_from`){kept}"
    if config.base is not None:
        yield "trained", "stage 2 and heads; items, events, and stage 1 are those of the base, whose stores serve both"


def _hashed(collisions: Sequence[HashCollisions]) -> Iterable[tuple[str, object]]:
    for each in collisions:
        feature, _, what = str(each).partition(": ")
        yield f"hashed {feature}", what


def _limits(model: RankingModel, log: EventLog) -> Iterable[str]:
    yield (
        "Items that the model does not know get a neutral score. `items.ids.npy` lists those that it knows; "
        f"in histories, it knows the first {model.num_trained_items:,}."
    )
    if model.schema.has_time and model.config.reads("times"):
        yield "The model reads times. Pass the time of the request (`now`)."
    if features := model.schema.request_features:
        yield f"Labeled tasks read features of requests: {_code(one.name for one in features)}. Pass them (`request`)."
    if (features := model.schema.tail_features) and model.config.architecture is Architecture.vista:
        names = _code(one.name for one in features)
        yield f"Stage 2 reads features of events: {names}. Pass those of fresh events (`Tail(features=…)`)."
    if features := model.schema.user_features:
        yield f"The model reads features of users, as of the last refresh: {_code(one.name for one in features)}."
    if len(log.actions) > 1:
        yield "Retrain before refreshing if a new action type appears."
    yield "Events that are deleted from the log after training are not removed from the model's weights."
    yield "How far its rankings follow popularity, or differ between groups of users, was not measured here."
