"""Erasures while a writer publishes: neither waits long for the other, and no erased user is published again."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

import vista
from vista.errors import StoreLockedError, StoreWriteError
from vista.store import RecordSpec, StoreReader, StoreWriter, locked_folder, locks, user_keys
from vista.store.admin.rollback import roll_back
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.generation_files import GenerationFiles
from vista.store.layout import environment_path, read_current
from vista.store.lmdb.data_file import check_structure
from vista.store.publication import publish_generation
from vista.store.tombstones import Tombstones

TOTAL = 40


def all_put(build: Any, root: Path) -> StoreWriter:
    """A writer of a second generation, with all users written."""
    writer = build.open_writer(root, run_digest="log-2")
    build.put_users(writer, range(TOTAL), salt=1)
    return writer


def test_an_erasure_does_not_wait_for_checks(tmp_path, build, monkeypatch):
    """It proceeds at once while the records of a generation are counted, and while its structure is checked."""
    build.write_store(tmp_path)
    users, check, take = list(range(10)), check_structure, locked_folder.count_records

    def check_and_erase(folder: Path) -> None:
        erase(tmp_path, [users.pop(0)])
        check(folder)

    def count_and_erase(files: GenerationFiles, spec: RecordSpec) -> Any:
        tally = take(files, spec)
        if len(users) > 8:
            erase(tmp_path, [users.pop(0)])
        return tally

    monkeypatch.setattr("vista.store.locked_folder.check_structure", check_and_erase)
    monkeypatch.setattr(locked_folder, "count_records", count_and_erase)
    with all_put(build, tmp_path) as writer:
        writer.publish()
    gone = 10 - len(users)
    assert gone == 3
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2 and len(store) == TOTAL - gone
        assert store.get_many(range(gone + 1)).found.tolist() == [False] * gone + [True]
    assert verify_store(tmp_path).num_problems == 0


def test_erasures_without_a_pause_do_not_prevent_a_publication(tmp_path, build, monkeypatch):
    build.write_store(tmp_path)
    users, count, sweep = list(range(TOTAL)), locked_folder.count_records, GenerationFiles.remove_erased
    refused: list[StoreLockedError] = []

    def erase_one() -> None:
        try:
            erase(tmp_path, [users[0]], wait_s=0.05)
            users.pop(0)
        except StoreLockedError as error:
            refused.append(error)

    def count_and_erase(files: GenerationFiles, spec: RecordSpec) -> Any:
        erase_one()
        return count(files, spec)

    def sweep_and_erase(files: GenerationFiles, stones: Tombstones) -> None:
        sweep(files, stones)
        erase_one()

    monkeypatch.setattr(locked_folder, "count_records", count_and_erase)
    monkeypatch.setattr(GenerationFiles, "remove_erased", sweep_and_erase)
    with all_put(build, tmp_path) as writer:
        writer.publish()
    assert refused and len(users) < TOTAL - 3, "in the end, erasures had to wait"
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2 and list(store.keys()) == users
    assert verify_store(tmp_path).num_problems == 0


def test_waiting_for_an_erasure_has_a_deadline(tmp_path, build):
    build.write_store(tmp_path)
    refused = rf"process {os.getpid()} has been erasing users or publishing.*wait for it or kill it"
    with StoreReader.open(tmp_path) as store:
        with locks.erasure_lock(tmp_path):
            with all_put(build, tmp_path) as writer, pytest.raises(StoreLockedError, match=refused):
                writer.publish(wait_s=0.1)
            with pytest.raises(StoreLockedError, match=refused):
                erase(tmp_path, [3], wait_s=0.1)
            with pytest.raises(StoreLockedError, match=refused):
                publish_generation(tmp_path, 1, (), wait_s=0.1)
            assert store.get_many([3]).found.all()
        assert read_current(tmp_path) == 1 and erase(tmp_path, [3]) == 1
    with build.open_writer(tmp_path, run_digest="log-2") as writer:
        assert (writer.generation, writer.cursor) == (2, TOTAL)
        assert writer.publish().count == TOTAL - 1


def test_a_publication_finishes_an_erasure_that_was_killed_after_its_tombstone(tmp_path, build):
    build.write_store(tmp_path)
    with all_put(build, tmp_path) as writer:
        with locks.erasure_lock(tmp_path):
            Tombstones(tmp_path).add(user_keys([7]))
        writer.publish()
    with StoreReader.open(tmp_path) as store:
        assert store.get_many([7, 8]).found.tolist() == [False, True]
    roll_back(tmp_path)
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 1 and store.get_many([7, 8]).found.tolist() == [False, True]
    assert verify_store(tmp_path).num_problems == 0


def test_a_failed_erasure_is_reported_and_can_be_repeated(tmp_path, build, monkeypatch):
    build.write_store(tmp_path)
    synced, fsync, polled = [], os.fsync, Tombstones(tmp_path)

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(StoreWriteError, match=r"these users may not have been erased: check the disk"):
            erase(tmp_path, [7])
    assert polled.erased(user_keys([7])) == [False]
    with StoreReader.open(tmp_path) as store:
        assert store.get_many([7]).found.tolist() == [True]
    # A process that is killed after the rename leaves a name that may not be on the disk. The next erasure syncs it.
    with locks.erasure_lock(tmp_path):
        Tombstones(tmp_path).add(user_keys([9]))
    assert polled.erased(user_keys([7, 9])) == [False, True]

    def noted(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    assert erase(tmp_path, [9]) == 1 and synced[1] == str(tmp_path) and "tombstones" in synced[0]
    assert len(Tombstones(tmp_path)) == 1


def test_an_erasure_that_the_disk_did_not_keep_is_reported(tmp_path, build, monkeypatch):
    """The tombstones are read again after the write, and must name every user."""
    build.write_store(tmp_path)
    erase(tmp_path, [1])
    written = (tmp_path / "tombstones").read_bytes()
    monkeypatch.setattr("vista.store.tombstones.replace_file", lambda *_: None)
    with pytest.raises(StoreWriteError, match="some of these users are missing from it after the write"):
        erase(tmp_path, [1, 2])
    assert (tmp_path / "tombstones").read_bytes() == written


STOPPED = """
import sys, time
from pathlib import Path
from vista.store.lmdb.environment import SharedEnvironment
environment = SharedEnvironment.acquire(Path(sys.argv[1]), writable=True)
def stop(transaction):
    print("inside", flush=True)
    time.sleep(60)
environment.write(stop)
"""


def test_a_writer_stopped_within_a_batch_does_not_block_others_forever(tmp_path, build):
    build.write_store(tmp_path / "store")
    build.write_store(tmp_path / "other")
    root = Path(vista.__file__).parents[1]
    child = subprocess.Popen(
        [sys.executable, "-c", STOPPED, str(environment_path(tmp_path / "store", 1))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")])},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None and child.stdout.readline() == "inside\n"
        child.send_signal(signal.SIGSTOP)
        raised = []

        def erase_one() -> None:
            with pytest.raises(StoreLockedError, match=f"process {child.pid} has been writing a batch") as caught:
                erase(tmp_path / "store", [3], wait_s=0.5)
            raised.append(caught)

        thread = threading.Thread(target=erase_one)
        thread.start()
        began = time.monotonic()
        while thread.is_alive():  # readers of this process, of this store and of another
            for name in ("store", "other"):
                with StoreReader.open(tmp_path / name) as store:
                    assert store.get_many([3]).found.all()
        thread.join()
        assert raised and time.monotonic() - began < 10
    finally:
        child.kill()
        child.wait()
    assert erase(tmp_path / "store", [3]) == 1


def test_an_erasure_continues_if_an_old_generation_is_removed_meanwhile(tmp_path, build, monkeypatch):
    build.write_store(tmp_path)
    build.write_store(tmp_path, salt=1, run_digest="log-2")
    opened, removed = GenerationFiles.open, []

    def open_and_remove(root: Path, generation: int, **options: Any) -> GenerationFiles:
        files = opened(root, generation, **options)
        if generation == 1:
            shutil.rmtree(root / "gen-1")
            removed.append(generation)
        return files

    monkeypatch.setattr(GenerationFiles, "open", open_and_remove)
    assert erase(tmp_path, [3]) == 1 and removed == [1]
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2 and store.get_many([3, 4]).found.tolist() == [False, True]
