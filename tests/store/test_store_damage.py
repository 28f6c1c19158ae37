"""Damaged, truncated and foreign files: each error names a remedy, and the published generation stays in service.
Who can forge, read and write: authentication codes of records, modes of files and folders, other accounts."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
import pickle
import shutil
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import pytest
import xxhash

from tests.record_reference import decode_record_reference
from tests.store.conftest import KEY, damage_record, found, users_of, write_generations
from vista.config.checks import Codec
from vista.counters.counters import CounterSpec
from vista.errors import ConfigError, RecordError, StoreError, StoreWriteError
from vista.store import NO_TIMESTAMP, StoreReader, Tail, encode_records, user_keys
from vista.store.admin import compact_store, copy_generation, roll_back, store_stats, verify_store
from vista.store.folder_files import committed_size, open_environment
from vista.store.folder_generation import _Gate
from vista.store.layout import environment_path, read_current
from vista.store.manifest import Manifest
from vista.store.record import RecordSpec
from vista.store.record_encoding import KEY_VARIABLE, key_id, read_key
from vista.store.record_reading import read_records
from vista.store.writer import erase

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

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


OTHER = bytes(32)
SPEC = RecordSpec(bytes(32), 7, 2, 4, Codec.int8, key=KEY)
USERS = ["a", "ab"]


def encode(spec: RecordSpec = SPEC, tail_events: int = 2) -> list[bytes]:
    tail = Tail(
        np.arange(tail_events, dtype=np.int32), np.arange(tail_events), np.ones(tail_events, np.uint8),
        np.array([0, tail_events, tail_events]),
    )  # fmt: skip
    events = {"tail": tail, "event_count": np.array([2, 0]), "last_event_ts": np.array([1, NO_TIMESTAMP])}
    summary = np.arange(16, dtype=np.float32).reshape(2, 2, 4)
    return encode_records(users_of(user_keys(USERS), summary=summary, **events), spec)


def with_checksum(record: bytes) -> bytes:
    zeroed = record[:120] + bytes(8) + record[128:]
    return record[:120] + xxhash.xxh3_64_intdigest(zeroed).to_bytes(8, "little") + record[128:]


def test_an_authenticated_record_differs_by_a_flag_and_16_more_bytes():
    keyed, plain = encode()[0], encode(dataclasses.replace(SPEC, key=None))[0]
    assert len(keyed) == len(plain) + 16
    changed = [place for place in range(120) if keyed[place] != plain[place]]
    assert changed == [8, 20] and keyed[8] == 1 and keyed[128:-16] == plain[128:]
    raw = read_records(encode(), user_keys(USERS), SPEC)
    np.testing.assert_allclose(raw.summary.ravel(), np.arange(16), atol=0.01)
    assert raw.tail.items.tolist() == [0, 1] and raw.tail.actions.tolist() == [1, 1]
    fields = decode_record_reference(keyed)
    assert fields["flags"] == 1 and fields["items"].tolist() == [0, 1] and fields["actions"].tolist() == [1, 1]


def test_the_code_follows_the_documented_format():
    record, user = encode()[1], user_keys(USERS)[1]
    signed = len(user).to_bytes(2, "little") + user + record[:120] + bytes(8) + record[128:-16]
    assert record[-16:] == hashlib.blake2b(signed, digest_size=16, key=KEY, person=b"vista record 1").digest()


def test_every_changed_byte_is_detected_with_the_key():
    records, keys = encode(), user_keys(USERS)
    for place in range(len(records[0])):
        bad = bytearray(records[0])
        bad[place] ^= 0x40
        with pytest.raises(RecordError, match=r"user 'a'"):
            read_records([with_checksum(bytes(bad)) if not 120 <= place < 128 else bytes(bad), records[1]], keys, SPEC)


def test_a_record_cannot_be_made_without_the_key_or_moved():
    records, keys = encode(), user_keys(USERS)
    for forged in (encode(dataclasses.replace(SPEC, key=OTHER)), [with_checksum(r[:-16] + bytes(16)) for r in records]):
        with pytest.raises(
            RecordError, match=r"user 'a' has a wrong authentication code: it was not written with this"
        ):
            read_records(forged, keys, SPEC)
    with pytest.raises(RecordError, match=r"user 'a'.*: flags is 0, expected 1"):
        read_records(encode(dataclasses.replace(SPEC, key=None)), keys, SPEC)
    # Moved to another user, and to another generation, with all fields adapted that need no key.
    moved = bytearray(records[0])
    moved[64:72] = xxhash.xxh3_64_intdigest(keys[1]).to_bytes(8, "little")
    with pytest.raises(RecordError, match=r"user 'ab' has a wrong authentication code.* was changed or moved since"):
        read_records([records[0], with_checksum(bytes(moved))], keys, SPEC)
    moved = bytearray(records[0])
    moved[24] = 8
    with pytest.raises(RecordError, match=r"user 'a' has a wrong authentication code.* was changed or moved since"):
        read_records([with_checksum(bytes(moved))], keys[:1], dataclasses.replace(SPEC, generation=8))


def test_stores_with_and_without_a_key(tmp_path, build, caplog):
    build.write_store(tmp_path / "keyed", key=KEY)
    build.write_store(tmp_path / "plain")
    with StoreReader.open(tmp_path / "keyed", key=KEY) as store:
        np.testing.assert_allclose(store.get_many(range(40)).summary, build.summaries(range(40)), atol=0.02)
        with pickle.loads(pickle.dumps(store)) as again:
            assert again.get_many([3]).found.all()
    with pytest.raises(StoreError, match=rf"authentication key {key_id(KEY)}; pass it: key=… .*{KEY_VARIABLE}"):
        StoreReader.open(tmp_path / "keyed")
    with pytest.raises(StoreError, match=f"{key_id(KEY)}, but the given key is {key_id(OTHER)}"):
        StoreReader.open(tmp_path / "keyed", key=OTHER)
    with pytest.raises(StoreError, match="written without an authentication key"):
        StoreReader.open(tmp_path / "plain", key=KEY)
    for text in (KEY.hex(), repr(KEY)):
        assert text not in caplog.text and text not in repr(SPEC)


def test_a_run_is_not_resumed_with_another_key(tmp_path, build):
    with build.open_writer(tmp_path, key=KEY) as writer:
        build.put_users(writer, range(16))
    with build.open_writer(tmp_path, key=KEY) as writer:
        assert writer.cursor == 16
    with build.open_writer(tmp_path, key=OTHER) as writer:
        assert writer.cursor == 0
    with pytest.raises(ValueError, match="32 bytes"):
        build.open_writer(tmp_path, key=b"short")


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert read_key(None) is None
    for number, held in enumerate((KEY, KEY.hex().encode() + b"\n")):
        (tmp_path / f"key-{number}").write_bytes(held)
        assert read_key(str(tmp_path / f"key-{number}")) == KEY
    monkeypatch.setenv(KEY_VARIABLE, OTHER.hex())
    assert read_key(None) == OTHER and read_key(str(tmp_path / "key-0")) == KEY
    for bad in (b"", b"secret", KEY + b"\n\n", KEY.hex().encode()[:-1], b"\xff" * 64):
        (tmp_path / "bad").write_bytes(bad)
        with pytest.raises(ConfigError, match=r"authentication_key_file: .*bad must hold 32 bytes") as error:
            read_key(str(tmp_path / "bad"))
        assert "secret" not in str(error.value)
    monkeypatch.setenv(KEY_VARIABLE, "zz")
    with pytest.raises(ConfigError, match=f"{KEY_VARIABLE} must hold"):
        read_key(None)
    with pytest.raises(ConfigError, match="No such file"):
        read_key(str(tmp_path / "none"))


@pytest.fixture(params=[0, 0o022, 0o077, 0o777], ids=lambda mask: f"umask-{mask:03o}")
def umask(request):
    before = os.umask(request.param)
    yield
    os.umask(before)


def modes(root: Path) -> dict[str, int]:
    return {str(path.relative_to(root)): stat.S_IMODE(path.stat().st_mode) for path in [root, *root.rglob("*")]}


FOLDERS = {".", "gen-1", "gen-1/summary", "gen-2", "gen-2/summary"}
LOCKS = {"gen-1/summary/lock.mdb", "gen-2/summary/lock.mdb"}
FILES = {"CURRENT", "LAST", "gen-1/summary/data.mdb", "gen-2/summary/data.mdb"}


def two_generations(root, **options):
    write_generations(root, **options)
    StoreReader.open(root).close()


def test_a_store_is_private(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(root)
    assert modes(root) == dict.fromkeys(FOLDERS, 0o700) | dict.fromkeys(
        FILES | LOCKS | {"erase.lock", "writer.lock"}, 0o600
    )


def test_a_store_for_a_group(tmp_path, build, umask):
    root = tmp_path / "store"
    two_generations(root, shared_with_group=True)
    expected = dict.fromkeys(FOLDERS, 0o2750) | dict.fromkeys(FILES, 0o640) | dict.fromkeys(LOCKS, 0o660)
    assert modes(root) == expected | {"erase.lock": 0o600, "writer.lock": 0o600}


def test_a_store_becomes_shared_and_private_again(tmp_path, build):
    root = tmp_path / "store"
    two_generations(root)
    private = modes(root)
    build.open_writer(root, run_digest="log-2", shared_with_group=True).close()
    shared = modes(root)
    assert shared["."] == 0o2750 and shared["CURRENT"] == 0o640 and shared["gen-1/summary/lock.mdb"] == 0o660
    (environment_path(root, 2) / "lock.mdb").unlink()  # The next reader recreates it with the same mode.
    StoreReader.open(root).close()
    assert modes(root) == shared
    build.open_writer(root, run_digest="log-2").close()
    assert {name: mode for name, mode in modes(root).items() if not name.startswith("gen-3")} == private


def test_a_folder_with_other_contents_keeps_its_mode(tmp_path, build):
    tmp_path.chmod(0o755)
    (tmp_path / "notes.txt").write_text("mine")
    build.write_store(tmp_path)
    after = modes(tmp_path)
    assert after["."] == 0o755 and after["gen-1"] == 0o700 and after["CURRENT"] == 0o600


def test_another_account_reads_a_store_of_its_group_and_no_other(build, as_other_account):
    def read() -> Any:
        with StoreReader.open(root) as store:
            return store.get_many([3]).found.tolist()

    root = as_other_account.folder / "store"
    root.mkdir()
    os.chown(root, -1, as_other_account.group)
    two_generations(root, shared_with_group=True)
    assert as_other_account(read) == [True]
    (environment_path(root, 2) / "lock.mdb").chmod(0o640)
    assert "Readers also need write access to lock.mdb" in str(as_other_account(read))
    (environment_path(root, 2) / "lock.mdb").unlink()  # which it cannot recreate either
    assert "Readers also need write access to lock.mdb" in str(as_other_account(read))
    build.write_store(root, run_digest="log-3")
    error = as_other_account(read)
    assert isinstance(error, StoreError) and "permission" in str(error).lower()


def test_another_account_cannot_write_and_is_told_what_to_do(build, as_other_account):
    root = as_other_account.folder / "store"
    root.mkdir()
    os.chown(root, -1, as_other_account.group)
    two_generations(root, shared_with_group=True)

    def forms() -> dict[Path, tuple[int, ...]]:
        paths = [path for path in root.rglob("*") if path.name != "lock.mdb"]
        return {path: (path.stat().st_mode, path.stat().st_size, path.stat().st_ctime_ns) for path in paths}

    before = forms()
    for act in (
        lambda: build.open_writer(root, run_digest="log-3"),
        lambda: build.open_writer(root, run_digest="log-3", shared_with_group=True),
        lambda: compact_store(root),
        lambda: roll_back(root),
        lambda: copy_generation(root, as_other_account.folder / "target"),
    ):
        error = as_other_account(act)
        assert isinstance(error, StoreError) and "cannot be written" in str(error) and "permissions" in str(error), (
            error
        )
    assert before == forms()
    assert as_other_account(lambda: verify_store(root).num_problems) == 0
    assert "gen-2 is published" in as_other_account(lambda: str(store_stats(root)))
