"""Promises: reliability tests that run a few times in `make nightly` and thousands of times in `make test-faults`.

A promise is a test function of one repetition:

    @promise("Acknowledged batch survives", fault="kill -9 of the writer", full=1000, short=10)
    def test_killed_writer(trial: Trial, nursery: Nursery) -> None:
        ...  # draw from `trial.random`, work in the empty `trial.folder`, record events with `trial.count("…")`

It becomes up to three tests: a smoke test for `make test` (`smoke` repetitions), the short form with the marker
`nightly`, and the full form with the marker `faults`. `kinds` makes such tests for each of several operations or
formats. The full form records every repetition in a file of the work folder (VISTA_FAULTS_DIR, by default .faults/ in
the checkout), so that an interrupted suite resumes and `python -m tests.faults.table` can write the table. Repetitions
of another commit do not count. A failure ends with the command that repeats it alone: VISTA_FAULTS_ITEM names the
repetition.

`judge`, `try_each`, and `attempt` serve tests that try the same thing with thousands of faults in child processes;
`compare` and `compare_events` count what kills have lost, duplicated, or changed.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import random
import resource
import shutil
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import pytest

from scripts.experiments.results import hardware
from tests.faults.nursery import Nursery, Say
from vista.errors import VistaError, shortened
from vista.installation import source_commit
from vista.log import segment_files
from vista.model import saved_model
from vista.store.record import FORMAT_VERSION as RECORD_VERSION
from vista.store.state_record import FORMAT_VERSION as STATE_VERSION
from vista.training import checkpoint

MAX_FAILURES = 5
"""The full form of a promise stops after this many failed repetitions."""
LOST, DUPLICATED, STUCK, UNTYPED, SIGNAL, DIFFERENT, MEMORY, TIME = (
    *("lost", "duplicated", "stuck", "untyped", "signal", "silently different", "over 1 GiB", "over 10 s"),
)
BROKEN = (LOST, DUPLICATED, STUCK, UNTYPED, SIGNAL, DIFFERENT, MEMORY, TIME)
"""Outcomes that break a promise: what was acknowledged is lost, or is there twice; the command cannot be repeated; an
exception that is neither a VistaError nor documented; the process was ended by a signal; a wrong answer; and the two
limits."""
LOSES_NOTHING = "Kills beyond one machine lose nothing"
MAX_TEXT = 1_500
MAX_MESSAGE = 10_000
"""Characters of the message of an exception."""
MOST_BYTES, MOST_SECONDS = 1 << 30, 10
"""Limits of `try_each`, and of `attempt`."""


@dataclass(frozen=True)
class Promise:
    """A promise, the fault that it withstands, and the number of repetitions."""

    name: str
    """Name of the test function, and of the file with its repetitions."""
    text: str
    fault: str
    full: int
    each: int
    """Repetitions per call of the function, if a process for each would take too long."""
    test: str = ""
    """What pytest runs for the full form, from the root of the checkout."""
    kind: str = ""
    """One of `kinds`; empty without them."""
    judged: bool = False
    """Whether each repetition has an outcome of its own (`judge`)."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Event of `Trial.count` -> its least share: a fault that never strikes proves nothing."""


@dataclass
class Trial:
    """One repetition."""

    number: int
    """0, 1, …; a number means the same repetition in the short and in the full form."""
    random: random.Random
    folder: Path
    """Empty at first; kept if the repetition fails."""
    promise: Promise
    numbers: Sequence[int]
    """Numbers of its `Promise.each` repetitions over all calls, or the single one of them to reproduce."""
    broken: int | None = None
    """The first of these numbers that failed, where the test knows it."""
    counts: Counter[str] = field(default_factory=Counter)

    def count(self, what: str, times: int = 1) -> None:
        """Count an event, such as the phase of a kill or the way damage was noticed."""
        self.counts[what] += times

    def to_reproduce(self) -> str:
        """The command that runs the failed repetition alone."""
        number = self.numbers[0] if self.broken is None else self.broken
        return f"VISTA_FAULTS_ITEM={number} python -m pytest -m faults '{self.promise.test}'"


@dataclass
class Record:
    """The recorded repetitions of a promise."""

    header: dict[str, Any]
    done: set[int] = field(default_factory=set)
    failures: dict[int, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    skipped: str = ""

    def take(self, row: Mapping[str, Any]) -> None:
        """Add a recorded repetition, or the reason why there are none."""
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
"""All imported promises, in order."""


def promise(
    text: str,
    *,
    fault: str,
    full: int,
    short: int | None = None,
    smoke: int = 0,
    smoke_kinds: Collection[str] | None = None,
    each: int = 1,
    kinds: Iterable[str] = ("",),
    judged: bool = False,
    shares: Mapping[str, float] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function of one repetition into its tests; see the top of this file.

    Args:
        fault: may contain `{kind}`.
        short: repetitions in `make nightly`; by default as many as `smoke`.
        smoke: repetitions in `make test`; if there are fewer than `each`, all are in one call.
        smoke_kinds: which of `kinds` have a smoke test; None for all.
        kinds: what `Promise.kind` is, for one promise each.
        judged: whether the test uses `judge`.
    """

    nightly = smoke if short is None else short

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        assert full % each == nightly % each == 0 and (smoke < each or smoke % each == 0)
        name, file = function.__name__, Path(function.__code__.co_filename).name
        forms = []
        for kind in kinds:
            start = f"{kind}-" if kind else ""
            this = Promise(
                "-".join(filter(None, (name.removeprefix("test_"), kind.replace(" ", "-")))),
                text, fault.format(kind=kind), full, each,
                f"tests/faults/{file}::{name}[{start}x{full}]", kind, judged, shares or {},
            )  # fmt: skip
            PROMISES.append(this)
            own_smoke = smoke if smoke_kinds is None or kind in smoke_kinds else 0
            own_short = 0 if nightly == own_smoke else nightly
            long_marks = [pytest.mark.faults, pytest.mark.timeout(0)]
            for number, marks in ((own_smoke, []), (own_short, [pytest.mark.nightly]), (full, long_marks)):
                if number:
                    forms.append(pytest.param((this, number), id=f"{start}x{number}", marks=marks))

        @wraps(function)
        def test(trials: Trials, **fixtures: Any) -> None:
            trials.run(lambda trial: function(trial, **fixtures))

        parameters = [
            parameter.replace(name="trials") if name == "trial" else parameter
            for name, parameter in inspect.signature(function).parameters.items()
        ]
        test.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        parametrized: Callable[..., None] = pytest.mark.parametrize("trials", forms, indirect=True)(test)
        return parametrized

    return decorate


class Trials:
    """Runs the repetitions of a promise that are not recorded yet, records each, and fails if any ever failed."""

    def __init__(self, promise: Promise, wanted: int, notes: Path, scratch: Path, *, keeps_going: bool = False) -> None:
        """Run `wanted` repetitions, recorded in `notes`; with `keeps_going` also after failures, up to MAX_FAILURES."""
        self._promise, self._wanted, self._notes, self._scratch = promise, wanted, notes, scratch
        self._keeps_going = keeps_going
        notes.parent.mkdir(parents=True, exist_ok=True)
        header = {"promise": promise.name, "commit": source_commit(), "formats": formats(), "hardware": hardware()}
        record = read_record(notes)
        if record is None or record.header["commit"] != header["commit"]:
            notes.write_text(json.dumps(header), encoding="utf-8")
            record = Record(header)
        self.record = record

    def run(self, repetition: Callable[[Trial], None]) -> None:
        """Run all remaining repetitions."""
        record = self.record
        for trial in self._left():
            began, failure = time.perf_counter(), ""
            try:
                repetition(trial)
            except pytest.skip.Exception as reason:
                self._note({"skipped": str(reason)})
                raise
            except Exception as error:
                failure = f"{type(error).__name__}: {error}"[:2000] + f"; to reproduce: {trial.to_reproduce()}"
                error.add_note(f"to reproduce: {trial.to_reproduce()}")
                if not self._keeps_going:
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
        promise, item = self._promise, single_item()
        for number in range(max(self._wanted // promise.each, 1)) if item is None else [item // promise.each]:
            if number not in self.record.done:
                folder = self._scratch / f"trial-{number}"
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                end = min(promise.each * (number + 1), self._wanted)
                numbers = range(promise.each * number, end) if item is None else [item]
                yield Trial(number, random.Random(f"{promise.name} {number}"), folder, promise, numbers)

    def _note(self, row: dict[str, Any]) -> None:
        self.record.take(row)
        with self._notes.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row))  # A kill may have truncated the previous line.


def formats() -> dict[str, int]:
    """Versions of the formats of files that the promises are about."""
    return {
        "log": segment_files.VERSION,
        "record": RECORD_VERSION,
        "state": STATE_VERSION,
        "model": saved_model.FORMAT_VERSION,
        "checkpoint": checkpoint.FORMAT_VERSION,
    }


def missed_shares(promise: Promise, record: Record) -> str:
    """The entries of `Promise.shares` that were not reached, as text; empty if all were."""
    total = max(sum(record.counts.values()), 1)
    reached = {what: record.counts[what] / total for what in promise.shares}
    return "; ".join(
        f"{what}: {reached[what]:.0%} instead of {least:.0%}"
        for what, least in promise.shares.items()
        if reached[what] < least
    )


def read_record(notes: Path) -> Record | None:
    """Read a file of repetitions, without truncated lines; None if the file is missing or empty."""
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
    """Folder in which the full forms record their repetitions."""
    return Path(os.environ.get("VISTA_FAULTS_DIR") or Path(__file__).parents[2] / ".faults")


def single_item() -> int | None:
    """The number of the single repetition to run (VISTA_FAULTS_ITEM), to reproduce a failure; None for all."""
    return int(os.environ["VISTA_FAULTS_ITEM"]) if os.environ.get("VISTA_FAULTS_ITEM") else None


def share() -> float:
    """Share of the full repetitions to run (VISTA_FAULTS_SHARE), for a first look; a later run does the rest."""
    return float(os.environ.get("VISTA_FAULTS_SHARE") or 1)


def outcomes(
    nursery: Nursery, job: Callable[..., None], *arguments: Any, numbers: list[int]
) -> Iterator[tuple[int, str, str]]:
    """Call `job(say, *arguments, numbers)` in a child. It says [outcome, text] for each number.

    Where the child is ended by a signal, another one does the rest.

    Yields:
        Number, outcome and text.
    """
    left = list(numbers)
    while left:
        child = nursery.start(job, *arguments, left).end(timeout_s=300)
        assert not child.raised, child.raised
        for outcome, text in child.messages:
            yield left.pop(0), outcome, text
        if child.exit_code == 0:
            assert not left, f"no outcome of {left}"
        elif left:
            timed_out = child.exit_code == -signal.SIGALRM
            yield left.pop(0), TIME if timed_out else SIGNAL, f"exit code {child.exit_code}"


def limit_resources(most_bytes: int = MOST_BYTES) -> None:
    """Limit this process's memory, without a core dump."""
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def try_each(
    say: Say,
    whole: str | Path,
    scratch: str,
    numbers: list[int],
    use: Callable[[int, Path], tuple[str, str]],
    most_bytes: int = MOST_BYTES,
) -> None:
    """In a job of `outcomes`: call `use` with each number and a copy of a folder, with limited memory.

    The copy is the working directory meanwhile, and stays if the outcome breaks a promise.

    Args:
        use: returns the outcome and a text.
    """
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    limit_resources(most_bytes)
    for number in numbers:
        folder = Path(scratch, str(number))
        shutil.copytree(whole, folder)
        os.chdir(folder)
        outcome, text = use(number, folder)
        os.chdir(scratch)
        say([outcome, text[:MAX_TEXT]])
        if outcome not in BROKEN:
            shutil.rmtree(folder)


def attempt(action: Callable[[], Any], *documented: type[BaseException]) -> tuple[str | None, str, Any]:
    """Do something that a fault may make fail, in at most MOST_SECONDS.

    Args:
        documented: exceptions that are allowed besides VistaError.

    Returns:
        The outcome, None if nothing was raised; a text if it breaks a promise; and what the action returned.
    """
    signal.alarm(MOST_SECONDS)
    try:
        return None, "", action()
    except (VistaError, *documented) as error:
        length = len(str(error))
        if length < MAX_MESSAGE:
            return "refused", "", None
        return UNTYPED, f"a message of {length} characters", None
    except MemoryError as error:
        return MEMORY, str(error), None
    except BaseException as error:  # Panics of Rust derive from BaseException
        return UNTYPED, f"{type(error).__module__}.{type(error).__name__}: {shortened(str(error), 300)}", None
    finally:
        signal.alarm(0)


def judge(trial: Trial, nursery: Nursery, job: Callable[..., None], *arguments: Any, alone: bool = False) -> None:
    """Count the `outcomes` of all numbers of a trial, and fail if any of them breaks a promise.

    Args:
        alone: whether each number has a child of its own.
    """
    failures = []
    for numbers in [[number] for number in trial.numbers] if alone else [list(trial.numbers)]:
        for number, outcome, text in outcomes(nursery, job, *arguments, numbers=numbers):
            trial.count(outcome)
            if outcome in BROKEN:
                failures.append(f"{number} {outcome}: {text}")
                trial.broken = number if trial.broken is None else trial.broken
    assert not failures, f"{len(failures)} of {len(trial.numbers)}: " + "; ".join(failures)


def compare(trial: Trial, found: Mapping[Any, Any], *allowed: Mapping[Any, Any]) -> None:
    """Require for each key the value that it has in one of the mappings; a key may be missing if it is missing there.

    Args:
        found: such as the record of each user.
        allowed: such as the records before and after a refresh.
    """
    keys = set().union(found, *allowed)
    lost = {key for key in keys - set(found) if all(key in each for each in allowed)}
    added = {key for key in found if not any(key in each for each in allowed)}
    wrong = {key for key in set(found) - added if not any(key in each and each[key] == found[key] for each in allowed)}
    _fail(trial, {LOST: lost, DUPLICATED: added, DIFFERENT: wrong})


def compare_events(trial: Trial, found: Counter[Any], expected: Counter[Any]) -> None:
    """Require each event as often as expected."""
    _fail(trial, {LOST: (expected - found).elements(), DUPLICATED: (found - expected).elements()})


def _fail(trial: Trial, broken: Mapping[str, Any]) -> None:
    examples: dict[str, list[Hashable]] = {}
    for what, keys in broken.items():
        listed = sorted(keys, key=repr)
        if listed:
            trial.count(what, len(listed))
            examples[f"{len(listed)} {what}"] = listed[:3]
    assert not examples, examples
