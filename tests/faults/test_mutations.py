"""Damaged files of every format: refused with a typed error, or read. Never a signal, never silently different.

A format with a checksum must give the answer of the undamaged file, and another one the same answer each time.

Each file is read in a child that may have 1 GiB of memory and 10 seconds.
"""

from __future__ import annotations

import logging
import random
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.formats import FORMATS, mutated
from tests.faults.harness import Trial, promise
from tests.faults.judging import DIFFERENT, MAX_TEXT, attempt, judge, outcomes
from tests.faults.nursery import Nursery, Say

MUTATIONS = 10
TAKEN = "taken with other contents"
MOST_BYTES, MOST_SECONDS = 1 << 30, 10


def make_format(say: Say, name: str, folder: str) -> None:
    """Make an undamaged example."""
    FORMATS[name].make(Path(folder))


@pytest.fixture(scope="module")
def whole(nursery: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of an undamaged example of a format, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp("whole") / "files"
            shutil.copytree(world, folder)
            nursery.call(make_format, name, folder)
            made[name] = folder
        return made[name]

    return make


def limit_resources(most_bytes: int = MOST_BYTES) -> None:
    """Limit this process's memory, without a core dump."""
    resource.setrlimit(resource.RLIMIT_DATA, (most_bytes, most_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def read_damaged(say: Say, name: str, whole: str, world: str, scratch: str, numbers: list[int]) -> None:
    """Damage one file for each number and read it; says [outcome, text]."""
    logging.disable(logging.CRITICAL)
    limit_resources()
    read, folder = FORMATS[name].read, Path(scratch, "undamaged")
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    expected = read(folder, Path(world))
    for number in numbers:
        folder = Path(scratch, f"damaged-{number}")
        shutil.copytree(whole, folder)
        chance = random.Random(f"{name} {number}")
        found = (path for pattern in FORMATS[name].files for path in folder.glob(pattern))
        files = sorted(path for path in found if path.is_file() and path.stat().st_size)
        path = chance.choice(files)
        what, content = mutated(path.read_bytes(), chance)
        path.write_bytes(content)
        signal.alarm(MOST_SECONDS)
        outcome, text = read_once(name, folder, Path(world), expected)
        signal.alarm(0)
        say([outcome, f"{path}, {what}: {text}"[:MAX_TEXT]])
        if not text:
            shutil.rmtree(folder)


def read_once(name: str, folder: Path, world: Path, expected: str) -> tuple[str, str]:
    """Read damaged files; returns the outcome, and a text if it breaks the promise."""
    outcome, text, answer = attempt(lambda: FORMATS[name].read(folder, world))
    if outcome is not None:
        return outcome, text
    if answer == expected:
        return "equal", ""
    if FORMATS[name].checked:
        return DIFFERENT, answer
    again = FORMATS[name].read(folder, world)
    return (TAKEN, "") if again == answer else (DIFFERENT, f"{answer}, then {again}")


@promise(
    "Damaged files are refused or read right",
    fault="changed bytes in {kind}",
    judged=True,
    full=2000,
    short=MUTATIONS,
    each=MUTATIONS,
    kinds=FORMATS,
)
def test_mutations(trial: Trial, nursery: Nursery, world: Path, whole: Callable[[str], Path]) -> None:
    name = trial.promise.kind
    arguments = name, whole(name), world, trial.folder
    judge(trial, outcomes(nursery, read_damaged, *arguments, numbers=list(trial.numbers), timeout_s=300))
