"""Damaged, truncated and foreign files: each error names a remedy, and the published generation stays in service."""

from __future__ import annotations

import errno
import json
import shutil
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path

import lmdb
import numpy as np
import pytest
import xxhash

from tests.store.conftest import damage_record, found, write_generations
from vista.counters.counters import CounterSpec
from vista.errors import RecordError, StoreError, StoreWriteError
from vista.store import StoreReader
from vista.store.admin import compact_store, roll_back, store_stats, verify_store
from vista.store.folder_files import committed_size, open_environment
from vista.store.folder_generation import _Gate
from vista.store.layout import environment_path, read_current
from vista.store.manifest import Manifest
from vista.store.writer import erase

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "truncated": lambda data: data[:-4096],
    "executable text": lambda data: b"cos\nsystem\n(S'touch canary'\ntR." * 400,
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_new_generation_leaves_the_old_one_in_service(tmp_path, build, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = tmp_path / "store"
    build.write_store(root)
    with StoreReader.open(root) as store:
        build.write_store(root, salt=1, run_digest="log-2")
        data = environment_path(root, 2) / "data.mdb"
        data.write_bytes(DAMAGE[kind](data.read_bytes()))
        for _ in range(2):
            with pytest.raises(StoreError, match=r"data\.mdb.*(truncated|not an LMDB).*refresh the store again"):
                store.reload()
        assert store.generation == 1
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40)), atol=0.02)
    assert verify_store(root).num_problems == 1
    roll_back(root)  # the remedy
    with StoreReader.open(root) as store:
        assert store.generation == 1 and store.get_many(range(40)).found.all()
    assert build.write_store(root, salt=2, run_digest="log-3").generation == 3
    assert not list(tmp_path.rglob("canary"))


def test_only_the_damaged_record_is_refused(tmp_path, build):
    build.write_store(tmp_path)
    damage_record(tmp_path, 1, 5)
    with StoreReader.open(tmp_path) as store:
        with pytest.raises(RecordError, match=r"user 5 .*checksum.*Refresh the store again, or publish the previous"):
            store.get_many(range(40))
        others = [user for user in range(40) if user != 5]
        np.testing.assert_allclose(store.get_many(others).summary, build.summaries(range(40))[others], atol=0.02)


def test_a_missing_lock_file_is_recreated(tmp_path, build):
    build.write_store(tmp_path)
    lock = environment_path(tmp_path, 1) / "lock.mdb"
    lock.unlink()
    (tmp_path / "writer.lock").unlink()
    assert all(found(tmp_path, range(40)))
    assert lock.stat().st_mode & 0o777 == 0o600
    assert build.write_store(tmp_path, run_digest="log-2").generation == 2


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"codec": "pickle"}, "pickle"),
        ({"num_tokens": 65_535, "dim": 65_535}, "do not fit a record"),
        ({"summarizer_id": "zz" * 32}, "summarizer_id: expected 64 hex digits"),
        ({"format_version": 1}, "format version 1, but this version of vista reads 3"),
        ({"dim": "8"}, "another version of vista, or is damaged"),
        ({"counters": {"spec": CounterSpec().to_dict(), "key_bytes": []}}, "key_bytes: expected 1 to 4"),
        ({"tail_columns": [{"name": "surface", "size": 0}]}, "size: expected a whole number from 1"),
        ({"user_columns": [{"name": "region", "size": 1, "values": "x"}]}, "values: expected"),
    ],
)
def test_an_invalid_manifest_with_a_valid_checksum(tmp_path, build, change, named):
    build.write_store(tmp_path, total_users=1)
    with StoreReader.open(tmp_path) as store:
        fields = json.loads(store.manifest.to_bytes().partition(b"\n")[2]) | change
    text = json.dumps(fields).encode()
    value = xxhash.xxh3_64_hexdigest(text).encode() + b"\n" + text
    with pytest.raises(StoreError, match=named):
        Manifest.from_bytes(value, tmp_path)


@pytest.fixture
def read_only_system(tmp_path, build):
    """A store of two generations on a file system that is mounted read-only."""
    root = tmp_path / "mount"
    root.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "vista", str(root)], capture_output=True).returncode:
        pytest.skip("needs permission to mount a file system")
    try:
        write_generations(root / "store")
        subprocess.run(["mount", "-o", "remount,ro", str(root)], check=True)
        yield root / "store"
    finally:
        subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_read_only_file_system_can_be_read_and_refuses_writers(read_only_system, build):
    with StoreReader.open(read_only_system) as store:
        assert store.get_many(range(40)).found.all() and not store.reload()
    assert verify_store(read_only_system).num_problems == 0
    assert store_stats(read_only_system).published == 2
    for act in (
        lambda: build.open_writer(read_only_system, run_digest="log-3"),
        lambda: compact_store(read_only_system),
        lambda: roll_back(read_only_system),
    ):
        with pytest.raises(StoreError, match=r"cannot be written: .*Read-only file system"):
            act()
    assert read_current(read_only_system) == 2


def test_a_generation_without_a_folder_is_named(tmp_path):
    """Such as an old generation that a publication removes just before an erasure opens it."""
    for readonly in (False, True):
        with pytest.raises(StoreError, match="gen-3"):
            open_environment(tmp_path / "store" / "gen-3" / "summary", readonly=readonly)
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("killed", [False, True])
def test_a_store_that_lost_most_of_its_users_at_once_opens(tmp_path, build, monkeypatch, killed):
    """LMDB allocates pages for such a transaction, frees them and never writes them, so the file ends before them."""
    build.write_store(tmp_path, total_users=600)
    users, data = np.random.default_rng(0).permutation(600).tolist(), environment_path(tmp_path, 1) / "data.mdb"
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr("vista.store.folder_generation.complete_size", lambda folder: None)
        erase(tmp_path, users[:570])
    size, expected = committed_size(data)
    assert size < expected if killed else size == expected
    with StoreReader.open(tmp_path) as store:
        assert len(store) == 30 and store.get_many(users).found.tolist() == [False] * 570 + [True] * 30
    assert verify_store(tmp_path).num_problems == 0
    erase(tmp_path, users[570:571])
    size, expected = committed_size(data)
    assert size == expected


def test_a_file_that_cannot_be_extended(tmp_path, build, monkeypatch):
    build.write_store(tmp_path, total_users=600)
    users = np.random.default_rng(0).permutation(600).tolist()

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("vista.store.folder_generation.complete_size", fail)
        with pytest.raises(StoreWriteError, match=r"cannot be written: .*Input/output error"):
            erase(tmp_path, users[:570])
    erase(tmp_path, users[:570])
    assert found(tmp_path, users) == [False] * 570 + [True] * 30
    assert verify_store(tmp_path).num_problems == 0


def test_a_truncated_data_file(tmp_path, build):
    build.write_store(tmp_path)
    data = environment_path(tmp_path, 1) / "data.mdb"
    whole = data.read_bytes()
    cuts = {len(whole) - 1: "truncated", 8192: "truncated", 4100: "not an LMDB", 10: "not an LMDB", 0: "not an LMDB"}
    for length, named in cuts.items():
        data.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=rf"data\.mdb is {named}.*refresh the store again"):
            StoreReader.open(tmp_path)
    data.unlink()
    with pytest.raises(StoreError, match=r"data\.mdb: No such file"):
        StoreReader.open(tmp_path)


def test_data_files_of_other_programs(tmp_path, build):
    build.write_store(tmp_path)
    folder = environment_path(tmp_path, 1)
    for version, message in ((1, "not an LMDB"), (0, "never finished")):  # others are in DAMAGE
        shutil.rmtree(folder)
        lmdb.open(str(folder), lib_version=version).close()
        with pytest.raises(StoreError, match=message):
            StoreReader.open(tmp_path)


def test_a_damaged_unfinished_generation_starts_over(tmp_path, build):
    with build.open_writer(tmp_path) as writer:
        build.put_users(writer, range(16))
    (environment_path(tmp_path, 1) / "data.mdb").write_bytes(b"garbage")
    assert build.write_store(tmp_path).count == 40


class _Interrupted(_Gate):
    """Its condition raises KeyboardInterrupt at its n-th use."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.uses, inner = 0, self._condition
        outer = self

        class Condition:
            wait, notify_all = inner.wait, inner.notify_all

            def __enter__(self) -> None:
                outer.uses += 1
                if outer.uses == at:
                    raise KeyboardInterrupt
                inner.__enter__()

            def __exit__(self, *error: object) -> None:
                inner.__exit__(None, None, None)

        self._condition = Condition()  # type: ignore[assignment]


@pytest.mark.parametrize("section", ["shared", "exclusive"])
@pytest.mark.parametrize("at", [1, 2])
def test_an_interrupt_while_entering_or_leaving_blocks_nobody(section, at):
    gate = _Interrupted(at)
    with pytest.raises(KeyboardInterrupt), getattr(gate, section)():
        pass
    with gate.shared():  # The thread's next sections end, and then other threads can enter.
        pass
    with gate.exclusive():
        pass
    done = threading.Event()

    def other() -> None:
        with gate.exclusive():
            done.set()

    threading.Thread(target=other, daemon=True).start()
    assert done.wait(30)


def test_the_files_of_another_generation_are_refused(tmp_path, build):
    root = tmp_path / "store"
    build.write_store(root)
    build.write_store(root, salt=1, run_digest="log-2")
    first, second = (environment_path(root, number) / "data.mdb" for number in (1, 2))
    second.write_bytes(first.read_bytes())
    assert "holds the files of gen-1, not of gen-2; refresh" in verify_store(root).problems[0]
    with pytest.raises(StoreError, match="holds the files of gen-1, not of gen-2; refresh the store again"):
        StoreReader.open(root)
    roll_back(root)  # the remedy
    with StoreReader.open(root) as store:
        assert store.generation == 1
