"""Acknowledged batches survive a power cut: disk images from a log of the writer's system calls."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

from tests.faults import oracle, preload, updates
from tests.faults.disk_images import Disk
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from tests.faults.preload import Call
from vista.store import StoreReader

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
    calls, chance = list(preload.read_log(Path(log))), random.Random(seed)
    assert calls, "an empty log"
    for number, cut in enumerate(sorted(chance.choices(range(len(calls)), k=IMAGES))):
        place, least = acknowledged(folder, calls[:cut])
        disk, image = Disk(Path(folder)), Path(scratch) / f"image-{number}"
        disk.take(calls[:cut])
        disk.tear(calls[cut])
        image.mkdir()
        disk.write_image(image, chance)
        try:
            say(check_image(say, image / "store", runs, place, least))
        except Exception as error:
            raise AssertionError(f"{image}, cut at call {cut}: {type(error).__name__}: {error}") from error
        shutil.rmtree(image)


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
    calls, chance = list(preload.read_log(Path(log))), random.Random(seed)
    begin = next(place for place, call in enumerate(calls) if call.path == f"{folder}/{ACKNOWLEDGED}" and call.data)
    for number, cut in enumerate(sorted(chance.choices(range(begin + 1, len(calls)), k=IMAGES))):
        turn, least = acknowledged(folder, calls[:cut])
        disk, image = Disk(Path(folder)), Path(scratch) / f"image-{number}"
        disk.take(calls[:cut])
        disk.tear(calls[cut])
        image.mkdir()
        disk.write_image(image, chance)
        look = updates.check if number % 16 else updates.check_and_continue
        try:
            say(look(say, f"{image}/store", turn, least))
        except Exception as error:
            raise AssertionError(f"{image}, cut at call {cut}: {type(error).__name__}: {error}") from error
        shutil.rmtree(image)


@promise(
    "Acknowledged batch survives",
    fault="power cut during an incremental refresh with states: disk images from a write log",
    full=5000,
    short=50,
    each=IMAGES,
)
def test_power_loss_of_updates(trial: Trial, traced: Nursery) -> None:
    folder, log = trial.folder.resolve() / "disk", trial.folder / "log"
    folder.mkdir()
    traced.call(traced_updates, folder, log)
    checker = traced.start(check_update_images, folder, log, trial.folder, trial.number)
    checker.result(timeout_s=600)
    for outcome in checker.messages:
        trial.count(outcome)


@promise(
    "Acknowledged batch survives", fault="power cut: disk images from a write log", full=5000, short=50, each=IMAGES
)
def test_power_loss(trial: Trial, traced: Nursery) -> None:
    folder, log = trial.folder.resolve() / "disk", trial.folder / "log"
    folder.mkdir()
    words = [run.words for run in runs_of(trial.number)]
    traced.call(traced_writer, folder, words, log)
    checker = traced.start(check_images, folder, log, words, trial.folder, trial.number)
    checker.result(timeout_s=600)
    for outcome in checker.messages:
        trial.count(outcome)
