"""On a full disk the writer stops with a typed error, readers keep working, and the run resumes once there is space."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults import oracle, updates
from tests.faults.conftest import require_linux
from tests.faults.harness import Trial, promise
from tests.faults.nursery import Nursery, Say
from tests.faults.oracle import Run
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
    "Disk full", fault="a file system of 64 MiB without room left, for writers and for new readers", full=50, short=2
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


@promise("Disk full", fault="no room left for an incremental refresh with states", full=50, short=1)
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
