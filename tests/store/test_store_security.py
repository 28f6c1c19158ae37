"""Who can forge, read and write: authentication codes of records, modes of files and folders, other accounts."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pickle
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from tests.record_reference import decode_record_reference
from tests.store.conftest import KEY, users_of, write_generations
from vista.config.checks import Codec
from vista.errors import ConfigError, RecordError, StoreError
from vista.store import NO_TIMESTAMP, StoreReader, Tail, encode_records, user_keys
from vista.store.admin import compact_store, copy_generation, roll_back, store_stats, verify_store
from vista.store.layout import environment_path
from vista.store.record import RecordSpec
from vista.store.record_encoding import KEY_VARIABLE, key_id, read_key
from vista.store.record_reading import read_records

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
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
