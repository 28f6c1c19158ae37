"""Every operation survives a power cut: what it acknowledged stays, and the same command completes the rest.

The calls of an operation are logged once. Each image is a state that a power cut may leave somewhere in this log. It is
opened, the command is repeated, and everything is verified. Every tenth image meets a second power cut during the
repeated command.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults import preload
from tests.faults.disk_images import Disk
from tests.faults.harness import Trial, promise
from tests.faults.judging import LOST, MAX_TEXT, STUCK, UNTYPED, judge, outcomes
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import (
    OPERATIONS,
    USERS,
    Operation,
    log_of,
    served_users,
    verified,
    whole_checkpoints,
)
from tests.faults.preload import Call
from vista.errors import VistaError

IMAGES = 2
FULL = 500
"""Images per operation in the full form."""
NOT_PROMISED = ("train.log", "metrics.jsonl", "refresh.jsonl", "writer.lock")
"""Files whose contents may be lost: progress, and the name of the process that holds a lock. Removed folders may stay
under a hidden name, which the next writer removes."""


@dataclass(frozen=True)
class Trace:
    """A run of an operation: the folder before it, the same folder's path in the log, and the log."""

    before: Path
    folder: Path
    log: Path


def prepare_folder(say: Say, folder: str, name: str) -> None:
    """Do what happened before the operation."""
    OPERATIONS[name].before(Path(folder))


def run_traced(say: Say, folder: str, name: str, log: str) -> None:
    """Run an operation and log its calls."""
    logging.disable(logging.CRITICAL)
    preload.watch(folder, log)
    OPERATIONS[name].run(Path(folder))


@pytest.fixture(scope="module")
def trace_of(traced: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Trace]:
    """The trace of an operation, which is made once. Everything must be durable when the operation returns."""
    traced.imports("torch._dynamo")  # Optimizers import it.
    traces: dict[str, Trace] = {}

    def trace(name: str) -> Trace:
        if name not in traces:
            root = tmp_path_factory.mktemp("trace").resolve()
            made = Trace(root / "before", root / "disk", root / "log")
            shutil.copytree(world, made.folder)
            traced.start(prepare_folder, made.folder, name).result()
            shutil.copytree(made.folder, made.before)
            traced.start(run_traced, made.folder, name, made.log).result()
            disk = Disk(made.folder, made.before)
            disk.take(preload.read_log(made.log))
            assert not (unseen := disk.unseen(made.folder)), f"{name}: calls on {unseen} were not logged"
            left = [change for change in disk.not_durable() if not change.endswith(NOT_PROMISED) and "/." not in change]
            assert not left, f"a power cut after {name} may undo {left}"
            traces[name] = made
        return traces[name]

    return trace


def check_images(
    say: Say, name: str, before: str, folder: str, log: str, scratch: str, seed: str, numbers: list[int]
) -> None:
    """Make and check images of power cuts anywhere in the log, and at its end; says [outcome, text] of each."""
    logging.disable(logging.CRITICAL)
    calls, operation = list(preload.read_log(Path(log))), OPERATIONS[name]
    for number in numbers:
        chance = random.Random(f"{seed} {number}")
        cut = chance.choice([len(calls), chance.randrange(len(calls)), chance.randrange(len(calls))])
        image, acknowledged = Path(scratch) / f"image-{number}", cut == len(calls)
        write_image(image, Path(before), Path(folder), calls, cut, chance)
        if number % 10 == 9:
            image = cut_again(operation, image, chance)
        outcome, text = check(operation, image, acknowledged)
        say([outcome, f"cut at call {cut} of {len(calls)}, {image}: {text}"[:MAX_TEXT]])
        if outcome == "held":
            shutil.rmtree(image)


def write_image(image: Path, before: Path, folder: Path, calls: list[Call], cut: int, chance: random.Random) -> None:
    """Write a state that a power cut at a call may leave."""
    disk = Disk(folder, before)
    disk.take(calls[:cut])
    if cut < len(calls):
        disk.tear(calls[cut])
    image.mkdir()
    disk.write_image(image, chance)


def cut_again(operation: Operation, image: Path, chance: random.Random) -> Path:
    """Repeat the operation on an image, with a power cut during it; returns the image of that."""
    before, log, again = (image.with_name(f"{image.name}-{name}") for name in ("before", "log", "again"))
    shutil.copytree(image, before)
    preload.watch(str(image.resolve()), str(log))
    with suppress(VistaError):  # it refuses to be repeated, or the check of the image will find out
        operation.run(image.resolve())
    preload.watch("", "")
    calls = list(preload.read_log(log)) if log.exists() else []
    write_image(again, before, image.resolve(), calls, chance.randrange(len(calls) + 1), chance)
    shutil.rmtree(before)
    shutil.rmtree(image)
    return again


def check(operation: Operation, folder: Path, acknowledged: bool) -> tuple[str, str]:
    """Open an image, repeat the operation, and verify everything.

    Returns:
        "held" or what is broken, and why.
    """
    try:
        reopen(operation, folder)
        if acknowledged:
            operation.holds(folder)
    except (VistaError, AssertionError) as error:
        return LOST, f"{type(error).__name__}: {error}"
    except Exception as error:
        return UNTYPED, f"on opening: {type(error).__name__}: {error}"
    try:
        operation.run(folder)
    except VistaError as error:
        if not operation.repeated or operation.repeated not in str(error):
            return STUCK, f"{type(error).__name__}: {error}"
    except Exception as error:
        return UNTYPED, f"when repeated: {type(error).__name__}: {error}"
    try:
        operation.holds(folder)
        reopen(operation, folder)
        verified(folder / "store")
        if (folder / operation.store).exists():
            verified(folder / operation.store)
    except (VistaError, AssertionError) as error:
        return LOST, f"after the repetition: {type(error).__name__}: {error}"
    except Exception as error:
        return UNTYPED, f"after the repetition: {type(error).__name__}: {error}"
    return "held", ""


def reopen(operation: Operation, folder: Path) -> None:
    """Require that what was there before the operation can be read, and that each checkpoint is complete."""
    users = served_users(folder / "store")
    assert set(users) <= set(USERS)
    log_of(folder).gather([0])
    whole_checkpoints(folder)


@promise(
    "Operations survive a power cut",
    fault="power cut during {kind}: disk images from a write log",
    judged=True,
    full=FULL,
    short=IMAGES,
    each=IMAGES,
    kinds=OPERATIONS,
)
def test_power_loss_of_operations(trial: Trial, traced: Nursery, trace_of: Callable[[str], Trace]) -> None:
    name = trial.promise.kind
    trace = trace_of(name)
    arguments = name, trace.before, trace.folder, trace.log, trial.folder, trial.promise.name
    judge(trial, outcomes(traced, check_images, *arguments, numbers=list(trial.numbers), timeout_s=300))
