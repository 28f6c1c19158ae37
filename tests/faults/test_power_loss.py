"""Acknowledged batches and operations survive a power cut.

The system calls of a process are logged once. Each image is a state that a power cut may leave at a call of this log.
Of an operation, it is opened, the command is repeated, and everything is verified. Every other image is of a power cut
while the command is repeated after kill -9, or after another power cut: what a killed process wrote may not be durable.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults import oracle, preload, updates
from tests.faults.disk_images import Disk
from tests.faults.harness import LOST, MAX_TEXT, STUCK, UNTYPED, Trial, judge, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import (
    OPERATIONS,
    USERS,
    Operation,
    log_of,
    ranked,
    run_model,
    served_users,
    verified,
    whole_checkpoints,
)
from tests.faults.oracle import Run
from tests.faults.preload import Call
from vista.errors import VistaError
from vista.store import StoreReader

Job = Callable[..., Any]
ACKNOWLEDGED = "acknowledged"
IMAGES = 50


def runs_of(number: int) -> list[Run]:
    """Generations that a traced writer writes one after the other, the last one unfinished."""
    dims = random.Random(number).sample((16, 300, 3000), 3)
    return [Run(salt=number % 5 + place, total=32, batch=8, dim=dim) for place, dim in enumerate(dims)]


def traced_writer(say: Say, folder: str, runs: list[dict[str, Any]], log: str) -> None:
    """Write the runs to folder/store; lines of folder/acknowledged, in the same log, record run and users."""
    preload.watch(folder, log)
    store = Path(folder) / "store"
    with (Path(folder) / ACKNOWLEDGED).open("wb", buffering=0) as file:
        for place, words in enumerate(runs):
            run = Run(**words)
            with run.open_writer(store) as writer:
                for users in run.batches(0):
                    if place == len(runs) - 1 and users.stop == run.total:
                        return  # Unfinished.
                    writer.put_batch(*run.records(users, writer.spec), users.stop)
                    file.write(b"%d %d\n" % (place, users.stop))
                writer.publish()
                file.write(b"%d 0\n" % (place + 1))


def check_images(say: Say, folder: str, log: str, runs: list[dict[str, Any]], scratch: str, seed: int) -> None:
    """Make images of power cuts anywhere in the log and check each; says what a reader got from it."""
    calls = list(preload.read_log(Path(log)))
    assert calls, "an empty log"
    look_at_images(
        say, folder, calls, 0, scratch, seed, lambda number, store, *least: check_image(say, store, runs, *least)
    )


def look_at_images(
    say: Say,
    folder: str,
    calls: list[Call],
    begin: int,
    scratch: str,
    seed: int,
    look: Callable[[int, Path, int, int], str],
) -> None:
    """Say what `look(number, store, *acknowledged)` returns for IMAGES images of power cuts from call `begin` on."""
    chance = random.Random(seed)
    for number, cut in enumerate(sorted(chance.choices(range(begin, len(calls)), k=IMAGES))):
        image = Path(scratch) / f"image-{number}"
        cut_power(Disk(Path(folder)), calls, cut, image, chance)
        try:
            say(look(number, image / "store", *acknowledged(folder, calls[:cut])))
        except Exception as error:
            raise AssertionError(f"{image}, cut at call {cut}: {type(error).__name__}: {error}") from error
        shutil.rmtree(image)


def cut_power(disk: Disk, calls: list[Call], cut: int, image: Path, chance: random.Random) -> None:
    """Write a state that a power cut at a call may leave."""
    disk.take(calls[:cut])
    if cut < len(calls):
        disk.tear(calls[cut])
    image.mkdir()
    disk.write_image(image, chance)


def kill(disk: Disk, calls: list[Call], cut: int, image: Path) -> None:
    """Leave in `image` what kill -9 before a call leaves; the disk continues there, with what is not durable yet."""
    disk.take(calls[:cut])
    disk.write_current(image)
    disk.move(image)


def check_image(say: Say, store: Path, runs: list[dict[str, Any]], place: int, least: int) -> str:
    """Check what a power cut left while run `place` had acknowledged `least` users and all earlier runs were published.

    Returns:
        What a reader got.
    """
    run = Run(**runs[place])
    if oracle.is_unpublished(store):
        assert place == 0, "a published generation was lost"
        outcome = "nothing published"
    else:
        with StoreReader.open(store) as opened:
            served = opened.generation
        oracle.published(say, str(store), runs[served - 1])
        assert served == place or (served, least) == (place + 1, run.total), (served, place, least)
        if served == place + 1:
            return "the new generation"
        outcome = "the generation before"
    with run.open_writer(store) as writer:
        assert least <= writer.cursor <= least + run.batch, f"{least} acknowledged, the cursor is {writer.cursor}"
    oracle.write(lambda _: None, str(store), runs[place])
    oracle.published(say, str(store), runs[place])
    return outcome


def acknowledged(folder: str, calls: list[Call]) -> tuple[int, int]:
    """(First run that is not acknowledged as published, its acknowledged users)."""
    lines = b"".join(call.data for call in calls if call.name == "w" and call.path == f"{folder}/{ACKNOWLEDGED}")
    place, least = map(int, lines.splitlines()[-1].split()) if lines else (0, 0)
    return place, least


def traced_updates(say: Say, folder: str, log: str) -> None:
    """Publish turn 0, then run two turns; lines of folder/acknowledged record turn and acknowledged users."""
    preload.watch(folder, log)
    store = f"{folder}/store"
    with (Path(folder) / ACKNOWLEDGED).open("wb", buffering=0) as file:
        updates.publish(say, store, head_dim=8)
        file.write(b"1 0\n")
        for turn in (1, 2):
            updates.update(lambda said: file.write(b"%d %d\n" % tuple(said[1:])), store, turn)


def check_update_images(say: Say, folder: str, log: str, scratch: str, seed: int) -> None:
    """Check images of power cuts after turn 0 and say each outcome; every sixteenth also resumes."""
    calls = list(preload.read_log(Path(log)))
    begin = next(place for place, call in enumerate(calls) if call.path == f"{folder}/{ACKNOWLEDGED}" and call.data)

    def look(number: int, store: Path, turn: int, least: int) -> str:
        return (updates.check if number % 16 else updates.check_and_continue)(say, str(store), turn, least)

    look_at_images(say, folder, calls, begin + 1, scratch, seed, look)


def run_and_check(trial: Trial, traced: Nursery, write: Job, check: Job, *arguments: Any) -> None:
    """Log the calls of `write(say, folder, *arguments, log)`, check images of them, and count the outcomes."""
    folder, log = trial.folder.resolve() / "disk", trial.folder / "log"
    folder.mkdir()
    traced.call(write, folder, *arguments, log)
    checker = traced.start(check, folder, log, *arguments, trial.folder, trial.number)
    checker.result(timeout_s=600)
    for outcome in checker.messages:
        trial.count(outcome)


@promise(
    "Acknowledged batch survives",
    fault="power cut during an incremental refresh with states: disk images from a write log",
    full=1500,
    each=IMAGES,
)
def test_power_loss_of_updates(trial: Trial, traced: Nursery) -> None:
    run_and_check(trial, traced, traced_updates, check_update_images)


@promise(
    "Acknowledged batch survives", fault="power cut: disk images from a write log", full=1500, smoke=True, each=IMAGES
)
def test_power_loss(trial: Trial, traced: Nursery) -> None:
    run_and_check(trial, traced, traced_writer, check_images, [run.words for run in runs_of(trial.number)])


OPERATION_IMAGES, EXCHANGE_IMAGES, CUTS = 2, 4, 10
FULL = 150
"""Images per operation in the full form. The longest one makes 73 calls."""
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

    @cache
    def trace(name: str) -> Trace:
        if name == "a training run":
            traced.imports("torch._dynamo")  # Optimizers import it.
        root = tmp_path_factory.mktemp("trace").resolve()
        made = Trace(root / "before", root / "disk", root / "log")
        shutil.copytree(world, made.folder)
        traced.call(prepare_folder, made.folder, name)
        shutil.copytree(made.folder, made.before)
        traced.call(run_traced, made.folder, name, made.log)
        disk = Disk(made.folder, made.before)
        disk.take(preload.read_log(made.log))
        assert not (unseen := disk.unseen(made.folder)), f"{name}: calls on {unseen} were not logged"
        left = [change for change in disk.not_durable() if not change.endswith(NOT_PROMISED) and "/." not in change]
        assert not left, f"a power cut after {name} may undo {left}"
        return made

    return trace


def check_operation_images(
    say: Say, name: str, before: str, folder: str, log: str, scratch: str, numbers: list[int]
) -> None:
    """Make and check images of faults at the calls of the log, and at its end; says [outcome, text] of each.

    The numbers 0 … FULL - 1 cover the calls evenly, from the last to the first: an even one by a power cut, and an odd
    one by kill -9 and a power cut during the repeated command. Some that meet a call again cut the power twice.
    """
    logging.disable(logging.CRITICAL)
    calls, operation = list(preload.read_log(Path(log))), OPERATIONS[name]
    for number in numbers:
        chance = random.Random(f"{name} {number}")
        cut, last = (len(calls) - turn * (len(calls) + 1) // (FULL // 2) for turn in (number // 2, number // 2 - 1))
        disk, image = Disk(Path(folder), Path(before)), Path(scratch, f"image-{number}").resolve()
        if number % 2 and not (cut == last and number % 4 == 3):
            kill(disk, calls, cut, image)
        else:
            cut_power(disk, calls, cut, image, chance)
            disk = Disk(image, image)
        if number % 2:
            again = repeat_traced(operation, image)
            shutil.rmtree(image)
            image = image.with_name(f"{image.name}-again")
            cut_power(disk, again, chance.randrange(len(again) + 1), image, chance)
        say_outcome(say, operation, image, f"call {cut} of {len(calls)}", acknowledged=cut == len(calls))


def say_outcome(say: Say, operation: Operation, image: Path, cut: str, *, acknowledged: bool) -> None:
    """Check the image of a power cut, say [outcome, text], and remove the image unless it is broken."""
    outcome, text = check_operation(operation, image, acknowledged)
    say([outcome, f"cut at {cut}, {image}: {text}"[:MAX_TEXT]])
    if outcome == "held":
        shutil.rmtree(image)


def repeat_traced(operation: Operation, image: Path) -> list[Call]:
    """Repeat an operation on an image; returns its calls."""
    log = image.with_name(f"{image.name}-log")
    preload.watch(str(image), str(log))
    with suppress(VistaError):  # it refuses to be repeated, or the check of the image will find out
        operation.run(image)
    preload.watch("", "")
    return list(preload.read_log(log)) if log.exists() else []


def check_operation(operation: Operation, folder: Path, acknowledged: bool) -> tuple[str, str]:
    """Open an image, repeat the operation, and verify everything.

    Returns:
        "held" or what is broken, and why.
    """

    def open_image() -> None:
        reopen(operation, folder)
        if acknowledged:
            operation.holds(folder)

    def verify() -> None:
        operation.holds(folder)
        reopen(operation, folder)
        verified(folder / "store")
        if (folder / operation.store).exists():
            verified(folder / operation.store)

    return (
        broken("on opening", LOST, open_image)
        or broken("when repeated", STUCK, lambda: repeat(operation, folder), typed=VistaError)
        or broken("after the repetition", LOST, verify)
        or ("held", "")
    )


def repeat(operation: Operation, folder: Path) -> bool:
    """Run an operation, which may refuse to be repeated; returns whether it completed."""
    try:
        operation.run(folder)
        return True
    except VistaError as error:
        if not operation.repeated or operation.repeated not in str(error):
            raise
        return False


def broken(
    when: str,
    what: str,
    action: Callable[[], Any],
    typed: type[Exception] | tuple[type[Exception], ...] = (VistaError, AssertionError),
) -> tuple[str, str] | None:
    """What an action breaks, and why: `what` if it raises a typed error, else UNTYPED; None if it raises nothing."""
    try:
        action()
    except Exception as error:
        return what if isinstance(error, typed) else UNTYPED, f"{when}: {type(error).__name__}: {error}"
    return None


def reopen(operation: Operation, folder: Path) -> None:
    """Require that what was there before the operation can be read, that each checkpoint is complete, and that there is
    a model of the items to which some are added, and one where a run exports its own."""
    users = served_users(folder / "store")
    assert set(users) <= set(USERS)
    log_of(folder).gather([0])
    whole_checkpoints(folder)
    if (folder / "featured").exists():
        ranked(folder)
    if (folder / "runs").exists():
        run_model(folder)


@promise(
    "Operations survive a power cut",
    fault="power cut during {kind}, or its repetition after a kill: disk images from a write log",
    full=FULL,
    each=OPERATION_IMAGES,
    kinds=OPERATIONS,
    smoke=["a full refresh", "an append"],
)
def test_power_loss_of_operations(trial: Trial, traced: Nursery, trace_of: Callable[[str], Trace]) -> None:
    name = trial.promise.kind
    trace = trace_of(name)
    judge(trial, traced, check_operation_images, name, trace.before, trace.folder, trace.log, trial.folder)


def check_images_after_exchange(
    say: Say, name: str, before: str, folder: str, log: str, scratch: str, numbers: list[int]
) -> None:
    """As `check_operation_images`, after a kill right after two folders exchanged their names. The first
    EXCHANGE_IMAGES numbers cover the calls of the repeated command evenly, and so do the first CUTS."""
    logging.disable(logging.CRITICAL)
    calls, operation = list(preload.read_log(Path(log))), OPERATIONS[name]
    killed = 1 + next(place for place, call in enumerate(calls) if call.name == "x")
    for number in numbers:
        disk, image = Disk(Path(folder), Path(before)), Path(scratch, f"image-{number}").resolve()
        kill(disk, calls, killed, image)
        again = repeat_traced(operation, image)
        shutil.rmtree(image)
        cut = 3 * number % CUTS * (len(again) + 1) // CUTS
        cut_power(disk, again, cut, image, random.Random(f"{name} {number}"))
        say_outcome(say, operation, image, f"call {cut} of {len(again)} of the repetition", acknowledged=False)


@promise(
    "Operations survive a power cut",
    fault="power cut while {kind} is repeated after a kill that left an exchange of names not durable",
    full=2 * CUTS,
    each=EXCHANGE_IMAGES,
    kinds=["an addition of items", "a training run"],
    smoke=["a training run"],
)
def test_power_loss_after_an_exchange(trial: Trial, traced: Nursery, trace_of: Callable[[str], Trace]) -> None:
    name = trial.promise.kind
    trace = trace_of(name)
    judge(trial, traced, check_images_after_exchange, name, trace.before, trace.folder, trace.log, trial.folder)
