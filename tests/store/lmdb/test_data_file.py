"""Data files that are truncated, damaged, of other programs, or only look so."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import lmdb
import numpy as np
import pytest

from vista.errors import StoreError, StoreWriteError
from vista.store import StoreReader
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.layout import environment_path
from vista.store.lmdb.data_file import committed_size


@pytest.mark.parametrize("killed", [False, True])
def test_a_store_that_lost_most_of_its_users_at_once_opens(tmp_path, build, monkeypatch, killed):
    """LMDB allocates pages for such a transaction, frees them and never writes them, so the file ends before them."""
    build.write_store(tmp_path, total_users=600)
    users, data = np.random.default_rng(0).permutation(600).tolist(), environment_path(tmp_path, 1) / "data.mdb"
    with monkeypatch.context() as patch:
        if killed:
            patch.setattr("vista.store.lmdb.environment.complete_size", lambda folder: None)
        erase(tmp_path, users[:570])
    size, expected = committed_size(data)
    assert size < expected if killed else size == expected
    with StoreReader.open(tmp_path) as store:
        assert len(store) == 30 and store.get_many(users).found.tolist() == [False] * 570 + [True] * 30
    assert verify_store(tmp_path).num_problems == 0
    erase(tmp_path, users[570:571])
    size, expected = committed_size(data)
    assert size == expected


def test_lmdb_without_a_lock_file(tmp_path, build, monkeypatch):
    """As on a read-only file system, where LMDB reads without a lock."""
    build.write_store(tmp_path)
    (environment_path(tmp_path, 1) / "lock.mdb").unlink()
    lmdb_open = lmdb.open
    monkeypatch.setattr("vista.store.lmdb.data_file._make_reader_table", lambda path: None)
    monkeypatch.setattr(
        "vista.store.lmdb.data_file.lmdb.open", lambda *a, **options: lmdb_open(*a, **options, lock=False)
    )
    with StoreReader.open(tmp_path) as store:
        assert store.get_many(range(40)).found.all()
    assert not (environment_path(tmp_path, 1) / "lock.mdb").exists()


def test_a_file_that_cannot_be_extended(tmp_path, build, monkeypatch):
    build.write_store(tmp_path, total_users=600)
    users = np.random.default_rng(0).permutation(600).tolist()

    def fail(folder: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("vista.store.lmdb.environment.complete_size", fail)
        with pytest.raises(StoreWriteError, match=r"cannot be written: .*Input/output error"):
            erase(tmp_path, users[:570])
    erase(tmp_path, users[:570])
    with StoreReader.open(tmp_path) as store:
        assert store.get_many(users).found.tolist() == [False] * 570 + [True] * 30
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
    (folder / "data.mdb").write_bytes(b"PAR1" * 5000)
    with pytest.raises(StoreError, match="not an LMDB"):
        StoreReader.open(tmp_path)
    shutil.rmtree(folder)
    lmdb.open(str(folder), lib_version=1).close()
    with pytest.raises(StoreError, match="not an LMDB"):
        StoreReader.open(tmp_path)
    shutil.rmtree(folder)
    lmdb.open(str(folder), lib_version=0).close()
    with pytest.raises(StoreError, match="never finished"):
        StoreReader.open(tmp_path)


def test_a_damaged_unfinished_generation_starts_over(tmp_path, build):
    with build.open_writer(tmp_path) as writer:
        build.put_users(writer, range(16))
    (environment_path(tmp_path, 1) / "data.mdb").write_bytes(b"garbage")
    assert build.write_store(tmp_path).count == 40


@pytest.mark.parametrize("find", [b'"dim": 8', b"ui" + (1 << 63).to_bytes(8, "big")])
def test_flipped_bits_in_the_data_file(tmp_path, build, find):
    build.write_store(tmp_path)
    data = environment_path(tmp_path, 1) / "data.mdb"
    flipped = bytearray(data.read_bytes())
    places = [place for place in range(len(flipped)) if flipped.startswith(find, place)]
    assert places
    for place in places:
        flipped[place + len(find) - 1 + (64 if find.startswith(b"ui") else 0)] ^= 1
    data.write_bytes(flipped)
    with pytest.raises(StoreError, match="corrupt"), StoreReader.open(tmp_path) as store:
        store.get_many([0])
