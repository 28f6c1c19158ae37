"""The file of tombstones after a power cut, after damage, and its bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path

import pytest
import xxhash

from tests.faults.disk_images import File
from vista.errors import StoreWriteError
from vista.store import StoreReader, user_keys
from vista.store.admin.verification import verify_store
from vista.store.erasure import erase
from vista.store.locks import erasure_lock
from vista.store.tombstones import Tombstones, unpacked


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


@pytest.mark.parametrize("num_users", [5, 40, 400])
@pytest.mark.parametrize("num_before", [0, 3, 100])
def test_an_erasure_repeated_after_a_power_cut_erases_every_user(tmp_path, monkeypatch, num_users, num_before):
    """Any sectors that were not synced may be lost, and the names may be old or new, at every sync of the erasure."""
    root, before, users = tmp_path / "store", range(10_000, 10_000 + num_before), range(num_users)
    root.mkdir()
    if num_before:
        add(root, before)
    durable_names = {path.name: path.stat().st_ino for path in root.iterdir()}
    durable = {path.stat().st_ino: path.read_bytes() for path in root.iterdir()}
    states: list[tuple[dict[str, File], ...]] = []
    fsync = os.fsync

    def note_state(descriptor: int) -> None:
        now = {path.name: path.stat().st_ino for path in root.iterdir()}
        files = {
            path.stat().st_ino: File(bytearray(durable.get(path.stat().st_ino, b"")), [(0, path.read_bytes())])
            for path in root.iterdir()
        }
        old = {name: files.get(inode) or File(bytearray(durable[inode])) for name, inode in durable_names.items()}
        states.append((old, {name: files[inode] for name, inode in now.items()}))
        status = os.fstat(descriptor)
        if status.st_ino == root.stat().st_ino:
            durable_names.clear()
            durable_names.update(now)
        elif status.st_ino in files:
            durable[status.st_ino] = bytes(files[status.st_ino].pending[0][1] or b"")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note_state)
        add(root, users)
    note_state(os.open(root, os.O_RDONLY))  # the power cut after the acknowledgment
    assert len(states) == 3
    for step, state in enumerate(states):
        for seed in range(10):
            chance, image = random.Random(seed), tmp_path / "image"
            shutil.rmtree(image, ignore_errors=True)
            image.mkdir()
            for name, file in chance.choice(state).items():
                (image / name).write_bytes(file.image(chance))
            if step == len(states) - 1:
                assert all(Tombstones(image).erased(user_keys([*users, *before]))), "acknowledged, and lost"
            add(image, users)
            assert all(Tombstones(image).erased(user_keys([*users, *before])))
            assert len(Tombstones(image)) == num_users + num_before
            assert not [path for path in image.iterdir() if path.name.endswith(".tmp")]


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
        for bits in range(1, 256):
            with pytest.raises(ValueError, match=r"VTMB|version|its count|checksum"):
                unpacked(whole[:at] + bytes([whole[at] ^ bits]) + whole[at + 1 :])
    for content in [*(whole[:end] for end in range(56)), whole + b"\0", whole + whole, whole[:40] + whole]:
        with pytest.raises(ValueError, match=r"fewer than a header|its count|checksum"):
            unpacked(content)
    path.write_bytes(whole[:-1])
    for tombstones in (reader, Tombstones(tmp_path)):
        with pytest.raises(StoreWriteError, match="is damaged"):
            len(tombstones)


def test_digests_out_of_order_are_an_error(tmp_path):
    digests = sorted(map(digest, user_keys([1, 2])), reverse=True)
    for held in (digests, digests[:1] * 2):
        content = b"VTMB" + bytes([1, 0, 0, 0]) + (2).to_bytes(8, "little") + b"".join(held)
        (tmp_path / "tombstones").write_bytes(content + xxhash.xxh3_64_intdigest(content).to_bytes(8, "little"))
        with pytest.raises(StoreWriteError, match="not in ascending order"):
            len(Tombstones(tmp_path))


def test_a_link_or_a_named_pipe_is_refused(tmp_path, build):
    build.write_store(tmp_path / "store")
    path = tmp_path / "store" / "tombstones"
    (tmp_path / "victim").write_bytes(b"kept")
    path.symlink_to(tmp_path / "victim")
    with pytest.raises(StoreWriteError, match="symbolic link"):
        erase(tmp_path / "store", [1])
    assert (tmp_path / "victim").read_bytes() == b"kept"
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(StoreWriteError, match="not a regular file"):
        erase(tmp_path / "store", [1])
