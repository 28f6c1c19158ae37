"""Settings that Optuna samples. Its trials are kept in the folder of the sweep, so that a rerun continues them.

Release 1.3 of Hydra's own plugin for Optuna needs Optuna 2. This is Optuna's ask-and-tell interface: a setting is asked
for, trained, and its validation told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vista.config.composition import SweptKey
from vista.errors import SweepError
from vista.installation import require_module

STUDY_FILE = "optuna.journal"


class SampledSettings:
    """Settings in the order of their trials: those of earlier processes, then new ones."""

    def __init__(self, folder: Path, swept: Sequence[SweptKey], trials: int) -> None:
        """
        Args:
            folder: of the sweep; it exists.
            swept: keys and their values or intervals.
            trials: number of settings, with those of earlier processes.

        Raises:
            SweepError: the folder has a sweep over other keys or values.
        """
        optuna = require_module("optuna", "optuna")
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        storage = JournalStorage(JournalFileBackend(str(folder / STUDY_FILE)))
        self._study = optuna.create_study(study_name="sweep", storage=storage, load_if_exists=True)
        self._distributions = {one.key: _distribution(one) for one in swept}
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
                self._study.sampler = require_module("optuna", "optuna").samplers.TPESampler(seed=number)
                self._study.ask(self._distributions)
                stored = self._study.get_trials(deepcopy=False)
            self._number = number
            yield {key: _word(stored[number].params[key]) for key in self._distributions}

    def tell(self, badness: float | None) -> None:
        """Report the setting that was yielded last.

        Args:
            badness: smaller is better; None if it failed.
        """
        if not self._study.get_trials(deepcopy=False)[self._number].state.is_finished():
            state = require_module("optuna", "optuna").trial.TrialState.FAIL if badness is None else None
            self._study.tell(self._number, badness, state=state)


def _distribution(one: SweptKey) -> Any:
    if one.interval is None:
        return require_module("optuna", "optuna").distributions.CategoricalDistribution(one.values)
    low, high = one.interval
    if one.whole:
        return require_module("optuna", "optuna").distributions.IntDistribution(int(low), int(high), log=one.log)
    return require_module("optuna", "optuna").distributions.FloatDistribution(low, high, log=one.log)


def _word(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
