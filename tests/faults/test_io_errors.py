"""A failed write or fsync raises an error, stops the writer, and is never acknowledged, also not after a power cut."""

from __future__ import annotations

import errno
import random
from pathlib import Path
from typing import Any

from tests.faults import oracle, preload, updates
from tests.faults.disk_images import Disk
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from tests.faults.test_power_loss import check_image
from vista.errors import StoreError

KINDS = {
    "fsync": preload.SYNCS,
    "write": preload.WRITES,
    "create, rename or remove": preload.NAMES,
}
MOST_CALLS = {"fsync": 21, "write": 22, "create, rename or remove": 10}
"""Slightly more than a run makes, so that sometimes nothing fails."""
MOST_UPDATE_CALLS = {"fsync": 40, "write": 60}
ATTEMPTS = 3


def endure(say: Say, store: str, runs: list[dict[str, Any]], log: str, fault: list[int], stubborn: bool) -> int:
    """Publish the first run, meet a fault in the second one, then reopen the writer and resume, at most three times.

    Args:
        say: ["ack", n], ["published", generation] and ["refused", text].
        store: its folder.
        runs: two.
        log: file of the system calls.
        fault: kinds, number, errno and times, as `preload.fail_at` takes them.
        stubborn: put a batch that was refused again into the same writer first.

    Returns:
        Calls of these kinds that were made.
    """
    preload.watch(store, log)
    oracle.write(lambda _: None, store, runs[0])
    preload.fail_at(*fault)
    run = Run.of(runs[1])
    for _ in range(ATTEMPTS):
        try:
            with run.open_writer(store) as writer:
                for users in run.batches(writer.cursor):
                    batch = run.records(users, writer.spec)
                    try:
                        writer.put_batch(*batch, users.stop)
                    except StoreError as error:
                        say(["refused", str(error)[:200]])
                        if not stubborn:
                            raise
                        writer.put_batch(*batch, users.stop)
                    say(["ack", users.stop])
                writer.publish()
                say(["published", writer.generation])
                break
        except StoreError as error:
            say(["refused", str(error)[:200]])
    return preload.calls_since(fault[1])


def check_after_power_cut(say: Say, store: str, log: str, image: str, runs: list[dict[str, Any]], least: int) -> str:
    """Check that a disk image of the end of the log holds everything acknowledged."""
    disk = Disk(Path(store))
    disk.take(preload.read_log(Path(log)))
    disk.write_image(Path(image), random.Random(least))
    return check_image(say, Path(image), runs, 1, least)


def endure_updates(say: Say, store: str, log: str, fault: list[int]) -> int:
    """Publish turn 0, meet a fault in turn 1, and resume, at most three times; says as `update`, and "refused".

    Returns:
        Calls of these kinds that were made.
    """
    preload.watch(store, log)
    updates.publish(say, store, head_dim=8)
    preload.fail_at(*fault)
    for _ in range(ATTEMPTS):
        try:
            updates.update(say, store, 1)
            break
        except StoreError as error:
            say(["refused", str(error)[:200], 0])
    return preload.calls_since(fault[1])


def check_updates_after_power_cut(say: Say, store: str, log: str, image: str, turn: int, least: int) -> str:
    """Check that a disk image of the end of the log holds everything acknowledged."""
    disk = Disk(Path(store))
    disk.take(preload.read_log(Path(log)))
    disk.write_image(Path(image), random.Random(least))
    return updates.check_and_continue(say, image, turn, least)


@promise(
    "Honest fsync failure",
    fault="EIO at the n-th fsync or write of an incremental refresh with states",
    full=200,
    short=2,
)
def test_io_errors_of_updates(trial: Trial, traced: Nursery) -> None:
    store, log, image = (trial.folder.resolve() / name for name in ("store", "log", "image"))
    image.mkdir()
    store.mkdir(mode=0o700)
    kind = trial.random.choice(["fsync", "write"])
    number = trial.random.randint(1, MOST_UPDATE_CALLS[kind])
    fault = [KINDS[kind], number, errno.EIO, trial.random.choice([1, 1, 2, preload.FOREVER])]
    writer = traced.start(endure_updates, store, log, fault)
    made = writer.result()
    refused = any(what == "refused" for what, *_ in writer.messages)
    assert refused or made < number, f"the {number}-th {kind} failed without an error"
    trial.count(f"{kind}: refused" if refused else "no such call")
    turn, least = updates.acknowledged(writer.messages)
    traced.call(check_updates_after_power_cut, store, log, image, turn, least)
    traced.call(updates.check_and_continue, store, turn, least)


@promise("Honest fsync failure", fault="EIO at the n-th fsync, write, create, rename or remove", full=200, short=4)
def test_io_errors(trial: Trial, traced: Nursery) -> None:
    store, log, image = (trial.folder.resolve() / name for name in ("store", "log", "image"))
    image.mkdir()
    store.mkdir(mode=0o700)
    runs = [
        Run(salt=trial.number % 9, total=32).words,
        Run(salt=10, total=32, dim=trial.random.choice([16, 1500])).words,
    ]
    kind = trial.random.choice(["fsync", "fsync", *KINDS])
    number = trial.random.randint(1, MOST_CALLS[kind])
    times = trial.random.choice([1, 1, 2, preload.FOREVER])
    fault = [KINDS[kind], number, errno.EIO, times]
    writer = traced.start(endure, store, runs, log, fault, trial.random.random() < 0.5)
    made = writer.result()
    refused = [text for what, text in writer.messages if what == "refused"]
    assert bool(refused) or made < number, f"the {number}-th {kind} failed without an error"
    trial.count(f"{kind}: refused" if refused else "no such call")
    was_published = ["published", 2] in writer.messages
    least = 0 if was_published else max(oracle.acknowledged(writer.messages), 0)
    if was_published:
        traced.call(oracle.published, store, runs[1], 2)
    traced.call(check_after_power_cut, store, log, image, runs, 32 if was_published else least)
    assert traced.call(oracle.write, store, runs[1]) in (2, 3)
    traced.call(oracle.published, store, runs[1])
