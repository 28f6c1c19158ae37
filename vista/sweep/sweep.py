"""Training runs over several seeds and settings."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from vista.config import SweepConfig
from vista.config.choices import Sampler
from vista.config.composition import SweptKey, swept_key
from vista.config.train_config import TPE_TRIALS
from vista.errors import ConfigError, SweepError
from vista.files import replace_text, writable_folder
from vista.sweep.grid_settings import GridSettings
from vista.sweep.settings import Settings
from vista.sweep.sweep_report import SweepReport, mean_badness
from vista.sweep.trial import Trial, trial_config

logger = logging.getLogger(__name__)
SEED = "seed"


def sweep(config: SweepConfig) -> SweepReport:
    """Train all settings with all seeds, in run folders within `config.folder`.

    Every trial is an ordinary run. Rerunning the sweep trains what is not finished: a trial that was interrupted
    resumes, and one that failed is tried again. The validation chooses; the test labels are not used. The results are
    in results.md after each setting.

    Returns:
        The results. Trials that failed are in it, with their reasons.

    Raises:
        ConfigError: no key has several values, or no trial can be configured.
        SweepError: the folder has a sweep over other values, or sampler=tpe has no validation to choose by.
        MissingDependencyError: sampler=tpe needs Optuna.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("vista sweep: runs in a single process; start it without torchrun")
    swept = {word: one for word in config.train if (one := swept_key(word)) is not None}
    if not swept:
        raise ConfigError("train: no setting has several values; give at least one several values, such as seed=1,2,3")
    _require_different_keys(config.train, swept.values())
    words = [word for word in config.train if word not in swept]
    seeds = _seeds(list(swept.values()))
    others = [one for one in swept.values() if one.key != SEED]
    folder = Path(config.folder)
    grid = None if config.sampler is Sampler.tpe else GridSettings(others)
    if grid is not None:
        _require_a_trial(words, grid, seeds[0], config.train_file)
    writable_folder(folder, "folder")
    settings = _sampled(folder, others, config.trials) if grid is None else grid
    report, num_trials, seconds = SweepReport(folder), len(settings) * len(seeds), list[float]()
    for setting in settings:
        trials: list[Trial] = []
        for seed in seeds:
            number = report.num_trials + len(trials) + 1
            left = _left(seconds, num_trials - number + 1)
            logger.info("trial %d of %d%s: %s", number, num_trials, left, _text(setting, seed))
            began = time.perf_counter()
            trials.append(Trial.of(folder, words, setting, seed, config.train_file))
            if trials[-1].was_trained:
                seconds.append(time.perf_counter() - began)
            if (reason := trials[-1].reason) is not None:
                logger.error("failed: %s", reason)
        _finish_setting(report, trials, settings, config.sampler)
    return report


def _finish_setting(report: SweepReport, trials: list[Trial], settings: Settings, sampler: Sampler) -> None:
    """Report the trials of a setting to the sampler, and write the results so far."""
    report.add(trials)
    badness = mean_badness(trials)
    if sampler is Sampler.tpe and badness is None and all(trial.reason is None for trial in trials):
        raise SweepError(
            f"{trials[0].run.path}: has no validation metric to choose by; set optim.validate_every above 0 and "
            "hold out validation labels, or list the values with sampler=grid"
        )
    settings.tell(badness)
    replace_text(report.folder / "results.md", report.markdown())


def _left(seconds: Sequence[float], num_trials: int) -> str:
    """The time left, from what earlier trials took; empty for the first one."""
    return f", about {tqdm.format_interval(fmean(seconds) * num_trials)} left" if seconds else ""


def _require_different_keys(words: Sequence[str], swept: Iterable[SweptKey]) -> None:
    given = [word.partition("=")[0] for word in words]
    for one in swept:
        if given.count(one.key) > 1:
            raise ConfigError(f"{one.key}: is set more than once; write all its values in one argument")


def _seeds(swept: Sequence[SweptKey]) -> Sequence[str | None]:
    for one in swept:
        if one.key == SEED:
            if one.interval is not None:
                raise ConfigError("seed: list the seeds, such as seed=1,2,3; each setting is trained with all of them")
            return one.values
    return [None]


def _sampled(folder: Path, swept: Sequence[SweptKey], trials: int | None) -> Settings:
    from vista.sweep.sampled_settings import SampledSettings

    if not swept:
        raise ConfigError("train: with sampler=tpe, a key other than seed must have several values or an interval")
    return SampledSettings(folder, swept, TPE_TRIALS if trials is None else trials)


def _require_a_trial(words: Sequence[str], grid: GridSettings, seed: str | None, train_file: str | None) -> None:
    """Raise the error of the first setting if all of them have one."""
    first: ConfigError | None = None
    for setting in grid:
        try:
            trial_config(words, {**setting, **({} if seed is None else {SEED: seed})}, train_file)
            return
        except ConfigError as error:
            first = first or error
    if first is not None:
        raise first


def _text(setting: dict[str, str], seed: str | None) -> str:
    return " ".join(f"{key}={value}" for key, value in {**setting, **({} if seed is None else {SEED: seed})}.items())
