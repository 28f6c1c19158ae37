"""Training runs over several seeds and settings."""

from __future__ import annotations

import itertools
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
import xxhash
from tqdm import tqdm

from vista.config import SweepConfig, TrainConfig
from vista.config.checks import to_dict
from vista.config.composition import SweptKey, compose_config, flattened, swept_key
from vista.errors import ConfigError, SweepError, TrackingError, VistaError
from vista.files import replace_text, writable_folder
from vista.installation import require_module
from vista.log.event_log import EventLog
from vista.runs.run_list import RunSummary, badness
from vista.runs.tracking import TrackedRun
from vista.text_table import terminal_width, text_table, wrapped
from vista.training.trainer import train_model

MAX_SETTINGS = 10_000
MAX_NAME = 120
DECIDING = ("model.", "data.", "optim.", "seed", "base", "store", "init_from", "init_freeze", "precision")
"""Settings on which the result of a run depends, by how their keys begin."""
SEED = "seed"
STUDY_FILE = "optuna.journal"

logger = logging.getLogger(__name__)


class GridSettings:
    """All combinations of the values: swept keys and their values, without the seed."""

    def __init__(self, swept: Sequence[SweptKey]) -> None:
        """
        Raises:
            ConfigError: a key has an interval, or there are more than MAX_SETTINGS combinations.
        """
        for one in swept:
            if one.interval is not None:
                raise ConfigError(f"{one.key}: an interval needs a number of trials; set that, or list the values")
        if (combinations := math.prod(len(one.values) for one in swept)) > MAX_SETTINGS:
            raise ConfigError(
                f"train: the values make {combinations:,} settings, but at most {MAX_SETTINGS:,} are trained"
            )
        self._swept, self._combinations = swept, combinations

    def __len__(self) -> int:
        return self._combinations

    def __iter__(self) -> Iterator[dict[str, str]]:
        for values in itertools.product(*(one.values for one in self._swept)):
            yield {one.key: value for one, value in zip(self._swept, values, strict=True)}

    def tell(self, badness: float | None) -> None:
        """Do nothing: the settings of a grid do not depend on results."""


@dataclass(frozen=True, slots=True)
class Trial:
    """The words that make a run, and how it ended."""

    setting: Mapping[str, str]
    """Swept keys and their values, without the seed."""
    seed: str | None
    """None if only one seed is trained."""
    run: RunSummary
    reason: str | None
    """Why the trial failed; None if it is finished."""
    note: str | None = None
    """What is wrong with a finished one."""
    was_trained: bool = True
    """False if it had been finished earlier."""

    @classmethod
    def of(
        cls,
        folder: Path,
        words: Sequence[str],
        setting: Mapping[str, str],
        seed: str | None,
        train_file: str | None = None,
    ) -> Trial:
        """Train a run in a folder of its own, or what is left of it; a finished one is not trained again.

        Args:
            folder: of the sweep.
            words: what all trials have in common.
        """
        own = _own(setting, seed)
        path = folder / folder_name(own)
        reason, note, was_trained = None, None, False
        try:
            config = trial_config(words, own, train_file)
            if not _is_finished(config, RunSummary.of(path, path.name)):
                was_trained = True
                train_model(replace(config, run_dir=str(path)), EventLog.open(config.data.path))
        except TrackingError as error:
            note = str(error)
        except (VistaError, MemoryError, torch.OutOfMemoryError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
        run = RunSummary.of(path, path.name)
        if reason is None and run.state != "finished":  # the tracker has refused the run
            reason, note = note or f"the run is {run.state}", None
        return cls(setting, seed, run, reason, note, was_trained)


def _own(setting: Mapping[str, str], seed: str | None) -> dict[str, str]:
    """What distinguishes a trial: swept keys and their values, with the seed if several are trained."""
    return {**setting, **({} if seed is None else {SEED: seed})}


def trial_config(words: Sequence[str], own: Mapping[str, str], train_file: str | None) -> TrainConfig:
    """The configuration of a trial, without its run_dir. Raises ConfigError as for `compose_config`."""
    every = [*words, *(f"{key}={value}" for key, value in own.items())]
    config = compose_config(TrainConfig, every, config_file=train_file)
    if any(word.startswith("run_dir=") for word in every):
        raise ConfigError("run_dir: is chosen by the sweep for each trial; set folder instead")
    return config


def folder_name(own: Mapping[str, str]) -> str:
    """The name of a trial's folder, which needs no quotes as a part of a path: model.dim-64_seed-1."""
    name = "_".join(f"{key}-{value}" for key, value in own.items())
    safe = re.sub(r"[^\w.+-]", "-", name)
    if safe != name or len(safe) > MAX_NAME:
        safe = f"{safe[:MAX_NAME]}_{xxhash.xxh3_64(name.encode()).hexdigest()[:8]}"
    return safe


def _is_finished(config: TrainConfig, run: RunSummary) -> bool:
    """Whether a run of these settings is finished, and sent to its tracker. If not, training resumes it, sends what is
    missing, or says how its settings differ."""
    if run.state != "finished" or not config.resume or not TrackedRun(run.path, config.tracking).is_complete():
        return False
    wanted = {key: value for key, value in flattened(to_dict(config)).items() if key.startswith(DECIDING)}
    return all(value is None or run.settings.get(key) == value for key, value in wanted.items())


@dataclass(slots=True)
class SweepReport:
    """The trials of a sweep, and the means of their validation metrics over seeds."""

    folder: Path
    trials: dict[tuple[tuple[str, str], ...], list[Trial]] = field(default_factory=dict)
    """By setting."""

    def add(self, trials: list[Trial]) -> None:
        """Add the trials of one setting."""
        self.trials[tuple(trials[0].setting.items())] = trials

    @property
    def num_trials(self) -> int:
        """Trials with results, including failed ones."""
        return sum(map(len, self.trials.values()))

    def failed(self) -> list[Trial]:
        """The trials that are not finished."""
        return [trial for trial in self._all() if trial.reason is not None]

    def not_tracked(self) -> list[Trial]:
        """Finished trials that are incomplete in the tracker."""
        return [trial for trial in self._all() if trial.note is not None]

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
            values = values_of(trials)
            seconds = [trial.run.seconds for trial in trials if trial.run.seconds is not None]
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


def sweep(config: SweepConfig) -> SweepReport:
    """Train all settings with all seeds, in run folders within `config.folder`.

    Every trial is an ordinary run. Rerunning the sweep trains what is not finished: a trial that was interrupted
    resumes, and one that failed is tried again. The validation chooses; the test labels are not used. The results are
    in results.md after each setting.

    Returns:
        The results. Trials that failed are in it, with their reasons.

    Raises:
        ConfigError: no key has several values, or no trial can be configured.
        SweepError: the folder has a sweep over other values, or `trials` has no validation to choose by.
        MissingDependencyError: `trials` needs Optuna.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("vista sweep: runs in a single process; start it without torchrun")
    swept = {word: one for word in config.train if (one := swept_key(word)) is not None}
    if not swept:
        raise ConfigError("train: no setting has several values; give at least one several values, such as seed=1,2,3")
    given = [word.partition("=")[0] for word in config.train]
    seeds: Sequence[str | None] = [None]
    for one in swept.values():
        if given.count(one.key) > 1:
            raise ConfigError(f"{one.key}: is set more than once; write all its values in one argument")
        if one.key == SEED:
            if one.interval is not None:
                raise ConfigError("seed: list the seeds, such as seed=1,2,3; each setting is trained with all of them")
            seeds = one.values
    words = [word for word in config.train if word not in swept]
    others = [one for one in swept.values() if one.key != SEED]
    folder = Path(config.folder)
    settings: GridSettings | SampledSettings
    if config.trials is None:
        settings = GridSettings(others)
        _require_a_trial(words, settings, seeds[0], config.train_file)
    writable_folder(folder, "folder")
    if config.trials is not None:
        settings = SampledSettings(folder, others, config.trials)
    report, num_trials, seconds = SweepReport(folder), len(settings) * len(seeds), list[float]()
    for setting in settings:
        trials: list[Trial] = []
        for seed in seeds:
            number = report.num_trials + len(trials) + 1
            left = ""
            if seconds:
                left = f", about {tqdm.format_interval(fmean(seconds) * (num_trials - number + 1))} left"
            words_of_trial = " ".join(f"{key}={value}" for key, value in _own(setting, seed).items())
            logger.info("trial %d of %d%s: %s", number, num_trials, left, words_of_trial)
            began = time.perf_counter()
            trials.append(Trial.of(folder, words, setting, seed, config.train_file))
            if trials[-1].was_trained:
                seconds.append(time.perf_counter() - began)
            if (reason := trials[-1].reason) is not None:
                logger.error("failed: %s", reason)
        report.add(trials)
        badness = mean_badness(trials)
        if config.trials is not None and badness is None and all(trial.reason is None for trial in trials):
            raise SweepError(
                f"{trials[0].run.path}: has no validation metric to choose by; set optim.validate_every above 0 and "
                "hold out validation labels, or leave out trials"
            )
        settings.tell(badness)
        replace_text(folder / "results.md", report.markdown())
    return report


def _require_a_trial(words: Sequence[str], grid: GridSettings, seed: str | None, train_file: str | None) -> None:
    """Raise the error of the first setting if all of them have one."""
    first: ConfigError | None = None
    for setting in grid:
        try:
            trial_config(words, _own(setting, seed), train_file)
            return
        except ConfigError as error:
            first = first or error
    if first is not None:
        raise first


class SampledSettings:
    """Settings that Optuna samples, in the order of their trials: those of earlier processes, then new ones.

    The trials are kept in the folder of the sweep, so that a rerun continues them. Release 1.3 of Hydra's plugin for
    Optuna needs Optuna 2. This is Optuna's ask-and-tell interface: a setting is asked for, trained, and its validation
    told.
    """

    def __init__(self, folder: Path, swept: Sequence[SweptKey], trials: int) -> None:
        """
        Args:
            folder: of the sweep; it exists.
            swept: keys and their values or intervals.
            trials: number of settings, with those of earlier processes.

        Raises:
            ConfigError: no key is swept.
            SweepError: the folder has a sweep over other keys or values.
        """
        if not swept:
            raise ConfigError("train: with trials, a key other than seed must have several values or an interval")
        self._optuna = optuna = require_module("optuna", "optuna")
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
        self._study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
        self._distributions = {one.key: _distribution(one, optuna.distributions) for one in swept}
        self._trials = trials
        known = {key: repr(distribution) for key, distribution in self._distributions.items()}
        stored = self._study.user_attrs.get("keys", known)
        if stored != known:
            raise SweepError(
                f"folder={folder}: holds a sweep over other values ({', '.join(map(str, stored.values()))} of "
                f"{', '.join(stored)}); choose another folder, or sweep over the same values"
            )
        self._study.set_user_attr("keys", known)

    def __len__(self) -> int:
        return self._trials

    def __iter__(self) -> Iterator[dict[str, str]]:
        for number in range(self._trials):
            stored = self._study.get_trials(deepcopy=False)
            if number == len(stored):
                # With a seed per trial, a resumed sweep samples what an uninterrupted one does.
                self._study.sampler = self._optuna.samplers.TPESampler(seed=number)
                self._study.ask(self._distributions)
                stored = self._study.get_trials(deepcopy=False)
            self._number = number
            yield {key: _word(stored[number].params[key]) for key in self._distributions}

    def tell(self, badness: float | None) -> None:
        """Report the setting that was yielded last. `badness`: smaller is better; None if it failed."""
        if not self._study.get_trials(deepcopy=False)[self._number].state.is_finished():
            state = self._optuna.trial.TrialState.FAIL if badness is None else None
            self._study.tell(self._number, badness, state=state)


def _distribution(one: SweptKey, distributions: Any) -> Any:
    """Where Optuna draws a key from."""
    if one.interval is None:
        return distributions.CategoricalDistribution(one.values)
    low, high = one.interval
    if one.whole:
        return distributions.IntDistribution(int(low), int(high), log=one.log)
    return distributions.FloatDistribution(low, high, log=one.log)


def _word(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
