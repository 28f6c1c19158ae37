"""Promises of docs and reliability tests: one repetition is written once, and runs a few times or thousands of times.

A promise is a test function of one repetition, in a file of its own:

    @promise("Acknowledged batch survives", fault="kill -9 of the writer", full=1000, short=10)
    def test_killed_writer(trial: Trial, nursery: Nursery) -> None:
        ...  # `trial.random` decides, `trial.folder` is empty, `trial.count("…")` says what happened

It becomes two tests: the short form, which `make test` runs (short=0: none), and the full one under the mark `faults`,
which `make test-faults` runs. The full form notes every repetition in a file of the work folder (VISTA_FAULTS_DIR, by
default .faults/ in the checkout), so that a suite that was ended goes on, and `python -m tests.faults.table` makes the
table.
What was noted under another commit does not count.
"""

from __future__ import annotations

import inspect
import json
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments.results import commit, hardware

MAX_FAILURES = 5
"""Failed repetitions after which the full form of a promise stops."""


@dataclass(frozen=True)
class Promise:
    """What is promised, against which fault, and how often it is tried."""

    name: str
    """Of the test function, and of the file of its repetitions."""
    text: str
    fault: str
    full: int
    short: int
    each: int
    """Repetitions of one call of the function, where a process for each would take too long."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Least share of what `Trial.count` counted, by name: a fault that never struck proves nothing."""


@dataclass
class Trial:
    """One repetition."""

    number: int
    """0, 1, …: the same number is the same repetition, in the short form and in the full one."""
    random: random.Random
    folder: Path
    """Empty; kept where the repetition fails."""
    counts: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, times: int = 1) -> None:
        """Note what happened: a phase in which a kill fell, how a damage was noticed."""
        self.counts[what] += times


@dataclass
class Record:
    """What is known of a promise's repetitions."""

    header: dict[str, Any]
    done: set[int] = field(default_factory=set)
    failures: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    skipped: str = ""

    def take(self, row: Mapping[str, Any]) -> None:
        """One noted repetition, or the reason why there are none."""
        if "skipped" in row:
            self.skipped = row["skipped"]
            return
        self.skipped = ""
        self.done.add(row["trial"])
        self.counts.update(row["counts"])
        self.seconds += row["seconds"]
        if row["failure"]:
            self.failures[row["trial"]] = row["failure"]


PROMISES: list[Promise] = []
"""All that were imported, in order."""


def promise(
    text: str, *, fault: str, full: int, short: int, each: int = 1, shares: Mapping[str, float] | None = None
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function of one repetition two tests; see the top of this file."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        this = Promise(function.__name__.removeprefix("test_"), text, fault, full, short, each, shares or {})
        assert full % each == short % each == 0
        PROMISES.append(this)

        @wraps(function)
        def test(trials: Trials, **fixtures: Any) -> None:
            trials.run(lambda trial: function(trial, **fixtures))

        parameters = [
            parameter.replace(name="trials") if name == "trial" else parameter
            for name, parameter in inspect.signature(function).parameters.items()
        ]
        test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        forms = [
            *([pytest.param((this, short), id=f"x{short}")] if short else []),
            pytest.param((this, full), id=f"x{full}", marks=[pytest.mark.faults, pytest.mark.timeout(0)]),
        ]
        parametrized: Callable[..., None] = pytest.mark.parametrize("trials", forms, indirect=True)(test)
        return parametrized

    return decorate


class Trials:
    """The repetitions of a promise: runs those that are not noted yet, notes each, and fails if any ever failed."""

    def __init__(self, promise: Promise, wanted: int, notes: Path, scratch: Path, *, goes_on: bool = False) -> None:
        """`wanted` repetitions, noted in `notes`; `goes_on`: after a failure too, up to MAX_FAILURES."""
        self._promise, self._wanted, self._notes, self._scratch = promise, wanted, notes, scratch
        self._goes_on = goes_on
        notes.parent.mkdir(parents=True, exist_ok=True)
        header = {"promise": promise.name, "commit": commit(), "hardware": hardware()}
        record = read_record(notes)
        if record is None or record.header["commit"] != header["commit"]:
            notes.write_text(json.dumps(header), encoding="utf-8")
            record = Record(header)
        self.record = record

    def run(self, repetition: Callable[[Trial], None]) -> None:
        """All that are left."""
        record = self.record
        for trial in self._left():
            began, failure = time.perf_counter(), ""
            try:
                repetition(trial)
            except pytest.skip.Exception as reason:
                self._note({"skipped": str(reason)})
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:2000]
                if not self._goes_on:
                    raise
            self._note(
                {
                    "trial": trial.number,
                    "seconds": round(time.perf_counter() - began, 4),
                    "counts": trial.counts,
                    "failure": failure,
                }
            )
            if not failure:
                shutil.rmtree(trial.folder, ignore_errors=True)
            elif len(record.failures) >= MAX_FAILURES:
                break
        assert not record.failures, f"{len(record.failures)} of {len(record.done)} calls failed: " + "; ".join(
            f"{number}: {why}" for number, why in record.failures.items()
        )
        missed = missed_shares(self._promise, record)
        assert not missed or self._promise.each * len(record.done) < self._promise.full, missed

    def _left(self) -> Iterator[Trial]:
        for number in range(self._wanted // self._promise.each):
            if number not in self.record.done:
                folder = self._scratch / f"trial-{number}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                yield Trial(number, random.Random(f"{self._promise.name} {number}"), folder)

    def _note(self, row: dict[str, Any]) -> None:
        self.record.take(row)
        with self._notes.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row))  # A kill may have cut the line before.


def missed_shares(promise: Promise, record: Record) -> str:
    """Which of `Promise.shares` were not reached; empty if all were."""
    total = max(sum(record.counts.values()), 1)
    found = {what: record.counts[what] / total for what in promise.shares}
    return "; ".join(
        f"{what}: {found[what]:.0%} instead of {least:.0%}"
        for what, least in promise.shares.items()
        if found[what] < least
    )


def read_record(notes: Path) -> Record | None:
    """What a file of repetitions holds; None where there is none. A last line that was cut off is left out."""
    if not notes.exists():
        return None
    rows = []
    for line in notes.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    if not rows or "commit" not in rows[0]:
        return None
    record = Record(rows[0])
    for row in rows[1:]:
        record.take(row)
    return record


def work_folder() -> Path:
    """Where the full forms note their repetitions."""
    return Path(os.environ.get("VISTA_FAULTS_DIR") or Path(__file__).parents[2] / ".faults")


def share() -> float:
    """Share of the full forms' repetitions to run (VISTA_FAULTS_SHARE): for a first look, a later run does the rest."""
    return float(os.environ.get("VISTA_FAULTS_SHARE") or 1)
