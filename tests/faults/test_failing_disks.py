"""A full disk and failed writes: typed errors, readers keep working, and the run resumes."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import oracle, preload, updates
from tests.faults.conftest import require_linux
from tests.faults.disk_images import Disk
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
from tests.faults.test_power_loss import Job, check_image, cut_power
from vista.errors import StoreError
from vista.store import StoreReader
from vista.store.layout import environment_path

SIZE_BYTES = 64 << 20
BEFORE, RUN = Run(salt=1, total=64), Run(salt=2, total=64, batch=16, dim=6000)
"""The published run, and the run that fills the disk (1.5 MB)."""
HEAD_DIM = 80
"""Of states with 51 KB per user, 1.6 MB in total."""


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Nursery, Path]]:
    """A nursery whose children see a file system of 64 MiB in a folder, in their own mount namespace."""
    require_linux()
    folder = tmp_path_factory.mktemp("disk")
    words = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]
    mount = f"mount -t tmpfs -o size={SIZE_BYTES} tmpfs {folder}"
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare`: cannot mount a small file system")
    tried = subprocess.run([*words, "sh", "-c", mount], capture_output=True, text=True)
    if tried.returncode != 0:
        pytest.skip(f"cannot mount a small file system: {tried.stderr.strip()}")
    with Nursery([*words, "sh", "-c", f'{mount} && exec "$@"', "sh"]) as started:
        yield started, folder


def fill(say: Say, path: str, left: int) -> int:
    """Fill the disk except for `left` bytes; returns the free bytes."""
    free = os.statvfs(Path(path).parent).f_bavail * os.statvfs(Path(path).parent).f_frsize
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(free - left, 1))
    status = os.statvfs(Path(path).parent)
    return status.f_bavail * status.f_frsize


def serve(say: Say, store: str) -> None:
    """Read all users repeatedly until a file `stop` exists next to the store."""
    with StoreReader.open(store) as opened:
        say("serves")
        while not Path(store).with_name("stop").exists():
            oracle_check(opened)


def oracle_check(opened: StoreReader) -> None:
    users = range(BEFORE.total)
    batch = opened.get_many(users)
    assert batch.found.all() and not oracle.differences(batch, BEFORE, users, opened.manifest.spec())


def write_until_full(say: Say, store: str, filler: str, words: dict[str, Any]) -> int:
    """Write until the disk is full, free it and continue in the same process; says ["ack", n] and ["refused", text].

    Returns:
        The generation.
    """
    try:
        return oracle.write(say, store, words)
    except StoreError as error:
        say(["refused", str(error)[:300]])
    os.unlink(filler)
    return oracle.write(say, store, words)


@promise(
    "Disk full", fault="a file system of 64 MiB without room left, for writers and for new readers", full=16, smoke=True
)
def test_disk_full(trial: Trial, small_disk: tuple[Nursery, Path]) -> None:
    nursery, disk = small_disk
    folder = disk / f"trial-{trial.number}"
    store, filler = folder / "store", folder / "filler"
    nursery.call(prepare, folder)
    left = trial.random.choice([0, 0, 4096, trial.random.randrange(1_500_000)])
    free = nursery.call(fill, filler, left)
    reader = nursery.start(serve, store)
    assert reader.hear() == "serves", reader.raised or reader.exit_code
    if trial.random.random() < 0.5:  # As for a copied store, whose reader table does not exist yet.
        nursery.call(remove_lock, store)
    opened = nursery.start(oracle.published, store, BEFORE.words, 1).end()
    assert opened.exit_code == 0 or (opened.typed and "free some space" in opened.raised), (
        f"a new reader ended with {opened.exit_code}: {opened.raised}"
    )
    trial.count("a new reader is served" if opened.exit_code == 0 else "a new reader is refused")
    writer = nursery.start(write_until_full, store, filler, RUN.words)
    assert writer.result() == 2
    trial.count("refused" if any(what == "refused" for what, _ in writer.messages) else f"fitted {free} bytes")
    nursery.call(oracle.published, store, RUN.words, 2)
    nursery.call(touch, folder / "stop")
    reader.result()
    nursery.call(remove, folder)


def update_until_full(say: Say, store: str, filler: str) -> str:
    """Run turn 1 until the disk is full, check the store, then free the disk and continue.

    Returns:
        Whether it was refused, and the outcome of the check.
    """
    said: list[Any] = []
    try:
        updates.update(said.append, store, 1)
    except StoreError as error:
        said.append(["refused", str(error), 0])
        assert "cannot be written" in str(error), error
    outcome = updates.check(say, store, *updates.acknowledged(said))
    os.unlink(filler)
    updates.check_and_continue(say, store, *updates.acknowledged(said))
    return f"{said[-1][0] if said[-1][0] == 'refused' else 'fitted'}, {outcome}"


@promise("Disk full", fault="no room left for an incremental refresh with states", full=16)
def test_disk_full_of_updates(trial: Trial, small_disk: tuple[Nursery, Path]) -> None:
    nursery, disk = small_disk
    folder = disk / f"updates-{trial.number}"
    store, filler = folder / "store", folder / "filler"
    nursery.call(make, folder)
    nursery.call(updates.publish, store, HEAD_DIM)
    nursery.call(fill, filler, trial.random.choice([0, 0, 4096, trial.random.randrange(1_500_000)]))
    trial.count(nursery.call(update_until_full, store, filler))
    nursery.call(remove, folder)


def make(say: Say, path: str) -> None:
    """Create a folder."""
    os.mkdir(path)


def prepare(say: Say, folder: str) -> None:
    """Publish BEFORE in a new folder."""
    os.mkdir(folder)
    oracle.write(lambda _: None, f"{folder}/store", BEFORE.words)


def remove_lock(say: Say, store: str) -> None:
    """Remove the current generation's reader table."""
    os.unlink(environment_path(Path(store), 1) / "lock.mdb")


def touch(say: Say, path: str) -> None:
    """Create an empty file."""
    Path(path).touch()


def remove(say: Say, path: str) -> None:
    """Remove a folder."""
    shutil.rmtree(path)


KINDS = {"fsync": preload.SYNCS, "write": preload.WRITES, "create, rename or remove": preload.NAMES}
MOST_CALLS = {"fsync": 21, "write": 22, "create, rename or remove": 10}
"""Slightly more than a run makes, so that sometimes nothing fails."""
MOST_UPDATE_CALLS = {"fsync": 40, "write": 60}
ATTEMPTS = 3


def endure(say: Say, store: str, log: str, fault: list[int], runs: list[dict[str, Any]], stubborn: bool) -> int:
    """Publish the first run, meet a fault in the second one, then reopen the writer and resume, at most three times.

    Args:
        say: ["ack", n], ["published", generation] and ["refused", text].
        store: its folder.
        log: file of the system calls.
        fault: kinds, number, errno and times, as `preload.fail_at` takes them.
        runs: two.
        stubborn: put a batch that was refused again into the same writer first.

    Returns:
        Calls of these kinds that were made.
    """
    preload.watch(store, log)
    oracle.write(lambda _: None, store, runs[0])
    preload.fail_at(*fault)
    run = Run(**runs[1])
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


def meet_fault(trial: Trial, traced: Nursery, most_calls: dict[str, int], job: Job, *arguments: Any) -> list[Any]:
    """Have `job(say, store, log, fault, *arguments)` meet a fault, which must raise an error; returns what it said."""
    store = trial.folder.resolve() / "store"
    store.mkdir(mode=0o700)
    points = [(kind, number) for kind, most in most_calls.items() for number in range(1, most + 1)]
    kind, number = points[trial.point(len(points))]
    fault = [KINDS[kind], number, errno.EIO, trial.random.choice([1, 1, 2, preload.FOREVER])]
    writer = traced.start(job, store, store.with_name("log"), fault, *arguments)
    made = writer.result()
    refused = any(what == "refused" for what, *_ in writer.messages)
    assert refused or made < number, f"the {number}-th {kind} failed without an error"
    trial.count(f"{kind}: refused" if refused else "no such call")
    return writer.messages


def check_after_power_cut(say: Say, folder: str, runs: list[dict[str, Any]], turn: int, least: int) -> str:
    """Check that a disk image of the end of the log holds everything acknowledged. `runs`: of `endure`; empty after
    `endure_updates`."""
    store, log, image = (Path(folder, name) for name in ("store", "log", "image"))
    calls = list(preload.read_log(log))
    cut_power(Disk(store), calls, len(calls), image, random.Random(least))
    if runs:
        return check_image(say, image, runs, turn, least)
    return updates.check_and_continue(say, str(image), turn, least)


@promise("Honest fsync failure", fault="EIO at the n-th fsync or write of an incremental refresh with states", full=100)
def test_io_errors_of_updates(trial: Trial, traced: Nursery) -> None:
    messages = meet_fault(trial, traced, MOST_UPDATE_CALLS, endure_updates)
    turn, least = updates.acknowledged(messages)
    folder = trial.folder.resolve()
    traced.call(check_after_power_cut, folder, [], turn, least)
    traced.call(updates.check_and_continue, folder / "store", turn, least)


@promise("Honest fsync failure", fault="EIO at the n-th fsync, write, create, rename or remove", full=60, smoke=True)
def test_io_errors(trial: Trial, traced: Nursery) -> None:
    runs = [
        Run(salt=trial.number % 9, total=32).words,
        Run(salt=10, total=32, dim=trial.random.choice([16, 1500])).words,
    ]
    stubborn = trial.random.random() < 0.5
    messages = meet_fault(trial, traced, MOST_CALLS, endure, runs, stubborn)
    folder = trial.folder.resolve()
    was_published = ["published", 2] in messages
    least = 0 if was_published else max(oracle.acknowledged(messages), 0)
    if was_published:
        traced.call(oracle.published, folder / "store", runs[1], 2)
    traced.call(check_after_power_cut, folder, runs, 1, 32 if was_published else least)
    assert traced.call(oracle.write, folder / "store", runs[1]) in (2, 3)
    traced.call(oracle.published, folder / "store", runs[1])
