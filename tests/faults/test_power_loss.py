"""Acknowledged batches, operations, and small files survive a power cut.

The system calls of a process are logged once. Each image is a state that a power cut may leave somewhere in this log.
Of an operation, it is opened, the command is repeated, and everything is verified; every tenth of these images meets a
second power cut during the repeated command. `test_small_files` goes beyond what the order of writes allows: each
sector may be old, new or zero, the file may be cut, and it may lie under its temporary name too.
"""

from __future__ import annotations

import logging
import random
import shutil
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.faults import operations, oracle, preload, updates
from tests.faults.disk_images import SECTOR_BYTES, Disk
from tests.faults.harness import DIFFERENT, LOST, MAX_TEXT, STUCK, UNTYPED, Trial, judge, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import (
    ERASED_BEFORE,
    OPERATIONS,
    USERS,
    Operation,
    log_of,
    served_users,
    verified,
    whole_checkpoints,
)
from tests.faults.oracle import Run
from tests.faults.preload import Call
from vista.errors import VistaError
from vista.store import StoreReader, user_keys
from vista.store.layout import last_complete
from vista.store.tombstones import Tombstones
from vista.training.checkpoint import latest_checkpoint, load_checkpoint

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
            run = Run.of(words)
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
        write_image(image, None, Path(folder), calls, cut, chance)
        try:
            say(look(number, image / "store", *acknowledged(folder, calls[:cut])))
        except Exception as error:
            raise AssertionError(f"{image}, cut at call {cut}: {type(error).__name__}: {error}") from error
        shutil.rmtree(image)


def write_image(
    image: Path, before: Path | None, folder: Path, calls: list[Call], cut: int, chance: random.Random
) -> None:
    """Write a state that a power cut at a call may leave."""
    disk = Disk(folder, before)
    disk.take(calls[:cut])
    if cut < len(calls):
        disk.tear(calls[cut])
    image.mkdir()
    disk.write_image(image, chance)


def check_image(say: Say, store: Path, runs: list[dict[str, Any]], place: int, least: int) -> str:
    """Check what a power cut left while run `place` had acknowledged `least` users and all earlier runs were published.

    Returns:
        What a reader got.
    """
    run = Run.of(runs[place])
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
    full=5000,
    short=50,
    each=IMAGES,
)
def test_power_loss_of_updates(trial: Trial, traced: Nursery) -> None:
    run_and_check(trial, traced, traced_updates, check_update_images)


@promise(
    "Acknowledged batch survives", fault="power cut: disk images from a write log", full=5000, smoke=IMAGES, each=IMAGES
)
def test_power_loss(trial: Trial, traced: Nursery) -> None:
    run_and_check(trial, traced, traced_writer, check_images, [run.words for run in runs_of(trial.number)])


OPERATION_IMAGES = 2
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
    say: Say,
    name: str,
    before: str,
    folder: str,
    log: str,
    begin: int,
    completed: bool,
    scratch: str,
    seed: str,
    numbers: list[int],
) -> None:
    """Make and check images of power cuts from call `begin` on, and at the end; says [outcome, text] of each.

    Args:
        completed: whether the operation completed at the end of the log, so that what it promises must hold there.
    """
    logging.disable(logging.CRITICAL)
    calls, operation = list(preload.read_log(Path(log))), OPERATIONS[name]
    for number in numbers:
        chance = random.Random(f"{seed} {number}")
        cut = chance.choice([len(calls), chance.randint(begin, len(calls)), chance.randint(begin, len(calls))])
        image, acknowledged = Path(scratch) / f"image-{number}", completed and cut == len(calls)
        write_image(image, Path(before), Path(folder), calls, cut, chance)
        if number % 10 == 9:
            image = cut_again(operation, image, chance)
        outcome, text = check_operation(operation, image, acknowledged)
        say([outcome, f"cut at call {cut} of {len(calls)}, {image}: {text}"[:MAX_TEXT]])
        if outcome == "held":
            shutil.rmtree(image)


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
    each=OPERATION_IMAGES,
    kinds=OPERATIONS,
    smoke=OPERATION_IMAGES,
    smoke_kinds=["a full refresh", "an append"],
)
def test_power_loss_of_operations(trial: Trial, traced: Nursery, trace_of: Callable[[str], Trace]) -> None:
    name = trial.promise.kind
    trace = trace_of(name)
    arguments = name, trace.before, trace.folder, trace.log, 0, True, trial.folder, trial.promise.name
    judge(trial, traced, check_operation_images, *arguments)


KILLED_IMAGES = 10
"""Images per kill."""


def run_killed(say: Say, folder: str, name: str, log: str, kinds: int, number: int) -> None:
    """Run an operation, log its calls, and die right before the `number`-th call of these kinds."""
    preload.fail_at(kinds, number, -signal.SIGKILL)
    run_traced(say, folder, name, log)


def repeat_traced(say: Say, folder: str, name: str, log: str) -> bool:
    """Repeat an operation and log its calls; returns whether it completed, instead of a refusal to be repeated."""
    logging.disable(logging.CRITICAL)
    preload.watch(folder, log)
    return repeat(OPERATIONS[name], Path(folder))


@promise(
    "Operations survive a power cut",
    fault="power cut while {kind} is repeated after a kill: disk images from a write log",
    judged=True,
    full=100,
    each=KILLED_IMAGES,
    kinds=OPERATIONS,
    smoke=KILLED_IMAGES,
    smoke_kinds=["an addition of items"],
)
def test_power_loss_after_a_kill(trial: Trial, traced: Nursery, trace_of: Callable[[str], Trace]) -> None:
    """Half of the kills come after names were exchanged or changed, before that is durable; so does the first one."""
    name = trial.promise.kind
    trace = trace_of(name)
    calls = list(preload.read_log(trace.log))
    kinds, number = preload.WRITES | preload.SYNCS | preload.NAMES, trial.random.randint(1, len(calls))
    changes = [place for name in "xr" for place, call in enumerate(calls) if call.name == name]
    if changes and trial.number % 2 == 0:
        earlier = calls[: changes[0] if trial.number == 0 else trial.random.choice(changes)]
        kinds, number = preload.SYNCS, 1 + sum(call.name == "s" or call.synchronous for call in earlier)
    folder, log = trial.folder.resolve() / "disk", trial.folder / "log"
    shutil.copytree(trace.before, folder)
    killed = traced.start(run_killed, folder, name, log, kinds, number).end()
    assert killed.exit_code in (0, -signal.SIGKILL), killed.raised
    begin = len(list(preload.read_log(log)))
    completed = traced.call(repeat_traced, folder, name, log)
    arguments = name, trace.before, folder, log, begin, completed, trial.folder, trial.promise.name
    judge(trial, traced, check_operation_images, *arguments)


FILE_IMAGES = 5


@dataclass(frozen=True)
class SmallFile:
    """A file, the operation that writes it, and what a reader learns from it."""

    path: str
    operation: Operation
    answer: Callable[[Path], Any]
    after: bool = True
    """Whether the rest of the folder is as after the operation; otherwise as before it."""


def served(folder: Path) -> int:
    with StoreReader.open(folder / "store") as opened:
        assert opened.get_many(list(opened.keys())).found.all()
        return opened.generation


def erased(folder: Path) -> list[int]:
    tombstones = Tombstones(folder / "store")
    return [sum(tombstones.erased(user_keys(list(users)))) for users in (ERASED_BEFORE, range(101, 141))]


def newest_checkpoint(folder: Path) -> str:
    newest = latest_checkpoint(folder / "run" / "checkpoints")
    assert newest is not None
    load_checkpoint(newest)
    return newest.name


FILES = {
    "CURRENT": SmallFile("store/CURRENT", OPERATIONS["a full refresh"], served),
    "LAST": SmallFile("store/LAST", OPERATIONS["a full refresh"], lambda folder: last_complete(folder / "store")),
    "tombstones": SmallFile("store/tombstones", OPERATIONS["an erasure of 40"], erased, after=False),
    "the manifest of a segment": SmallFile(
        "log/segment-000002/manifest.json",
        OPERATIONS["an append"],
        lambda folder: operations.num_events(operations.log_of(folder)),
    ),
    "the state of a checkpoint": SmallFile(
        "run/checkpoints/step-00000007/state.json",
        Operation(operations.checkpoints, operations.holds_checkpoints),
        newest_checkpoint,
    ),
}


def run_operation(say: Say, folder: str, name: str, before: bool) -> None:
    """Run the operation of a file, or what comes before it."""
    operation = FILES[name].operation
    (operation.before if before else operation.run)(Path(folder))


@pytest.fixture(scope="module")
def versions(nursery: Nursery, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A folder with before/ and after/ of the operation of a file, made once."""

    @cache
    def make(name: str) -> Path:
        root = tmp_path_factory.mktemp("versions")
        shutil.copytree(world, root / "before")
        nursery.call(run_operation, root / "before", name, True)
        shutil.copytree(root / "before", root / "after")
        nursery.call(run_operation, root / "after", name, False)
        return root

    return make


def torn(old: bytes, new: bytes, chance: random.Random) -> tuple[str, bytes | None]:
    """What may be left of a file that is rewritten, in words and bytes; None if it is absent."""
    how = chance.choice(["old", "new", "sectors", "sectors", "sectors", "cut"])
    match how:
        case "old" if not old:
            return "absent", None
        case "cut":
            return how, new[: chance.randrange(len(new))]
        case "sectors":
            size = chance.choice([len(old), len(new), max(len(old), len(new))])
            content = b""
            for begin in range(0, size, SECTOR_BYTES):
                source = chance.choice([old, new, b""])
                content += source[begin : begin + SECTOR_BYTES].ljust(SECTOR_BYTES, b"\0")
            return how, content[:size]
    return how, old if how == "old" else new


def check_torn(say: Say, name: str, versions: str, scratch: str, numbers: list[int]) -> None:
    """Tear a file, read it and repeat the command; says [outcome, text] of each."""
    logging.disable(logging.CRITICAL)
    file, old, new = FILES[name], Path(versions, "before"), Path(versions, "after")
    contents = [path.read_bytes() if path.exists() else b"" for path in (old / file.path, new / file.path)]
    answers = [file.answer(new)]
    if (old / file.path).exists():
        answers.append(file.answer(old))
    for number in numbers:
        chance = random.Random(f"{name} {number}")
        how, content = torn(contents[0], contents[1], chance)
        folder = Path(scratch, f"torn-{number}")
        shutil.copytree(new if file.after else old, folder)
        path = folder / file.path
        path.unlink(missing_ok=True)
        for target in (path, path.with_name(f"{path.name}.tmp"), path.with_name(f".{path.name}.77.tmp")):
            if content is not None and (target == path or chance.random() < 0.3):
                target.write_bytes(content)
        outcome, text = check_small_file(file, folder, answers, content in contents[-len(answers) :])
        say([outcome, f"{how}, {path}: {text}"[:MAX_TEXT]])
        if outcome in ("held", "refused"):
            shutil.rmtree(folder)


def check_small_file(file: SmallFile, folder: Path, answers: list[Any], whole: bool) -> tuple[str, str]:
    """Read the file and repeat the command, which must complete if the file is whole."""
    outcome = "held"
    try:
        answer = file.answer(folder)
        if answer not in answers and (folder / file.path).exists():
            return DIFFERENT, f"a reader got {answer!r:.200} instead of {answers!r:.400}"
    except VistaError as error:
        if whole:
            return LOST, f"{type(error).__name__}: {error}"
        outcome = "refused"
    except Exception as error:
        return UNTYPED, f"on reading: {type(error).__name__}: {error}"
    try:
        file.operation.run(folder)
    except VistaError as error:
        done = file.operation.repeated and file.operation.repeated in str(error)
        if whole and not done:
            return STUCK, f"{type(error).__name__}: {error}"
        return "refused", ""
    except Exception as error:
        return UNTYPED, f"when repeated: {type(error).__name__}: {error}"
    return broken("after the repetition", LOST, lambda: file.operation.holds(folder)) or (outcome, "")


@promise(
    "Small files are old or new",
    fault="each sector of {kind} old, new or zero; the file cut; leftovers",
    judged=True,
    full=500,
    short=FILE_IMAGES,
    each=FILE_IMAGES,
    kinds=FILES,
)
def test_small_files(trial: Trial, nursery: Nursery, versions: Callable[[str], Path]) -> None:
    name = trial.promise.kind
    judge(trial, nursery, check_torn, name, versions(name), trial.folder)
