"""Whatever a power cut leaves of a small file, a reader gets the old or the new answer or a typed error.

This goes beyond what the order of writes allows (`test_power_loss_of_operations` follows that): each sector may be old,
new or zero, the file may be cut, and it may lie under its temporary name too.
"""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.faults import operations
from tests.faults.disk_images import SECTOR_BYTES
from tests.faults.harness import Trial, promise
from tests.faults.judging import DIFFERENT, LOST, MAX_TEXT, STUCK, UNTYPED, judge, outcomes
from tests.faults.nursery import Nursery, Say
from tests.faults.operations import ERASED_BEFORE, OPERATIONS, Operation
from vista.errors import VistaError
from vista.store import StoreReader, user_keys
from vista.store.layout import last_complete
from vista.store.tombstones import Tombstones
from vista.training.checkpoint import latest_checkpoint, load_checkpoint

IMAGES = 5


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
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            root = tmp_path_factory.mktemp("versions")
            shutil.copytree(world, root / "before")
            nursery.call(run_operation, root / "before", name, True)
            shutil.copytree(root / "before", root / "after")
            nursery.call(run_operation, root / "after", name, False)
            made[name] = root
        return made[name]

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
        outcome, text = check(file, folder, answers, content in contents[-len(answers) :])
        say([outcome, f"{how}, {path}: {text}"[:MAX_TEXT]])
        if outcome in ("held", "refused"):
            shutil.rmtree(folder)


def check(file: SmallFile, folder: Path, answers: list[Any], whole: bool) -> tuple[str, str]:
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
    run = partial(file.operation.run, folder)
    try:
        run()
    except VistaError as error:
        done = file.operation.repeated and file.operation.repeated in str(error)
        if whole and not done:
            return STUCK, f"{type(error).__name__}: {error}"
        return "refused", ""
    except Exception as error:
        return UNTYPED, f"when repeated: {type(error).__name__}: {error}"
    try:
        file.operation.holds(folder)
    except (VistaError, AssertionError) as error:
        return LOST, f"after the repetition: {type(error).__name__}: {error}"
    return outcome, ""


@promise(
    "Small files are old or new",
    fault="each sector of {kind} old, new or zero; the file cut; leftovers",
    judged=True,
    full=500,
    short=IMAGES,
    each=IMAGES,
    kinds=FILES,
)
def test_small_files(trial: Trial, nursery: Nursery, versions: Callable[[str], Path]) -> None:
    name = trial.promise.kind
    arguments = name, versions(name), trial.folder
    judge(trial, outcomes(nursery, check_torn, *arguments, numbers=list(trial.numbers), timeout_s=120))
