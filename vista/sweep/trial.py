"""One training run of a sweep."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import xxhash

from vista.config import TrainConfig
from vista.config.checks import to_dict
from vista.config.composition import compose_config
from vista.config.config_keys import flattened
from vista.errors import ConfigError, TrackingError, VistaError
from vista.log.event_log import EventLog
from vista.runs.run_list import RunSummary
from vista.runs.tracking import TrackedRun
from vista.training.trainer import train_model

MAX_NAME = 120
DECIDING = ("model.", "data.", "optim.", "seed", "stage", "base", "store", "init_from", "init_freeze", "precision")
"""Settings on which the result of a run depends, by how their keys begin."""


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
        own = {**setting, **({} if seed is None else {"seed": seed})}
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


def trial_config(words: Sequence[str], own: Mapping[str, str], train_file: str | None) -> TrainConfig:
    """The configuration of a trial, without its run_dir.

    Raises:
        ConfigError: as for `compose_config`.
    """
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
    """Whether a run of these settings is finished, and sent to its tracker.

    If not, training resumes it, sends what is missing, or says how its settings differ.
    """
    if run.state != "finished" or not config.resume or not TrackedRun(run.path, config.tracking).is_complete():
        return False
    wanted = {key: value for key, value in flattened(to_dict(config)).items() if key.startswith(DECIDING)}
    return all(value is None or run.settings.get(key) == value for key, value in wanted.items())
