"""Stores on a real server: what is written is read, generations are published atomically, and readers follow them."""

from __future__ import annotations

import pickle
import threading
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pytest

from tests.forked_child import in_child
from tests.store.conftest import write_generations
from vista.errors import (
    ConfigError,
    RecordError,
    StoreError,
    StoreLockedError,
    StoreWriteError,
    SummarizerMismatchError,
    UserKeyError,
)
from vista.store import NO_TIMESTAMP, StoreReader, server_generation
from vista.store.layout import PASSWORD_VARIABLE, StoreUrl, store_address
from vista.store.reader import open_store, published_manifest
from vista.store.server import Server, ServerTombstones
from vista.store.server_connection import ServerLock
from vista.store.writer import erase

TOTAL = 40


def store_at(url: str) -> Server:
    return Server(StoreUrl.parse(url))


def key_names(server: Any) -> list[bytes]:
    return sorted(server.command("KEYS", "*"))


def test_what_is_written_is_read(server, build, tmp_path):
    url = server.url()
    manifest = build.write_store(url, tail_columns=build.tail_columns)
    build.write_store(tmp_path / "local", tail_columns=build.tail_columns)
    assert (manifest.count, manifest.user_kind, manifest.generation) == (TOTAL, "int", 1)
    users = [3, 99, 0, 39, 3, -1]
    with open_store(url, summarizer_id=build.summarizer(), tail_len=4) as store:
        with StoreReader.open(tmp_path / "local") as local:
            assert store.manifest == local.manifest == published_manifest(url)
            assert list(store.keys()) == list(local.keys()) == list(range(TOTAL))
            ours, theirs = store.get_many(users), local.get_many(users)
        assert ours.found.tolist() == [True, False, True, True, True, False]
        assert ours.last_event_ts.tolist() == [8, NO_TIMESTAMP, 5, 44, 8, NO_TIMESTAMP]
        np.testing.assert_array_equal(ours.summary, theirs.summary)
        np.testing.assert_array_equal(ours.tail.features["dwell"], theirs.tail.features["dwell"])
        assert store.get_many([]).summary.shape == (0, 2, 8)
        assert not store.get_many([-1]).found.any()
        with pytest.raises(UserKeyError, match=r"user 'a': .* type int"):
            store.get_many(["a"])
        assert str(store.path) == url and len(store) == TOTAL


def test_a_request_is_one_command_and_large_batches_are_bounded(server, build, monkeypatch):
    url = server.url()
    build.write_store(url, codec="float32")
    with StoreReader.open(url) as store:
        server.command("CONFIG", "RESETSTAT")
        store.get_many(range(TOTAL))
        stats = server.command("INFO", "commandstats")
        assert {name for name in stats if "|" not in name} == {"cmdstat_mget"} and stats["cmdstat_mget"]["calls"] == 1
        monkeypatch.setattr(store._current(), "batch_size", 16)
        monkeypatch.setattr(store._current(), "_part_size", 5)
        monkeypatch.setattr(server_generation, "RECHECKED_S", 600)
        users = np.random.default_rng(0).integers(-5, TOTAL + 5, 100)
        batch = store.get_many(users)
        assert batch.found.tolist() == [0 <= user < TOTAL for user in users.tolist()]
        expected = build.summaries(range(TOTAL))[users.clip(0, TOTAL - 1)] * batch.found[:, None, None]
        np.testing.assert_array_equal(batch.summary, expected)
        assert list(store.keys()) == list(range(TOTAL))
    assert server.command("INFO", "commandstats")["cmdstat_mget"]["calls"] == 1 + 7


def test_readers_follow_generations_and_never_miss_in_silence(server, build):
    url = server.url()
    build.write_store(url)
    with StoreReader.open(url) as first, StoreReader.open(url) as idle:
        assert not first.reload()
        build.write_store(url, 1, run_digest="log-2")
        assert first.generation == 1 and first.get_many([5]).summary.max() < 100, "until it reloads"
        assert first.reload() and first.generation == 2 and first.get_many([5]).summary.max() > 900
        build.write_store(url, 2, run_digest="log-3")
        assert store_at(url).numbers() == [2, 3], "two are kept"
        batch = idle.get_many([5, 99])  # Its generation is gone, so that none of its users would be found there.
        assert idle.generation == 3 and batch.found.tolist() == [True, False] and batch.summary.max() > 1900
    names = [name for name in key_names(server) if b":gen-1:" in name]
    assert names == []


def test_a_reader_is_pickled_and_forked(server, build):
    url = server.url()
    build.write_store(url)
    with StoreReader.open(url) as store:
        with pickle.loads(pickle.dumps(store)) as copy:
            assert copy.get_many([1]).found.all()
        for copied in (False, True):
            assert in_child(lambda copied=copied: read_in_child(store, copied)) == [True, True]
        failures: list[BaseException] = []

        def read() -> None:
            try:
                for _ in range(20):
                    assert store.get_many(range(TOTAL)).found.all()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.get_many([1])


def read_in_child(store: StoreReader, copied: bool) -> list[bool]:
    """Read with a parent's reader, or with a pickled copy of it."""
    reader = pickle.loads(pickle.dumps(store)) if copied else store
    with reader:
        found: list[bool] = reader.get_many([1, 2]).found.tolist()
        return found


def test_an_unfinished_generation_is_resumed_and_another_run_starts_over(server, build, caplog):
    url = server.url()
    with build.open_writer(url) as writer:
        build.put_users(writer, range(16))
    with pytest.raises(StoreError, match="holds no published generation"):
        StoreReader.open(url)
    with build.open_writer(url) as writer:
        assert (writer.generation, writer.cursor) == (1, 16)
        with pytest.raises(StoreError, match="16 of 40 users are done"):
            writer.publish()
    with build.open_writer(url, run_digest="log-2") as writer:
        assert (writer.generation, writer.cursor) == (1, 0)
    assert "belongs to another run" in caplog.text
    manifest = build.write_store(url, run_digest="log-2")
    assert manifest.count == TOTAL and len(key_names(server)) == TOTAL + 8
    with pytest.raises(ValueError, match="put_batch"), build.open_writer(url, run_digest="log-3") as writer:
        writer.put_batch([b"ui"], [], 1)


def test_a_store_of_another_summarizer_is_refused_and_an_older_one_found(server, build):
    url = server.url()
    build.write_store(url)
    with pytest.raises(SummarizerMismatchError, match="was written by summarizer"):
        StoreReader.open(url, summarizer_id=build.summarizer("b"))
    build.write_store(url, summarizer_id=build.summarizer("b").hex())
    with StoreReader.open(url, summarizer_id=build.summarizer()) as store:
        assert store.generation == 1 and not store.reload()
    with pytest.raises(StoreError, match="tails of 4 events, but the model reads 5"):
        StoreReader.open(url, tail_len=5)
    with pytest.raises(StoreError, match="without an authentication key"):
        StoreReader.open(url, key=bytes(32))


def test_updates_in_place(server, build):
    url = server.url()
    build.write_store(url)
    with StoreReader.open(url) as store:
        build.update(url, range(30, 50), salt=1)
        assert store.get_many(range(50)).found.all()
        assert store.get_many([35]).summary.max() > 900 and store.get_many([5]).summary.max() < 100
        assert not store.reload() and len(store) == 50
    assert published_manifest(url).applied_segment == 1


def test_erased_users_are_missed_at_once_and_never_come_back(server, build):
    url = server.url()
    build.write_store(url)
    with StoreReader.open(url) as store, build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(20))
        assert erase(url, [3, 30, 99]) == 2
        assert store.get_many([3, 30, 4]).found.tolist() == [False, False, True]
        build.put_users(writer, range(20, 40))
        assert writer.publish().count == TOTAL - 2
        assert store.reload() and list(store.keys()) == [user for user in range(TOTAL) if user not in (3, 30)]
    build.update(url, range(40), salt=1)
    with StoreReader.open(url) as store:
        assert not store.get_many([3, 30]).found.any() and len(store) == TOTAL - 2
    assert not [name for name in key_names(server) if name.endswith(b"ui" + (3 + 2**63).to_bytes(8, "big"))]
    with pytest.raises(StoreError, match="holds no store"):
        erase(server.url("other"), [1])


def test_publications_and_erasures_wait_for_the_disk(start_server, build):
    server = start_server("--appendonly", "yes")
    build.write_store(server.url())
    erase(server.url(), [3])
    waits = server.command("INFO", "commandstats").get("cmdstat_waitaof", {"calls": 0})["calls"]
    assert waits >= 2


def test_an_interrupted_erasure_is_completed_by_a_publication(server, build):
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(40))
        store_at(url).erased_users.add(build.records_of(range(5, 6), writer.spec)[0])  # and then it was killed
        assert writer.publish().count == TOTAL - 1


def test_one_writer_at_a_time(server, build, monkeypatch):
    monkeypatch.setattr("vista.store.server_connection.LOCK_S", 1.5)
    url = server.url()
    with build.open_writer(url) as writer:
        build.put_users(writer, range(16))
        with pytest.raises(StoreLockedError, match=r"is being written by process \d+ on "):
            build.open_writer(url)
        writer._store._lock._stopped.set()  # The holder is killed, so nobody renews its lock.
        with build.open_writer(url) as second:
            assert second.cursor == 16
            with pytest.raises(StoreLockedError, match="has taken over"):
                build.put_users(writer, range(16, 32))
            with pytest.raises(StoreLockedError, match="has taken over"):
                writer._store.remove(1)
            build.put_users(second, range(16, 40))
            assert second.publish().count == TOTAL
        with pytest.raises(StoreWriteError, match="the lock expired, or the server lost"):
            build.put_users(writer, range(16, 32))
    assert published_manifest(url).count == TOTAL


def test_a_lock_is_renewed_while_its_holder_computes(server, monkeypatch):
    monkeypatch.setattr("vista.store.server_connection.LOCK_S", 1.5)
    url = StoreUrl.parse(server.url())
    lock = ServerLock(Server(url).connection, b"{mine}:writer")
    lock.acquire()
    for _ in range(6):  # longer than the lock lasts
        assert 0 < int(server.command("PTTL", "{mine}:writer")) <= 1500
        threading.Event().wait(0.3)
    lock.release()
    assert server.command("EXISTS", "{mine}:writer") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("SET", "{mine}:CURRENT", "gen-7"), "CURRENT holds 'gen-7' instead of the name"),
        (("SET", "{mine}:gen-1:!manifest", "x"), "the manifest is corrupt"),
        (("DEL", "{mine}:gen-1:!complete"), "gen-1 was never finished"),
        (("DEL", "{mine}:CURRENT"), "holds no published generation"),
    ],
)
def test_damage_is_named(server, build, change, message):
    build.write_store(server.url())
    server.command(*change)
    with pytest.raises(StoreError, match=message):
        StoreReader.open(server.url())


def test_a_damaged_or_lost_record_is_named(server, build):
    url = server.url()
    build.write_store(url)
    name = b"{mine}:gen-1:ui" + (5 + 2**63).to_bytes(8, "big")
    server.command("SETRANGE", name, 140, b"\xff\xfe")
    with StoreReader.open(url) as store:
        with pytest.raises(RecordError, match="user 5"):
            store.get_many([4, 5])
        assert store.get_many([4, 6]).found.all()
        server.command("DEL", name)
        with pytest.raises(RecordError, match="lists user 5, but the server has lost the record"):
            list(store._current().raw_batches())


def test_a_generation_with_a_damaged_record_is_removed_and_the_next_run_starts_over(server, build):
    url = server.url()
    build.write_store(url)
    with build.open_writer(url, run_digest="log-2") as writer:
        build.put_users(writer, range(TOTAL))
        server.command("SETRANGE", b"{mine}:gen-2:ui" + (5 + 2**63).to_bytes(8, "big"), 140, b"\xff\xfe")
        with pytest.raises(StoreError, match=r"user 5.*gen-2 was removed, and CURRENT is unchanged; rerun"):
            writer.publish()
    assert store_at(url).numbers() == [1]
    assert build.write_store(url, 1, run_digest="log-2").count == TOTAL
    with StoreReader.open(url) as store:
        assert store.generation == 2 and store.get_many(range(TOTAL)).found.all()


def test_functions_on_folders_refuse_a_url(tmp_path):
    from vista.store.admin import compact_store

    with pytest.raises(StoreError, match=r"redis://host:6379/mine is a remote store.*vista store copy"):
        compact_store("redis://user:secret@host/mine")


def keys_of(server, user):
    key = b"ui" + (user + 2**63).to_bytes(8, "big")
    return [name for name in server.command("KEYS", "*") if name.endswith(key)]


def test_a_generation_that_is_published_while_an_erasure_begins(server, build, monkeypatch):
    url = server.url()
    build.write_store(url)
    add = ServerTombstones.add

    def publish_and_add(tombstones, keys):
        with monkeypatch.context() as patch:
            patch.setattr(ServerTombstones, "add", add)
            build.write_store(url, 1, run_digest="log-2")
        add(tombstones, keys)

    monkeypatch.setattr(ServerTombstones, "add", publish_and_add)
    assert erase(url, [3, 30]) == 2
    with StoreReader.open(url) as store:
        assert store.generation == 2 and not store.get_many([3, 30]).found.any() and len(store) == TOTAL - 2
    assert keys_of(server, 3) == keys_of(server, 30) == [] and len(keys_of(server, 4)) == 2


def test_a_generation_that_is_being_removed_loses_the_users_too(server, build):
    """As between the steps of a removal, or after a kill, when the next writer removes the rest."""
    url = server.url()
    write_generations(url)
    for name in (b"!manifest", b"!complete", b"!cursor"):
        assert server.command("DEL", b"{mine}:gen-1:" + name) == 1
    assert len(keys_of(server, 3)) == 2
    assert erase(url, [3, 30]) == 2
    assert keys_of(server, 3) == keys_of(server, 30) == [] and len(keys_of(server, 4)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("redis://host/mine", StoreUrl("host", "mine")),
        ("redis://host:7000/2/mine", StoreUrl("host", "mine", 7000, 2)),
        ("rediss://me:a%40b@host/my-store.1", StoreUrl("host", "my-store.1", user="me", password="a@b", tls=True)),
        ("redis://:secret@[::1]:7/mine?timeout_s=0.5", StoreUrl("::1", "mine", 7, password="secret", timeout_s=0.5)),
        (Path("redis://host/mine"), StoreUrl("host", "mine")),
    ],
)  # fmt: skip
def test_urls(text, expected):
    url = StoreUrl.parse(text)
    assert StoreUrl.matches(text) and url == expected == StoreUrl.parse(url) == pickle.loads(pickle.dumps(url))
    for shown in (str(url), repr(url)):
        assert "secret" not in shown and "a@b" not in shown
    assert StoreUrl.parse(str(url)).name == url.name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("redis://host", "its path must end in the store's name"),
        ("redis://secret@host/0", "its path must end in the store's name"),
        ("redis://host/x/mine", "only the number of a database"),
        ("redis://:1/mine", "it names no host"),
        ("redis:user:secret@host/mine", "it names no host"),
        ("redis://:secret@host:port/mine", "cannot be read"),
        ("redis://:secret@host/mine?ttl=1", "its only option is timeout_s"),
        ("redis://host/mine?timeout_s=nan", "timeout_s must be a positive number"),
    ],
)
def test_other_urls_are_refused(text, message):
    assert StoreUrl.matches(text), "an error that calls it a folder would show its password"
    with pytest.raises(ConfigError, match=message) as caught:
        StoreUrl.parse(text)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("character", "/#?[]")
def test_an_unencoded_password_is_to_be_encoded_or_passed_elsewhere(character):
    remedy = rf"percent-encode / # \? \[ \] @ in a password, or pass it in the variable {PASSWORD_VARIABLE}"
    for password in (f"se{character}cret", f"12{character}secret", f"{character}secret"):
        with pytest.raises(ConfigError, match=remedy) as caught:
            StoreUrl.parse(f"redis://:{password}@host:6379/mine")
        assert "cret" not in str(caught.value)
        encoded = StoreUrl.parse(f"redis://:{quote(password, safe='')}@host:6379/mine")
        assert (encoded.host, encoded.password) == ("host", password)


@pytest.mark.parametrize("text", ["stores/mine", "/srv/redis", "redis", "http://host/mine"])
def test_folders_are_not_urls(text):
    assert not StoreUrl.matches(text) and not StoreUrl.matches(Path(text))


@pytest.mark.parametrize("text", ["Redis://me:secret@host/mine", "valkey:/me:secret@host/mine", "unix:///run/a"])
def test_urls_of_other_schemes_are_neither_stores_nor_folders(text):
    with pytest.raises(StoreError, match="is neither a folder nor the URL of a store; write redis://") as caught:
        store_address(text)
    assert "secret" not in str(caught.value)
