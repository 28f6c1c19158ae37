"""Promises: reliability tests that run once in `make test` or `make nightly`, and many times in `make test-faults`.

A promise is a test function of one repetition:

    @promise("Acknowledged batch survives", fault="kill -9 of the writer", full=60)
    def test_killed_writer(trial: Trial, nursery: Nursery) -> None:
        ...  # draw from `trial.random`, work in the empty `trial.folder`, record events with `trial.count("…")`

It becomes two tests: a short form of one call, for `make test` with `smoke` and else with the marker `nightly`, and the
full form with the marker `faults`. `kinds` makes such tests for each of several operations or formats. Where the points
of a fault can be listed, such as the system calls of an operation, `trial.number` selects one, so that few repetitions
cover all of them.

The full form records every call in .faults/ of the checkout, so that an interrupted suite resumes and
`python -m tests.faults.table` can write the table. Calls at another commit do not count. A failure ends with the
command that repeats it alone: VISTA_FAULTS_ITEM names the repetition.

`judge`, `try_each`, and `attempt` serve tests that try the same thing with many faults in child processes; `compare`
and `compare_events` count what kills have lost, duplicated, or changed.
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
from vista.evaluation import reference
from vista.export.export import FORMAT_VERSION as EXPORT_VERSION
from vista.installation import source_commit
from vista.log import segment_files
from vista.model import item_index, saved_model
from vista.store import folder_files
from vista.store.record import FORMAT_VERSION as RECORD_VERSION
from vista.store.state_record import FORMAT_VERSION as STATE_VERSION
from vista.training import checkpoint

WORK = Path(__file__).parents[2] / ".faults"
"""Folder in which the full forms record their calls."""
MAX_FAILURES = 5
"""The full form of a promise stops after this many failed calls."""
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

    text: str
    fault: str
    full: int
    each: int = 1
    """Repetitions per call of the function, if a process for each would take too long."""
    test: str = ""
    """What pytest runs for the full form, from the root of the checkout."""
    kind: str = ""
    """One of `kinds`; empty without them."""
    shares: Mapping[str, float] = field(default_factory=dict)
    """Event of `Trial.count` -> its least share: a fault that never strikes proves nothing."""

    @property
    def name(self) -> str:
        """The name of the file with its calls."""
        return self.test.partition("::test_")[2].translate(str.maketrans({"[": "-", "]": "", " ": "-"}))


@dataclass
class Trial:
    """One call of a promise's function."""

    number: int
    """0, 1, …; a number means the same in the short and in the full form."""
    folder: Path
    """Empty at first; kept if the call fails."""
    promise: Promise
    numbers: Sequence[int]
    """Numbers of its `Promise.each` repetitions over all calls, or the single one of them to reproduce."""
    broken: int | None = None
    """The first of these numbers that failed, where the test knows it."""
    counts: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.random = random.Random(f"{self.promise.name} {self.number}")

    def count(self, what: str, times: int = 1) -> None:
        """Count an event, such as the phase of a kill or the way damage was noticed."""
        self.counts[what] += times

    def point(self, count: int) -> int:
        """One of 0 … count - 1, which the calls of the full form cover evenly; the short form has one in the middle."""
        calls = self.promise.full // self.promise.each
        return count * ((self.number + calls // 2) % calls) // calls

    def to_reproduce(self) -> str:
        """The command that runs the failed repetition alone."""
        number = self.numbers[0] if self.broken is None else self.broken
        return f"to reproduce: VISTA_FAULTS_ITEM={number} python -m pytest -m faults '{self.promise.test}'"


@dataclass
class Record:
    """The recorded calls of a promise."""

    header: dict[str, Any]
    rows: dict[int, dict[str, Any]] = field(default_factory=dict)
    """By number of the call."""
    skipped: str = ""

    @property
    def failures(self) -> dict[int, str]:
        """Number of a failed call -> why."""
        return {number: row["failure"] for number, row in self.rows.items() if row["failure"]}

    @property
    def counts(self) -> Counter[str]:
        """The events of all calls."""
        return sum((Counter(row["counts"]) for row in self.rows.values()), Counter())

    def take(self, row: dict[str, Any]) -> None:
        """Add a call, or the reason why there are none."""
        self.skipped = row.get("skipped", "")
        if not self.skipped:
            self.rows[row["trial"]] = row


PROMISES: list[Promise] = []
"""All imported promises, in order."""


def promise(
    text: str,
    *,
    fault: str,
    full: int,
    smoke: bool | Collection[str] = False,
    each: int = 1,
    kinds: Iterable[str] = ("",),
    shares: Mapping[str, float] | None = None,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Turn a function of one repetition into its tests; see the top of this file.

    Args:
        fault: may contain `{kind}`.
        smoke: whether the short form runs in `make test`, or for which of `kinds`.
        kinds: what `Promise.kind` is, for one promise each.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        assert full % each == 0
        forms, file = [], Path(function.__code__.co_filename).name
        for kind in kinds:
            name = f"{function.__name__}[{kind}-full]" if kind else f"{function.__name__}[full]"
            this = Promise(
                text, fault.format(kind=kind), full, each, f"tests/faults/{file}::{name}", kind, shares or {}
            )
            PROMISES.append(this)
            is_smoke = smoke if isinstance(smoke, bool) else kind in smoke
            for is_full, marks in (
                (False, [] if is_smoke else [pytest.mark.nightly]),
                (True, [pytest.mark.faults, pytest.mark.timeout(0)]),
            ):
                form = "-".join(filter(None, (kind, "full" if is_full else "short")))
                forms.append(pytest.param((this, is_full), id=form, marks=marks))

        @wraps(function)
        def test(promised: tuple[Promise, bool], tmp_path: Path, **fixtures: Any) -> None:
            this, is_full = promised

            def repetition(trial: Trial) -> None:
                function(trial, **fixtures)

            number = os.environ.get("VISTA_FAULTS_ITEM")
            if number is not None:
                run_call(Trial(int(number) // each, tmp_path / "trial", this, [int(number)]), repetition)
            elif is_full:
                run_all(this, repetition, WORK / f"{this.name}.jsonl", WORK / "scratch" / this.name)
            else:
                run_call(Trial(0, tmp_path / "trial", this, range(each)), repetition)

        given = inspect.signature(function).parameters.values()
        own = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in ("promised", "tmp_path")]
        rest = [parameter for parameter in given if parameter.name != "trial"]
        test.__signature__ = inspect.Signature([*rest, *own])  # type: ignore[attr-defined]
        parametrized: Callable[..., None] = pytest.mark.parametrize("promised", forms)(test)
        return parametrized

    return decorate


def run_call(trial: Trial, repetition: Callable[[Trial], None]) -> None:
    """Run one call in an empty folder; a failure tells how to reproduce it."""
    shutil.rmtree(trial.folder, ignore_errors=True)
    trial.folder.mkdir(parents=True)
    try:
        repetition(trial)
    except Exception as error:
        error.add_note(trial.to_reproduce())
        raise
    shutil.rmtree(trial.folder, ignore_errors=True)


def run_all(promise: Promise, repetition: Callable[[Trial], None], notes: Path, scratch: Path) -> None:
    """Run all calls that are not recorded in `notes` yet, record each, and fail if any ever failed."""
    header = {"commit": source_commit(), "formats": formats(), "hardware": hardware()}
    record = read_record(notes)
    if record is None or record.header["commit"] != header["commit"]:
        notes.parent.mkdir(parents=True, exist_ok=True)
        notes.write_text(json.dumps(header), encoding="utf-8")
        record = Record(header)

    def note(row: dict[str, Any]) -> None:
        record.take(row)
        with notes.open("a", encoding="utf-8") as file:
            file.write("\n" + json.dumps(row))  # A kill may have truncated the previous line.

    for number in range(promise.full // promise.each):
        if number in record.rows or len(record.failures) >= MAX_FAILURES:
            continue
        numbers = range(promise.each * number, promise.each * (number + 1))
        trial = Trial(number, scratch / f"trial-{number}", promise, numbers)
        began, failure = time.perf_counter(), ""
        try:
            run_call(trial, repetition)
        except pytest.skip.Exception as reason:
            note({"skipped": str(reason)})
            raise
        except Exception as error:
            failure = f"{type(error).__name__}: {error}"[:2000] + f"; {trial.to_reproduce()}"
        seconds = round(time.perf_counter() - began, 4)
        note({"trial": number, "seconds": seconds, "counts": trial.counts, "failure": failure})
    assert not record.failures, f"{len(record.failures)} of {len(record.rows)} calls failed: {record.failures}"
    missed = missed_shares(promise, record)
    assert not missed, missed


def formats() -> dict[str, int]:
    """Versions of the formats of files that the promises are about."""
    return {
        "log": segment_files.VERSION,
        "record": RECORD_VERSION,
        "state": STATE_VERSION,
        "model": saved_model.FORMAT_VERSION,
        "checkpoint": checkpoint.FORMAT_VERSION,
        "item index": item_index.FORMAT_VERSION,
        "export": EXPORT_VERSION,
        "tombstones": folder_files.FORMAT_VERSION,
        "reference": reference.FORMAT_VERSION,
    }


def missed_shares(promise: Promise, record: Record) -> str:
    """The entries of `Promise.shares` that were not reached, as text; empty if all were."""
    counts = record.counts
    reached = {what: counts[what] / max(counts.total(), 1) for what in promise.shares}
    return "; ".join(
        f"{what}: {reached[what]:.0%} instead of {least:.0%}"
        for what, least in promise.shares.items()
        if reached[what] < least
    )


def read_record(notes: Path) -> Record | None:
    """Read a file of calls, without truncated lines; None if the file is missing or empty."""
    rows = []
    for line in notes.read_text(encoding="utf-8").splitlines() if notes.exists() else []:
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
    """Count the `outcomes` of all numbers of a trial, and fail if any of them breaks a promise. `alone`: whether each
    number has a child of its own."""
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
