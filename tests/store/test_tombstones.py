"""Erasures while a writer publishes, and the file of tombstones: its bytes and damage."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import xxhash

from tests.store.conftest import found, write_generations
from vista.errors import StoreLockedError, StoreWriteError
from vista.store import RecordSpec, StoreReader, StoreWriter, backend, user_keys
from vista.store.admin import roll_back, verify_store
from vista.store.backend import Folder
from vista.store.folder_files import Tombstones, erasure_lock, unpacked
from vista.store.folder_generation import SharedEnvironment
from vista.store.folder_writer import FolderWriter
from vista.store.layout import environment_path, read_current
from vista.store.writer import erase

TOTAL = 40


def all_put(build: Any, root: Path) -> StoreWriter:
    """A writer of a second generation, with all users written."""
    writer = build.open_writer(root, run_digest="log-2")
    build.put_users(writer, range(TOTAL), salt=1)
    return writer


def test_erasures_without_a_pause_do_not_prevent_a_publication(tmp_path, build, monkeypatch):
    build.write_store(tmp_path)
    users, count, sweep = list(range(TOTAL)), backend.count_records, FolderWriter.remove_erased
    refused: list[StoreLockedError] = []

    def erase_one() -> None:
        try:
            erase(tmp_path, [users[0]], wait_s=0.05)
            users.pop(0)
        except StoreLockedError as error:
            refused.append(error)

    def count_and_erase(files: FolderWriter, spec: RecordSpec) -> Any:
        erase_one()
        return count(files, spec)

    def sweep_and_erase(files: FolderWriter) -> None:
        sweep(files)
        erase_one()

    monkeypatch.setattr(backend, "count_records", count_and_erase)
    monkeypatch.setattr(FolderWriter, "remove_erased", sweep_and_erase)
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
        with erasure_lock(tmp_path):
            with all_put(build, tmp_path) as writer, pytest.raises(StoreLockedError, match=refused):
                writer.publish(wait_s=0.1)
            with pytest.raises(StoreLockedError, match=refused):
                erase(tmp_path, [3], wait_s=0.1)
            with pytest.raises(StoreLockedError, match=refused):
                Folder(tmp_path).publish(1, (), wait_s=0.1)
            assert store.get_many([3]).found.all()
        assert read_current(tmp_path) == 1 and erase(tmp_path, [3]) == 1
    with build.open_writer(tmp_path, run_digest="log-2") as writer:
        assert (writer.generation, writer.cursor) == (2, TOTAL)
        assert writer.publish().count == TOTAL - 1


def test_a_publication_finishes_an_erasure_that_was_killed_after_its_tombstone(tmp_path, build):
    build.write_store(tmp_path)
    with all_put(build, tmp_path) as writer:
        with erasure_lock(tmp_path):
            Tombstones(tmp_path).add(user_keys([7]))
        writer.publish()
    assert found(tmp_path, [7, 8]) == [False, True]
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
    assert found(tmp_path, [7]) == [True]
    # A process that is killed after the rename leaves a name that may not be on the disk. The next erasure syncs it.
    with erasure_lock(tmp_path):
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
    monkeypatch.setattr("vista.store.folder_files.replace_file", lambda *_: None)
    with pytest.raises(StoreWriteError, match="some of these users are missing from it after the write"):
        erase(tmp_path, [1, 2])
    assert (tmp_path / "tombstones").read_bytes() == written


def test_a_writer_stopped_within_a_batch_does_not_block_others_forever(tmp_path, build):
    build.write_store(tmp_path / "store")
    build.write_store(tmp_path / "other")
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)

    def write_and_wait() -> None:
        def wait(transaction: Any) -> None:
            sender.send("inside")
            time.sleep(60)

        SharedEnvironment.acquire(environment_path(tmp_path / "store", 1), writable=True).write(wait)

    child = fork.Process(target=write_and_wait)
    child.start()
    try:
        assert receiver.poll(60) and receiver.recv() == "inside"
        os.kill(child.pid, signal.SIGSTOP)
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
                assert all(found(tmp_path / name, [3]))
        thread.join()
        assert raised and time.monotonic() - began < 10
    finally:
        child.kill()
        child.join()
    assert erase(tmp_path / "store", [3]) == 1


def test_an_erasure_continues_if_an_old_generation_is_removed_meanwhile(tmp_path, build, monkeypatch):
    write_generations(tmp_path)
    opened, removed = FolderWriter.open, []

    def open_and_remove(root: Path, generation: int, **options: Any) -> FolderWriter:
        files = opened(root, generation, **options)
        if generation == 1:
            shutil.rmtree(root / "gen-1")
            removed.append(generation)
        return files

    monkeypatch.setattr(FolderWriter, "open", open_and_remove)
    assert erase(tmp_path, [3]) == 1 and removed == [1]
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 2 and store.get_many([3, 4]).found.tolist() == [False, True]


def digest(key: bytes) -> bytes:
    return hashlib.blake2b(key, digest_size=16).digest()


def add(root: Path, users: range) -> None:
    with erasure_lock(root):
        Tombstones(root).add(user_keys(list(users)))


def test_the_bytes_of_the_file(tmp_path):
    add(tmp_path, range(300))
    digests = sorted(map(digest, user_keys(list(range(300)))))
    content = b"VTMB" + bytes([1, 0, 0, 0]) + (300).to_bytes(8, "little") + b"".join(digests)
    assert (tmp_path / "tombstones").read_bytes() == content + xxhash.xxh3_64_intdigest(content).to_bytes(8, "little")
    assert (tmp_path / "tombstones").stat().st_mode & 0o777 == 0o600
    assert Tombstones(tmp_path).erased(user_keys([-1, 0, 299, 300])) == [False, True, True, False]


def test_a_torn_file_stops_everything_that_writes(tmp_path, build):
    """Sectors of zeros must not pass for digests: a repeated erasure would write over digests that survived."""
    build.write_store(tmp_path)
    torn = b"".join(map(digest, user_keys(list(range(40)))))
    (tmp_path / "tombstones").write_bytes(bytes(512) + torn[512:])
    for act in (
        lambda: erase(tmp_path, range(40)),
        lambda: build.write_store(tmp_path, salt=1, run_digest="log-2"),
        lambda: build.update(tmp_path, range(4), 2),
    ):
        with pytest.raises(StoreWriteError, match=r"tombstones is damaged .* erase again every user who was ever"):
            act()
    with StoreReader.open(tmp_path) as store:
        assert store.generation == 1 and store.get_many(range(40)).found.all()
    report = verify_store(tmp_path)
    assert report.num_problems == 1 and "tombstones is damaged" in report.problems[0]
    # The remedy of the message:
    (tmp_path / "tombstones").rename(tmp_path / "moved")
    assert erase(tmp_path, range(40)) == 40
    assert build.write_store(tmp_path, salt=1, run_digest="log-2").count == 0


def test_every_changed_byte_and_every_length_is_an_error(tmp_path):
    add(tmp_path, range(2))
    path, reader = tmp_path / "tombstones", Tombstones(tmp_path)
    whole = path.read_bytes()
    assert len(whole) == 24 + 2 * 16
    assert len(reader) == 2
    for at in range(56):
        for bits in (1 << bit for bit in range(8)):
            with pytest.raises(ValueError, match=r"VTMB|version|its count|checksum"):
                unpacked(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
    for content in [*(whole[:end] for end in range(56)), whole + b"\0", whole + whole, whole[:40] + whole]:
        with pytest.raises(ValueError, match=r"fewer than a header|its count|checksum"):
            unpacked(content)
    path.write_bytes(whole[:-1])
    for held in (reader, Tombstones(tmp_path)):
        with pytest.raises(StoreWriteError, match="is damaged"):
            len(held)


def test_digests_out_of_order_are_an_error(tmp_path):
    digests = sorted(map(digest, user_keys([1, 2])), reverse=True)
    for held in (digests, digests[:1] * 2):
        content = b"VTMB" + bytes([1, 0, 0, 0]) + (2).to_bytes(8, "little") + b"".join(held)
        (tmp_path / "tombstones").write_bytes(content + xxhash.xxh3_64_intdigest(content).to_bytes(8, "little"))
        with pytest.raises(StoreWriteError, match="not in ascending order"):
            len(Tombstones(tmp_path))
